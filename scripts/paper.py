"""The paper: its published numbers and the rows of its tables as settings of main.py; the settings of the study; and
where this repository is.

Needs neither PyTorch nor main.py.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
BLOCK_FLAGS = {"BYOT_from_k_block": 1, "num_resnet_blocks": 4}  # with main.py's defaults

# Of the study (scripts/study.sh): the runs' name, and flags of main.py.
SETTINGS = {
    "baseline": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "PSKD": {"PSKD": True},
    "BYOT": {"BYOT": True},
    "deep_supervision": {"BYOT": True, "alpha": 0, "beta": 0},  # labels on the exits, no teacher
    "DML": {"DML": True},
    "PSKD+BYOT": {"PSKD": True, "BYOT": True},
    "PSKD+DML": {"PSKD": True, "DML": True},
    "BYOT+DML": {"BYOT": True, "DML": True},
    "PSKD+BYOT+DML": {"PSKD": True, "BYOT": True, "DML": True},
}


def table_rows(table: int) -> list[dict]:
    """The paper's rows: `row` (from 1), `model`, `methods`, the two block flags, and the published values."""
    defaults = {"model": "resnet18", "methods": ["PSKD", "BYOT", "DML"], **BLOCK_FLAGS}
    return [{**defaults, **row, "row": i} for i, row in enumerate(PUBLISHED[f"table{table}"]["rows"], 1)]
