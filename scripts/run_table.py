"""Train the runs of one table of the paper. scripts/table1.sh to table4.sh call this with their table's number.

usage: scripts/table1.sh [ROW...] [--dry-run] [-- FLAG...]

  ROW        a row number (8), a range (1-8) or a network (resnet18); several are allowed (default: all rows)
  --dry-run  print the commands, to be run in the repository's root, and train nothing
  FLAG...    flags of main.py for every run, e.g. -- --precision bf16. They become part of the run's name,
             except those that do not change the experiment (--workers, --device, --compile, ...).
environment variables
  SEEDS="1 2 3"    seeds of every row (default: 4)
  JOBS=n           concurrent runs (default: 1). With several, the longest rows start first, the CPU threads are
                   divided among them unless OMP_NUM_THREADS is set, and of several GPUs each run gets one.
  EPOCHS=n         train n epochs instead of 300; the learning rate drops at n/2 and 3n/4
  EXPERIMENTS=dir  where the run directories go (default: experiments, in the repository's root)
  PYTHON=path      the Python interpreter (default: python3)

All flags are checked before the first run starts. A failed run does not stop the others. Finished runs are skipped
and unfinished ones resumed: after an interruption or a failure, rerun the same command.
Exit status: 0 all finished, 1 some failed, 2 bad usage, 128 + n after signal n (130: Ctrl-C).
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
BLOCK_FLAGS = {"BYOT_from_k_block": 1, "num_resnet_blocks": 4}  # with main.py's defaults
SHORT_NAMES = {"BYOT_from_k_block": "k", "num_resnet_blocks": "blocks", "end_epoch": "ep"}


def table_rows(table: int) -> list[dict]:
    """The paper's rows: `row` (from 1), `model`, `methods`, the two block flags, and the published values."""
    defaults = {"model": "resnet18", "methods": ["PSKD", "BYOT", "DML"], **BLOCK_FLAGS}
    return [{**defaults, **row, "row": i} for i, row in enumerate(PUBLISHED[f"table{table}"]["rows"], 1)]


def select(rows: list[dict], words: list[str], error: Callable[[str], None]) -> list[dict]:
    """The rows that the words name, in the table's order, each once; all rows without words."""
    selected = [] if words else rows
    for word in words:
        first, last = re.fullmatch(r"(\d+)-?(\d*)|.*", word).groups()
        numbers = range(int(first), int(last or first) + 1) if first else ()
        named = [row for row in rows if row["model"] == word or row["row"] in numbers]
        if not named:
            error(f"{word}: not a row (1 to {len(rows)}), a range such as 1-2, or a network of this table")
        selected = selected + named
    return [row for row in rows if row in selected]


