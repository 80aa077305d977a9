"""The paper: its published numbers and the rows of its tables as settings of main.py; the settings of the study; and
where this repository is.

Needs neither PyTorch nor main.py.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
BLOCK_FLAGS = {"BYOT_from_k_block": 1, "num_resnet_blocks": 4}  # with main.py's defaults

# Of the study (scripts/study.sh), in the order of README's table: the runs' name, words for readers, flags of main.py.
SETTINGS = [
    ("baseline", "none (baseline)", ""),
    ("label_smoothing", "label smoothing 0.1", "--label_smoothing 0.1"),
    ("PSKD", "PS-KD", "--PSKD"),
    ("BYOT", "BYOT", "--BYOT"),
    ("deep_supervision", "deep supervision (labels on the exits, no teacher)", "--BYOT --alpha 0 --beta 0"),
    ("DML", "DML", "--DML"),
    ("PSKD+BYOT", "PS-KD + BYOT", "--PSKD --BYOT"),
    ("PSKD+DML", "PS-KD + DML", "--PSKD --DML"),
    ("BYOT+DML", "BYOT + DML", "--BYOT --DML"),
    ("PSKD+BYOT+DML", "PS-KD + BYOT + DML", "--PSKD --BYOT --DML"),
]


def table_rows(table: int) -> list[dict]:
    """The paper's rows: `row` (from 1), `model`, `methods`, the two block flags, and the published values."""
    defaults = {"model": "resnet18", "methods": ["PSKD", "BYOT", "DML"], **BLOCK_FLAGS}
    return [{**defaults, **row, "row": i} for i, row in enumerate(PUBLISHED[f"table{table}"]["rows"], 1)]
