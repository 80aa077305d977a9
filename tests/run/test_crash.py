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

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import PROCESSES, content, read_records, train

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # power or memory failing, preemption, Ctrl-C
PATIENCE = 120  # seconds that a process may take; more is a hang


def in_child(directory: Path, started) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as main.py does
    sys.stdout = sys.stderr = open(directory.with_suffix(".log"), "a", buffering=1)  # noqa: SIM115
    started.set()
    sys.exit(train(directory, "--end_epoch", "5", "--saveckp_freq", "2"))


def start(directory: Path):
    """The command in a process of its own, which begins now."""
    started = PROCESSES.Event()
    process = PROCESSES.Process(target=in_child, args=(directory, started))
    process.start()
    started.wait(PATIENCE)
    return process


def wait_until_random(process, directory: Path, choose: random.Random, usual: float) -> None:
    """Until a random moment of the `usual` seconds, half of the times on to the next write of a checkpoint."""
    process.join(choose.uniform(0, usual))
    deadline = time.monotonic() + usual * choose.randrange(2)
    while process.is_alive() and time.monotonic() < deadline:
        if list(directory.glob("checkpoint_*.tmp")):
            break
        time.sleep(0.0005)
    process.join(choose.uniform(0, 0.05))


def end(process, directory: Path, number: int = 0) -> int:
    """The exit status of a process that got this signal: 0, or what the signal makes of it."""
    process.join(PATIENCE)
    process.kill()  # nothing, unless it hangs
    process.join()
    allowed = (0, -number, 128 + number) if number else (0,)
    assert process.exitcode in allowed, directory.with_suffix(".log").read_text()
    return process.exitcode


def undisturbed(directory: Path) -> None:
    end(start(directory), directory)


def attempt(directory: Path, choose: random.Random, usual: float) -> bool:
    """Run the command, with a signal at a random moment; whether that stopped it."""
    number = choose.choice(SIGNALS)
    process = start(directory)
    wait_until_random(process, directory, choose, usual)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
    return end(process, directory, number) != 0


def num_saved(directory: Path) -> int:
    """The number of epochs in metrics.jsonl, which are counted without a gap."""
    if not (directory / "metrics.jsonl").exists():
        return 0
    epochs = [record["epoch"] for record in read_records(directory)]
    assert epochs == list(range(len(epochs)))
    return len(epochs)


def check_content(directory: Path, reference: dict) -> None:
    found = content(directory)
    differing = [name for name in found | reference if found.get(name) != reference.get(name)]
    assert differing == []


def crash(num_kills: int, seed: int, parent: Path) -> None:
    """Kill `num_kills` times; every run that was started is finished and compared."""
    choose = random.Random(seed)
    undisturbed(parent / "reference")  # which also starts the server of processes
    reference = content(parent / "reference")
    begin = time.monotonic()
    undisturbed(parent / "timed")
    usual = time.monotonic() - begin
    kills = 0
    directories = (parent / f"run {number}" for number in itertools.count())
    while kills < num_kills:
        directory = next(directories)
        before = 0
        is_stopped = True
        while is_stopped and kills < num_kills:
            is_stopped = attempt(directory, choose, usual)
            kills += is_stopped
            assert num_saved(directory) >= before
            before = num_saved(directory)
        if is_stopped:
            undisturbed(directory)
        check_content(directory, reference)
    print(f"{kills} kills, nothing lost, nothing different")


@pytest.mark.slow
def test_killed_at_random_moments_the_same_command_ends_in_the_same_bits(tmp_path):
    crash(4, 0, tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        crash(int(sys.argv[1]), random.randrange(10**6), Path(temporary))
