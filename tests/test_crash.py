"""A small run, killed at random moments and started again by the same command, ends in the bits of an undisturbed one.

`python tests/test_crash.py 50` kills 50 times. The processes have loaded PyTorch before the clock starts, so that most
kills hit the run itself; half of them wait until a checkpoint is being written.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  (finds the program when this file is run by itself)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_main import read_records
from test_run_directory import content, train

import main
from utils.run_directory import NEW

ROOT = Path(main.__file__).parent
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # power or memory failing, preemption, Ctrl-C
PATIENCE = 120  # seconds that a process may take; more is a hang
WORDS = ("--end_epoch", "5", "--saveckp_freq", "2")


def in_child(directory: Path, started) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as main.py does
    console = os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(console, 1)
    os.dup2(console, 2)
    started.set()
    sys.exit(train(directory, *WORDS))


def attempt(directory: Path, choose: random.Random | None, usual: float) -> int:
    """Run the command, with `choose` sending a signal at a random moment of the `usual` seconds; its exit status,
    negative if a signal ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.tensorboard", "torchvision"])
    started = context.Event()
    process = context.Process(target=in_child, args=(directory, started))
    process.start()
    started.wait(PATIENCE)
    if choose:
        process.join(choose.uniform(0, usual))
        if choose.random() < 0.5:
            files = [directory / NEW, directory / f"{NEW}.tmp"]
            deadline = time.monotonic() + usual
            while process.is_alive() and time.monotonic() < deadline and not any(file.exists() for file in files):
                time.sleep(0.0005)
            process.join(choose.uniform(0, 0.05))
        number = choose.choice(SIGNALS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    process.join(PATIENCE)
    process.kill()  # nothing, unless it hangs
    process.join()
    killed = choose is not None and process.exitcode in (-number, 128 + number)
    assert process.exitcode == 0 or killed, (process.exitcode, directory.with_suffix(".log").read_text())
    return process.exitcode


def repeated_scalars(directory: Path) -> list[str]:
    """TensorBoard's scalars that have a step twice."""
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps
    return [tag for tag, found in steps.items() if len(set(found)) < len(found)]


def crash(num_kills: int, seed: int, work: Path) -> None:
    """Kill `num_kills` times; every run that was started is finished and compared."""
    choose, kills = random.Random(seed), 0
    attempt(work / "reference", None, 0)  # which also starts the server of processes
    start = time.monotonic()
    attempt(work / "timed", None, 0)
    usual = time.monotonic() - start
    reference = content(work / "reference")
    while kills < num_kills:
        directory, num_saved = work / f"after {kills} kills", 0
        while status := attempt(directory, choose if kills < num_kills else None, usual):
            kills += status != 0
            records = read_records(directory) if (directory / "metrics.jsonl").exists() else []
            assert [record["epoch"] for record in records] == list(range(len(records))) and len(records) >= num_saved
            num_saved = len(records)
        found = content(directory)
        assert found == reference, [key for key in found | reference if found.get(key) != reference.get(key)][:5]
        assert not repeated_scalars(directory)
    print(f"{kills} kills, nothing lost, nothing different")


def test_killed_at_random_moments_the_same_command_ends_in_the_same_bits(tmp_path):
    crash(5, 0, tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        crash(int(sys.argv[1]), random.randrange(10**6), Path(temporary))
