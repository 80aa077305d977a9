"""Train the runs behind one table of the paper: what table1.sh to table4.sh call.

usage: scripts/tableT.sh [ROW...] [--dry-run] [-- FLAG...]

  ROW        8, 1-8 or a network's name such as resnet18; several at once; none means all.
             Rows are numbered as the paper prints them, from 1.
  --dry-run  print the commands, to be pasted in the repository's root, and run nothing.
  FLAG...    flags for every main.py, e.g. -- --precision bf16. They make another experiment and so go
             into the run's name, save those that change no result (--workers, --device, --compile, ...).

environment
  SEEDS="1 2 3"    seeds of every row (4, which is main.py's own)
  JOBS=n           runs at a time (1); with more, each line of output begins with the run's name, and the
                   seconds per epoch are those of a shared machine
  EPOCHS=n         train n epochs in place of 300, the learning rate dropping at n/2 and 3n/4
  EXPERIMENTS=dir  where the runs go (experiments)
  PYTHON=path      the interpreter (python)

Relative paths in EXPERIMENTS and FLAG are taken from the repository's root, where the runs start.
Finished runs are skipped and unfinished ones go on where they stopped, so after an interruption, or once
the cause of a failure is mended, give the same command again. A failed run does not stop the others.
Tables 2 to 4 share runs with Table 1 and do not train them twice.
Exit status: 0 all finished, 1 some failed, 2 bad usage, 128 + n after signal n (130: Ctrl-C).
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
METHODS = ("PSKD", "BYOT", "DML")

SET_BY_ROW = {
    "classifier_type", *METHODS, "BYOT_from_k_block", "num_resnet_blocks", "run_name", "resume", "val_only",
}  # fmt: skip
SET_BY_VARIABLE = {"seed": "SEEDS", "end_epoch": "EPOCHS", "experiments_dir": "EXPERIMENTS"}
NOT_IN_NAME = {
    "workers", "device", "data_path", "compile",
    "save_predictions", "saveckp_freq", "overwrite",
}  # fmt: skip


class UsageError(Exception):
    """A bad argument or environment variable; its one line is all that the user sees."""


def table_rows(table: int) -> list[dict]:
    """Rows of one table: `row` (from 1), `model`, `methods`, the two block flags, and what the paper prints.

    Tables 3 and 4 vary one flag of ResNet-18 with all three methods; k is 1 unless the row says otherwise.
    """
    same = {"model": "resnet18", "methods": METHODS, "BYOT_from_k_block": 1, "num_resnet_blocks": 4}
    return [{"row": i, **same, **row} for i, row in enumerate(PUBLISHED[f"table{table}"]["rows"], 1)]


def select(table: int, words: list[str]) -> list[dict]:
    """The rows that the words name, in the table's order, each once."""
    rows = table_rows(table)
    wanted = set()
    for word in words:
        if bounds := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
            first, last = int(bounds[1]), int(bounds[2] or bounds[1])
            if not 1 <= first <= last <= len(rows):
                raise UsageError(f"{word}: Table {table} has rows 1 to {len(rows)}")
            wanted.update(range(first, last + 1))
        elif named := {row["row"] for row in rows if row["model"] == word}:
            wanted |= named
        else:
            models = ", ".join(dict.fromkeys(row["model"] for row in rows))
            raise UsageError(f"{word}: not a row (1 to {len(rows)}), a range such as 1-2, or one of {models}")
    return [row for row in rows if not words or row["row"] in wanted]


def name_parts(extra: list[str]) -> tuple[str, str]:
    """What the extra flags say in a run's name: the data set, and a suffix such as `_width8_sync_bn`."""
    flags = []
    for token in extra:
        if token.startswith("--"):
            flag, equals, value = token[2:].partition("=")
            flags.append([flag, value] if equals else [flag])
        elif flags:
            flags[-1].append(token)
        else:
            raise UsageError(f"{token}: flags for main.py start with --")
    data, suffix = "cifar100", ""
    for flag, *values in flags:
        if flag in ("dry-run", "help"):
            raise UsageError(f"--{flag} must stand before the --")
        if flag in SET_BY_ROW:
            raise UsageError(f"--{flag} is what the rows set; for other runs call main.py itself")
        if flag in SET_BY_VARIABLE:
            raise UsageError(f"set {SET_BY_VARIABLE[flag]} in place of --{flag}")
        if flag == "data_type":
            data = "-".join(values)
        elif flag not in NOT_IN_NAME:
            suffix += re.sub(r"[^\w.+-]+", "-", f"_{flag}{'-'.join(values)}")
    return data, suffix


