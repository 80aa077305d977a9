"""The paper: its published numbers, the rows of its tables as settings of main.py, and where this repository is.

Needs neither PyTorch nor main.py.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
BLOCK_FLAGS = {"BYOT_from_k_block": 1, "num_resnet_blocks": 4}  # with main.py's defaults


def table_rows(table: int) -> list[dict]:
    """The paper's rows: `row` (from 1), `model`, `methods`, the two block flags, and the published values."""
    defaults = {"model": "resnet18", "methods": ["PSKD", "BYOT", "DML"], **BLOCK_FLAGS}
    return [{**defaults, **row, "row": i} for i, row in enumerate(PUBLISHED[f"table{table}"]["rows"], 1)]
