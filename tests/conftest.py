"""Where the program is, and how many threads it may use."""

import os
import sys
from pathlib import Path

# One thread per process: the networks are tiny, and tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
