"""Train the runs of one table of the paper. scripts/table1.sh to table4.sh call this with their table's number.

  ROW          a row number (8), a range (1-8) or a network (resnet18); several are allowed (default: all rows)
  --dry-run    print the commands, to be run in the repository's root, and train nothing
  FLAG         flags of main.py for every run, e.g. -- --precision bf16. They become part of the run's name,
               except those that do not change the experiment (--workers, --device, --compile, ...).
environment variables
  SEEDS        seeds of every row, e.g. "1 2 3" (default: 4)
  JOBS         concurrent runs (default: 1). With several, the longest rows start first, the CPU threads are divided
               among them unless OMP_NUM_THREADS is set, and of several GPUs each run gets one.
  EPOCHS       epochs to train instead of 300; the learning rate drops at 1/2 and 3/4 of them
  EXPERIMENTS  where the run directories go (default: experiments, in the repository's root)
  PYTHON       the Python interpreter (default: python3)

All flags are checked before the first run starts. A failed run does not stop the others. Finished runs are skipped
and unfinished ones resumed: after an interruption or a failure, rerun the same command.
Exit status: 0 all finished, 1 some failed, 2 bad usage, 128 + n after signal n (130: Ctrl-C).
"""

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from paper import BLOCK_FLAGS, ROOT, table_rows

from utils.parser import Parser

NAMED_FLAGS = {"data_type", "classifier_type", "PSKD", "BYOT", "DML", "seed"}  # in main.py's own name of a run
SHORT_NAMES = {"BYOT_from_k_block": "k", "num_resnet_blocks": "blocks", "end_epoch": "ep"}
OUTPUT_LOCK = threading.Lock()


def is_named(row: dict, word: str) -> bool:
    """Whether the word is the row's number, a range that has it, or the row's network."""
    first, _, last = word.partition("-")
    if first.isdecimal() and (last or first).isdecimal():
        return int(first) <= row["row"] <= int(last or first)
    return word == row["model"]


class Run(NamedTuple):
    command: list[str]
    config: dict  # what config.json holds of it when it is done: data_path, and the flags that define the experiment


def plan(rows: list[dict], extra: list[str]) -> tuple[dict[str, Run], argparse.Namespace, int, int]:
    """Check all flags. Called in a process of its own, because main.py's checks may initialise CUDA.

    Returns:
        run name -> run, the first seed's runs first; flags of the last run; numbers of GPUs and CPU threads.
    """
    python = os.environ.get("PYTHON") or sys.executable
    if os.sep in python:
        python = os.path.abspath(python)
    os.chdir(ROOT)  # the runs start there, so relative paths are checked from there
    import torch

    from main import RUNTIME_FLAGS, build_parser, default_args, default_run_name, parse_args

    schedule, common = [], []
    epochs = parse_args(["--end_epoch", os.environ.get("EPOCHS") or "300"]).end_epoch
    if epochs != 300:
        schedule = ["--lr_decay_schedule", *map(str, paper_schedule(epochs))]
        common = ["--end_epoch", str(epochs)]
    if os.environ.get("EXPERIMENTS"):
        common += ["--experiments_dir", os.environ["EXPERIMENTS"]]

    defaults = vars(default_args())
    runs = {}
    for seed in (os.environ.get("SEEDS") or "4").split():
        for row in rows:
            methods = [f"--{method}" for method in row["methods"]]
            blocks = [f"--{flag}={row[flag]}" for flag in BLOCK_FLAGS if row[flag] != BLOCK_FLAGS[flag]]
            flags = ["--classifier_type", row["model"], *methods, "--seed", seed, *schedule, *blocks, *common, *extra]
            args = parse_args(flags)
            # Not the checked flags, in which `auto` stands for what this machine can do.
            given = vars(build_parser().parse_args(flags))
            suffix = name_suffix({flag: given[flag] for flag in given if flag not in RUNTIME_FLAGS}, defaults)
            name = default_run_name(args).replace("_seed", f"{suffix}_seed")
            config = {flag: value for flag, value in vars(args).items() if flag not in RUNTIME_FLAGS}
            config["data_path"] = args.data_path
            runs[name] = Run([python, "main.py", *flags, "--run_name", name], config)
    return runs, args, torch.cuda.device_count(), torch.get_num_threads()


