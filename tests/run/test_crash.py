"""A small run, killed at random moments and started again by the same command, ends in the bits of an undisturbed one.

`python tests/run/test_crash.py 50` kills 50 times. The processes have loaded PyTorch before the clock starts, so that
most kills hit the run itself; half of them wait until a checkpoint is being written.
"""

import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import PROCESSES, content, read_records, train

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # power or memory failing, preemption, Ctrl-C
PATIENCE = 120  # seconds that a process may take; more is a hang


def in_child(directory: Path, started) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as main.py does
    sys.stdout = sys.stderr = open(directory.with_suffix(".log"), "a", buffering=1)  # noqa: SIM115
    started.set()
    sys.exit(train(directory, "--end_epoch", "5", "--saveckp_freq", "2"))


def attempt(directory: Path, choose: random.Random | None = None, usual: float = 0) -> int:
    """Run the command, with `choose` sending a signal at a random moment of the `usual` seconds; its exit status,
    negative if a signal ended it."""
    started = PROCESSES.Event()
    process = PROCESSES.Process(target=in_child, args=(directory, started))
    process.start()
    started.wait(PATIENCE)
    number = choose.choice(SIGNALS) if choose else 0
    if choose:
        process.join(choose.uniform(0, usual))
        deadline = time.monotonic() + usual * choose.randrange(2)
        while process.is_alive() and time.monotonic() < deadline and not list(directory.glob("checkpoint_*.tmp")):
            time.sleep(0.0005)
        process.join(choose.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    process.join(PATIENCE)
    process.kill()  # nothing, unless it hangs
    process.join()
    log = directory.with_suffix(".log").read_text()
    assert process.exitcode == 0 or (number and process.exitcode in (-number, 128 + number)), (process.exitcode, log)
    return process.exitcode


def crash(num_kills: int, seed: int, parent: Path) -> None:
    """Kill `num_kills` times; every run that was started is finished and compared."""
    choose, kills = random.Random(seed), 0
    attempt(parent / "reference")  # which also starts the server of processes
    start = time.monotonic()
    attempt(parent / "timed")
    usual = time.monotonic() - start
    reference = content(parent / "reference")
    directories = (parent / f"run {number}" for number in itertools.count())
    while kills < num_kills:
        directory, num_saved = next(directories), 0
        while attempt(directory, choose if kills < num_kills else None, usual):
            kills += 1
            records = read_records(directory) if (directory / "metrics.jsonl").exists() else []
            assert [record["epoch"] for record in records] == list(range(len(records))) and len(records) >= num_saved
            num_saved = len(records)
        found = content(directory)
        assert found == reference, [key for key in found | reference if found.get(key) != reference.get(key)]
    print(f"{kills} kills, nothing lost, nothing different")


def test_killed_at_random_moments_the_same_command_ends_in_the_same_bits(tmp_path):
    crash(4, 0, tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        crash(int(sys.argv[1]), random.randrange(10**6), Path(temporary))
