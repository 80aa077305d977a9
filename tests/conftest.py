import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread a process: the networks are tiny, and tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def keep_signals():
    """For tests that call main.main: it installs handlers for a process of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