def paper_schedule(epochs: int) -> list[int]:
    """1/2 and 3/4 of the epochs, rounded up; the two may coincide."""
    return sorted({-(-epochs // 2), -(-3 * epochs // 4)})


def name_suffix(flags: dict, defaults: dict) -> str:
    """What a run's name says of flags that main.py's default name does not have: those that are not the default, where
    the learning rate's schedule is the paper's in proportion."""
    defaults = defaults | {"lr_decay_schedule": paper_schedule(flags["end_epoch"])}
    suffix = ""
    for flag in sorted(flags.keys() - NAMED_FLAGS):
        value = flags[flag]
        if value == defaults[flag]:
            continue
        if isinstance(value, list):
            value = "-".join(map(str, value))
        suffix += f"_{SHORT_NAMES.get(flag, flag)}{'' if value is True else value}"
    return suffix


def is_finished(directory: Path, config: dict) -> bool:
    """Whether the run in a directory is done and has this config. In doubt main.py, which decides, is started."""
    try:
        status = json.loads((directory / "results.json").read_text())["status"]
        found = json.loads((directory / "config.json").read_text())
        return status == "finished" and config.items() <= found.items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def time_written(directory: Path) -> int | None:
    """When results.json was written."""
    try:
        return (directory / "results.json").stat().st_mtime_ns
    except OSError:
        return None


def write_line(line: str) -> None:
    """Print a line whole, though several threads do; a closed pager or terminal stops no run."""
    with contextlib.suppress(OSError), OUTPUT_LOCK:
        os.write(1, f"{line}\n".encode())


def run_all(runs: dict[str, Run], experiments: Path, overwrite: bool, jobs: int, gpus: int) -> int:
    """Run what is not finished, `jobs` at a time, each on one of several GPUs; the exit status."""
    names = iter(runs)
    processes, failed, received = [], [], []
    options = {"cwd": ROOT, "start_new_session": True}  # a run gets Ctrl-C once, from stop()
    if sys.platform == "linux":  # the runs get SIGTERM when this process dies, even by kill -9
        prctl = ctypes.CDLL(None).prctl
        options["preexec_fn"] = lambda: prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if jobs > 1:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}

    def stop(number: int, _) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    def work(job: int) -> None:
        device = [f"--device=cuda:{job % gpus}"] if gpus > 1 else []
        for name in names:  # shared: each job takes the next
            if received:
                return
            directory, run = experiments / name, runs[name]
            if not overwrite and is_finished(directory, run.config):
                write_line(f"skip {name}: finished")
                continue
            write_line(f"start {name}")
            before = time_written(directory)
            process = subprocess.Popen([*run.command, *device], **options)
            processes.append(process)
            if received:  # before stop() knew of this process
                process.terminate()
            for line in process.stdout or ():
                write_line(f"{name}: {line.rstrip()}")
            status = process.wait()
            # A run whose terminal or pager was closed may end well with another status than 0.
            has_finished = is_finished(directory, run.config) and time_written(directory) != before
            if status != 0 and not has_finished and not received:
                failed.append(f"{name}: exit status {status}, see {directory}")
                write_line(f"FAILED {failed[-1]}")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup SIGHUP stays ignored
            signal.signal(number, stop)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(jobs)))
    if failed:
        write_line("\n  ".join([f"failed: {len(failed)} of {len(runs)} runs", *failed]))
    if received:
        write_line("interrupted: rerun the same command (without --overwrite) to resume")
        return 128 + received[-1]
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "scripts/table1.sh [ROW...] [--dry-run] [-- FLAG...]"
    parser.add_argument("table", type=int, choices=(1, 2, 3, 4), help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv[:cut])
    extra = argv[cut + 1 :]
    jobs = os.environ.get("JOBS") or "1"
    if not jobs.isdecimal() or int(jobs) == 0:
        parser.error(f"JOBS={jobs}: must be a positive whole number")
    jobs = int(jobs)

    rows = table_rows(args.table)
    for word in args.words:
        if not any(is_named(row, word) for row in rows):
            parser.error(f"{word}: not a row (1 to {len(rows)}), a range such as 1-2, or a network of this table")
    rows = [row for row in rows if not args.words or any(is_named(row, word) for word in args.words)]
    if jobs > 1:
        seconds = {(row["model"], *row["methods"]): row["seconds_per_epoch"] for row in table_rows(1)}
        rows.sort(key=lambda row: -seconds[(row["model"], *row["methods"])])

    try:
        with ProcessPoolExecutor(1) as pool:
            runs, flags, gpus, threads = pool.submit(plan, rows, extra).result()
    except ImportError as e:
        parser.error(f"{e}: activate the virtual environment, or set PYTHON to its interpreter")
    if args.dry_run:
        for run in runs.values():
            write_line(shlex.join(run.command))
        return 0
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, threads // jobs))
    gpus = gpus if flags.device == "cuda" else 0  # with --device cuda:1, all runs use that GPU
    experiments = ROOT / flags.experiments_dir
    return run_all(runs, experiments, flags.overwrite, jobs, gpus)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while flags are checked: no traceback
    if sys.stdout is None:  # closed: no file that is opened later, by this process or by a run, may take its place
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.set_inheritable(1, True)
    sys.exit(main(sys.argv[1:]))