def plan(rows: list[dict], extra: list[str]) -> tuple[dict[str, list[str]], argparse.Namespace, int, int]:
    """Check all flags. Called in a process of its own, because main.py's checks may initialise CUDA.

    Returns:
        run name -> command, the first seed's runs first; flags of the last run; numbers of GPUs and CPU threads.
    """
    python = os.environ.get("PYTHON") or sys.executable
    python = os.path.abspath(python) if os.sep in python else python
    os.chdir(ROOT)  # the runs start there, so relative paths are checked from there
    sys.path.insert(0, str(ROOT))
    import torch

    from main import default_run_name, parse_args
    from utils.flags import RUNTIME_FLAGS

    if os.environ.get("EXPERIMENTS"):
        extra = ["--experiments_dir", os.environ["EXPERIMENTS"], *extra]
    schedule, epochs = [], parse_args(["--end_epoch", os.environ.get("EPOCHS") or "300"]).end_epoch
    if epochs != 300:
        drops = sorted({-(-epochs // 2), -(-3 * epochs // 4)})  # rounded up; the two may coincide
        schedule, extra = ["--lr_decay_schedule", *map(str, drops)], ["--end_epoch", str(epochs), *extra]
    unnamed = RUNTIME_FLAGS | {"data_type"}  # default_run_name has the data set
    runs = {}
    for seed in (os.environ.get("SEEDS") or "4").split():
        for row in rows:
            options = [f"--{flag}={row[flag]}" for flag in BLOCK_FLAGS if row[flag] != BLOCK_FLAGS[flag]] + extra
            flags = ["--classifier_type", row["model"], *(f"--{method}" for method in row["methods"])]
            flags += ["--seed", seed, *schedule, *options]
            args = parse_args(flags)
            suffix = ""
            for words in " ".join(["", *options]).split(" --")[1:]:
                flag, *values = re.split("[ =]", words)
                suffix += "" if flag in unnamed else f"_{SHORT_NAMES.get(flag, flag)}{'-'.join(values)}"
            name = default_run_name(args).replace("_seed", f"{suffix}_seed")
            runs[name] = [python, "main.py", *flags, "--run_name", name]
    return runs, args, torch.cuda.device_count(), torch.get_num_threads()


def job_environment(job: int, jobs: int, gpus: int, threads: int) -> dict[str, str]:
    """The environment of one of the concurrent runs: its number of CPU threads and, of several GPUs, one."""
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, threads // jobs)))
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[job % gpus]
    return environment


def write_line(line: str) -> None:
    """One write per line, so that concurrent runs' lines do not mix; a closed pager stops no run."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{line}\n".encode())


def is_finished(directory: Path) -> bool:
    path = directory / "results.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


async def run_all(runs: dict[str, list[str]], experiments: Path, environments: list[dict], overwrite: bool) -> int:
    """Run the commands, one at a time per environment; the exit status. Signals are passed on to the runs."""
    pending, processes, failed, received = iter(runs), [], {}, []
    options = {"cwd": ROOT, "start_new_session": True}  # a run receives Ctrl-C once, from stop()
    if sys.platform == "linux":  # the runs receive SIGTERM when this process dies, even by kill -9
        options["preexec_fn"] = lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if len(environments) > 1:
        options |= {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}

    def stop(number: int) -> None:
        received.append(number)
        for process in processes:
            if process.returncode is None:
                process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    async def work(environment: dict[str, str]) -> None:
        for name in pending:
            if received:
                return
            if is_finished(experiments / name) and not overwrite:
                write_line(f"skip {name}: finished")
                continue
            write_line(f"start {name}")
            process = await asyncio.create_subprocess_exec(*runs[name], env=environment, **options)
            processes.append(process)
            while process.stdout and (line := await process.stdout.readline()):
                write_line(f"{name}: {line.decode(errors='replace').rstrip()}")
            status = await process.wait()
            if status == 0 and is_finished(experiments / name):
                write_line(f"finished {name}")
            elif not received:
                failed[name] = f"exit status {status}, see {experiments / name}"
                write_line(f"FAILED {name}: exit status {status}")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup SIGHUP stays ignored
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
    await asyncio.gather(*map(work, environments))
    if failed:
        write_line("\n  ".join([f"failed: {len(failed)} of {len(runs)} runs", *map(": ".join, failed.items())]))
    if received:
        write_line("interrupted: rerun the same command to resume" + ", without --overwrite" * overwrite)
        return 128 + received[-1]
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="run_table.py", usage=argparse.SUPPRESS)
    parser.format_help = lambda: __doc__
    parser.add_argument("table", type=int, choices=(1, 2, 3, 4))
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.environ.get("JOBS") or "1")
    args, extra = parser.parse_intermixed_args(argv[:cut]), argv[cut + 1 :]
    if args.jobs < 1:
        parser.error(f"JOBS={args.jobs}: must be positive")
    rows = select(table_rows(args.table), args.rows, parser.error)
    if args.jobs > 1:
        seconds = {(row["model"], *row["methods"]): row["seconds_per_epoch"] for row in table_rows(1)}
        rows.sort(key=lambda row: -seconds[(row["model"], *row["methods"])])
    with ProcessPoolExecutor(1) as pool:
        runs, flags, gpus, threads = pool.submit(plan, rows, extra).result()
    if args.dry_run:
        print(*map(shlex.join, runs.values()), sep="\n")
        return 0
    gpus = gpus if flags.device == "cuda" else 0  # with --device cuda:1, all runs use that GPU
    environments = [job_environment(job, args.jobs, gpus, threads) for job in range(args.jobs)]
    return asyncio.run(run_all(runs, ROOT / flags.experiments_dir, environments, flags.overwrite))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while flags are checked: no traceback
    sys.exit(main(sys.argv[1:]))