def positive(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{variable}={text}: not a positive whole number")
    return int(text)


def commands(rows: list[dict], extra: list[str]) -> dict[str, list[str]]:
    """Run name -> command, all rows of the first seed first, so that one whole table is there early."""
    seeds = (os.environ.get("SEEDS") or "4").split()
    if bad := [seed for seed in seeds if not seed.isdecimal()]:
        raise UsageError(f"SEEDS: {bad[0]} is not a whole number")
    seeds = map(str, map(int, seeds))  # as main.py reads and names them, 04 being 4
    epochs = positive("EPOCHS", 300)
    data, suffix = name_parts(extra)
    python = os.environ.get("PYTHON") or "python"
    found = {}
    for seed in seeds:
        for row in rows:
            k, blocks = row["BYOT_from_k_block"], row["num_resnet_blocks"]
            command = [os.path.abspath(python) if os.sep in python else python, "main.py"]
            command += ["--classifier_type", row["model"], *(f"--{method}" for method in row["methods"])]
            name = "_".join([data, row["model"], *(row["methods"] or ["baseline"])])
            if k != 1:
                command += ["--BYOT_from_k_block", str(k)]
                name += f"_k{k}"
            if blocks != 4:
                command += ["--num_resnet_blocks", str(blocks)]
                name += f"_blocks{blocks}"
            command += ["--seed", seed]
            if epochs != 300:  # a drop that falls within an epoch waits for the next; the two may coincide
                drops = sorted({-(-epochs // 2), -(-3 * epochs // 4)})
                command += ["--end_epoch", str(epochs), "--lr_decay_schedule", *map(str, drops)]
                name += f"_ep{epochs}"
            if os.environ.get("EXPERIMENTS"):
                command += ["--experiments_dir", os.environ["EXPERIMENTS"]]
            name += f"{suffix}_seed{seed}"
            found[name] = [*command, *extra, "--run_name", name]
    return found


def say(line: str) -> None:
    """One line in one write, so that the lines of several runs do not tear; a closed pager stops no run."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{line}\n".encode())


class Sweep:
    """Runs commands, `jobs` at a time; a signal is passed on to the running ones and no other starts."""

    def __init__(self, runs: dict[str, list[str]], jobs: int, again: bool):
        self.runs, self.jobs, self.again = runs, jobs, again
        self.experiments = ROOT / (os.environ.get("EXPERIMENTS") or "experiments")
        self.running, self.failed, self.signal, self.lock = {}, {}, None, threading.RLock()

    def top1(self, name: str) -> str | None:
        """The last epoch's top-1 error if the run is finished, else None."""
        try:
            results = json.loads((self.experiments / name / "results.json").read_text())
            return f"{results['last']['val']['top1_error']:.2f}" if results["status"] == "finished" else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def stop(self, number: int, frame) -> None:
        self.signal = number
        with self.lock:  # no run starts unseen between the mark and the signal
            for process in self.running.values():
                process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        say(f"stopping: waiting for {len(self.running)} run(s) to save")

    def run(self, name: str) -> None:
        if not self.again and (top1 := self.top1(name)):
            return say(f"skip {name}: finished, top-1 error {top1}")
        # A session of its own: Ctrl-C then reaches the run once, from stop(), and not from the terminal too.
        options = {"cwd": ROOT, "start_new_session": True, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}}
        if self.jobs > 1:
            options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        try:
            with self.lock:
                if self.signal:
                    return
                say(f"start {name}")
                process = self.running[name] = subprocess.Popen(self.runs[name], **options)
        except OSError as error:
            self.failed[name] = str(error)
            return say(f"FAILED {name}: {error}")
        for line in process.stdout or ():
            say(f"{name}: {line.rstrip()}")
        status = process.wait()
        with self.lock:
            del self.running[name]
        if status == 0 and (top1 := self.top1(name)):
            say(f"finished {name}: top-1 error {top1}")
        elif not self.signal:
            log = self.experiments / name / "experiment.log"
            why = f"exit status {status}" + ("" if status else ", but results.json does not say finished")
            self.failed[name] = f"{why}, " + (f"log {log}" if log.exists() else "no log")
            say(f"FAILED {name}: {why}")

    def __call__(self) -> int:
        """Run everything; the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a hang-up stays ignored
                signal.signal(number, self.stop)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.run, self.runs))
        if self.failed:
            say(f"failed: {len(self.failed)} of {len(self.runs)} runs")
            for name, why in self.failed.items():
                say(f"  {name}: {why}")
        if self.signal:
            without = " without --overwrite" if self.again else ""
            say(f"interrupted: the same command{without} goes on from here")
            return 128 + self.signal
        return 1 if self.failed else 0


def main(argv: list[str]) -> int:
    table, *words = argv
    cut = words.index("--") if "--" in words else len(words)
    words, extra = words[:cut], words[cut + 1 :]
    if {"-h", "--help"} & set(words):
        print(__doc__.partition("\n\n")[2].replace("tableT", f"table{table}"), end="")
        return 0
    try:
        if unknown := [word for word in words if word.startswith("-") and word != "--dry-run"]:
            raise UsageError(f"{unknown[0]}: unknown; flags for main.py go after --, see --help")
        rows = select(int(table), [word for word in words if word != "--dry-run"])
        runs, jobs = commands(rows, extra), positive("JOBS", 1)
    except UsageError as error:
        print(f"table{table}.sh: error: {error}", file=sys.stderr)
        return 2
    if "--dry-run" in words:
        for command in runs.values():
            say(shlex.join(command))
        return 0
    return Sweep(runs, jobs, again="--overwrite" in extra)()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
