"""Kill a small run at random moments, give the same command again until it is finished, and compare it, to the
bit, with a run that was left alone.

Processes are forked from this one, which has loaded PyTorch and the images already: what is left of a run is what
touches its directory, so that every kill counts. Half of them wait until a checkpoint is being written. Signals
are SIGKILL (as power or memory failing), SIGTERM (preemption) and SIGINT (Ctrl-C).
"""

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
from data import DATASETS
from utils.run_directory import NEW, NOT_DEFINING

RUN = (
    "--PSKD --BYOT --DML --data_type synthetic --classes 10 --image_size 16 --limit_train 64 --limit_val 32"
    " --val_split 0.2 --width 8 --batch_size 32 --lr 0.05 --lr_decay_schedule 4 --end_epoch 6 --saveckp_freq 2"
    " --save_predictions --device cpu --precision fp32"
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 120  # seconds, for a whole run or for the end after a signal: more than that is a hang
WRITING = 0.1  # seconds in which an epoch's files are written


def flatten(value, path: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested dicts and lists, each with its path, but for times and for where the run lies; tensors
    and arrays as type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, dict):
        for key, item in value.items():
            if "second" not in str(key) and key not in NOT_DEFINING:
                yield from flatten(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        yield f"{path}/length", len(value)
        for i, item in enumerate(value):
            yield from flatten(item, f"{path}/{i}")
    elif isinstance(value, np.ndarray):
        yield path, (value.dtype, value.shape, value.tobytes())
    else:
        yield path, value


def read_events(directory: Path) -> dict:
    """TensorBoard's scalars: `tag/step` -> value, and `doubled`, the images and scalars that stand there twice."""
    scalars, seen, doubled = {}, set(), []
    for file in directory.iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith("_"):
                    continue  # the hyper-parameters' tab
                key = f"{value.tag}/{event.step}"
                doubled += [key] * (key in seen)
                seen.add(key)
                if not value.tag.startswith(("figures/", "run/")):
                    scalars[key] = tuple(value.tensor.float_val)
    return scalars | {"doubled": doubled}


def content(run: Path) -> dict[str, object]:
    """Everything in a run directory that must not depend on what happened to the run, flat."""
    found = {"files": sorted(file.name for file in run.iterdir())}
    for file in run.glob("*.pth"):
        found[file.name] = torch.load(file, weights_only=True)
    for file in run.glob("*.npz"):
        found[file.name] = dict(np.load(file))
    for name in ("config.json", "results.json"):
        found[name] = json.loads((run / name).read_text())
    found["metrics.jsonl"] = read_records(run)
    found["tensorboard"] = read_events(run / "tensorboard")
    return dict(flatten(found))


def read_records(run: Path) -> list[dict]:
    """The lines of metrics.jsonl. Raises ValueError where one is torn, doubled or missing."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    records = [json.loads(line) for line in text.splitlines()]
    if [record["epoch"] for record in records] != list(range(len(records))) or (text and text[-1] != "\n"):
        raise ValueError(f"{file} does not hold epochs 0, 1, ... in whole lines")
    return records


def start(directory: Path) -> int:
    """Fork a process that runs the command in `directory`/run, what it prints going to `directory`/console; its
    number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        console = os.open(directory / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(console, 1)
        os.dup2(console, 2)
        status = main.main([*RUN.split(), "--experiments_dir", str(directory), "--run_name", "run"])
    except KeyboardInterrupt:
        status = 130  # before main has begun to listen
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pid: int, seconds: float, until=lambda: False) -> int | None:
    """Wait for the process's end, for `until`, or for the time to be over; the exit status, or None while it runs.
    A process that a signal ended has 128 + its number, as in a shell."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        if until() or time.monotonic() > deadline:
            return None
        time.sleep(0.0005)


def run_and_kill(directory: Path, choose: random.Random | None, usual: float) -> tuple[int, bool]:
    """Run the command, with `choose` end it at a random moment of the `usual` seconds; (exit status, whether it was
    ended so). A process that hangs is ended and has status 1."""
    pid = start(directory)
    status, number = None, None
    try:
        if choose:
            status = wait(pid, choose.uniform(0, usual))
            if status is None and choose.random() < 0.5:
                new = directory / "run" / NEW
                status = wait(pid, usual, until=lambda: new.exists() or new.with_name(NEW + ".tmp").exists())
                if status is None:
                    status = wait(pid, choose.uniform(0, WRITING))
            if status is None:
                number = choose.choice(SIGNALS)
                os.kill(pid, number)
        if status is None:
            status = wait(pid, PATIENCE)
    finally:
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if status is None:
        return 1, False
    return status, number is not None and status == 128 + number


def main_loop(kills_wanted: int, minutes: float, seed: int, work: Path) -> bool:
    """Torture until enough has been killed; prints the counts and says whether nothing was lost or different."""
    row = DATASETS["synthetic"]
    DATASETS["synthetic"] = row._replace(read=functools.cache(row.read))
    DATASETS["synthetic"].read(Path(), 0)  # drawn once, here
    deadline = time.monotonic() + 60 * minutes
    choose = random.Random(seed)

    (work / "reference").mkdir()
    began = time.monotonic()
    status, _ = run_and_kill(work / "reference", None, 0)
    if status:
        sys.exit(f"the run fails when it is left alone:\n{(work / 'reference' / 'console').read_text()}")
    usual = time.monotonic() - began
    reference = content(work / "reference" / "run")

    kills = resumes = lost = different = num_runs = 0
    while kills < kills_wanted and time.monotonic() < deadline:
        num_runs += 1
        directory = work / str(num_runs)
        directory.mkdir()
        problem, num_kept, killed = "", 0, True
        while killed and not problem:
            may_kill = kills < kills_wanted and time.monotonic() < deadline
            status, killed = run_and_kill(directory, choose if may_kill else None, usual)
            kills += killed
            resumes += killed
            try:
                now = len(read_records(directory / "run")) if (directory / "run").exists() else 0
                if now < num_kept:
                    problem = f"{num_kept} epochs were kept, {now} are left"
                num_kept = now
            except ValueError as e:
                problem = str(e)
            if not killed and status:
                problem = f"the same command again ended with status {status}"
        if problem:
            lost += 1
        else:
            found = content(directory / "run")
            wrong = [key for key in {**reference, **found} if reference.get(key) != found.get(key)]
            if wrong:
                different += 1
                problem = f"differs from the reference in {len(wrong)} places: {', '.join(wrong[:5])}"
        if problem:
            print(f"{directory}: {problem}", flush=True)
        else:
            shutil.rmtree(directory)
    if kills < kills_wanted:
        print(f"time is over: {minutes:g} minutes were not enough for {kills_wanted} kills")
    print(f"{kills} kills, {resumes} resumes, {lost} lost, {different} different")
    return kills == kills_wanted and not lost and not different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="torture.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("kills", nargs="?", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="stop after this time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments (default: %(default)s)")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="torture_"))
    whole = main_loop(given.kills, given.minutes, given.seed, place)
    if whole:
        shutil.rmtree(place)
    else:
        print(f"the runs are left in {place}")
    sys.exit(not whole)
