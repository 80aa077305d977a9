import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread a process: the networks are tiny, and tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
