"""Train the runs of one table of the paper. scripts/table1.sh to table4.sh call this with their table's number.

  ROW          a row number (8), a range (1-8) or a network (resnet18); several are allowed (default: all rows)
  --dry-run    print the commands, to be run in the repository's root, and train nothing
  FLAG         flags of main.py for every run, e.g. -- --precision bf16. They become part of the run's name,
               except --weights and those that do not change the experiment (--workers, --device, --compile, ...).
environment variables
  SEEDS        seeds of every row, e.g. "1 2 3" (default: 4)
  JOBS         concurrent runs (default: 1). With several, of several GPUs each run gets one, and OMP_NUM_THREADS is
               1 unless it is set.
  EPOCHS       epochs to train instead of 300; the learning rate drops at 1/2 and 3/4 of them
  EXPERIMENTS  where the run directories go (default: experiments, in the repository's root)
  PYTHON       the Python interpreter (default: python3)

All flags are checked before the first run starts. A failed run does not stop the others. After an interruption or a
failure, rerun the same command: main.py resumes unfinished runs and ends at once where a run is finished.
Exit status: 0 all finished, 1 some failed, 2 bad usage, 128 + n after signal n (130: Ctrl-C).
"""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
from paper import BLOCK_FLAGS, ROOT, SETTINGS, table_rows

sys.path.insert(0, str(ROOT))

from utils.errors import run_command, tell
from utils.launch import is_number
from utils.parser import Parser
from utils.records import Change, find_changes

NAMED_FLAGS = {"data_type", "classifier_type", "PSKD", "BYOT", "DML", "seed"}  # in main.py's own name of a run
SHORT_NAMES = {"BYOT_from_k_block": "k", "num_resnet_blocks": "blocks", "end_epoch": "ep"}
RUNNER = ROOT / "scripts" / "run_commands.py"


def find_rows(table: str) -> list[tuple[str, list[str]]]:
    """Of each row, its network, or in the study its setting; and its flags."""
    if table == "study":
        rows = SETTINGS.items()
    else:
        rows = []
        for row in table_rows(int(table)):
            blocks = {flag: row[flag] for flag, default in BLOCK_FLAGS.items() if row[flag] != default}
            flags = {"classifier_type": row["model"], **dict.fromkeys(row["methods"], True), **blocks}
            rows.append((row["model"], flags))
    found = []
    for key, flags in rows:
        found.append((key, [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]))
    return found


def select(rows: list[tuple], word: str) -> list[tuple]:
    """The rows that a number, a range or a network stands for."""
    first, _, last = word.partition("-")
    if is_number(first) and is_number(last or first):
        return rows[max(int(first) - 1, 0) : int(last or first)]
    return [row for row in rows if row[0] == word]


def name_suffix(changes: list[Change]) -> str:
    """What a run's name says of the flags that are not the default, beside what main.py's own name says."""
    suffix = ""
    for name, _, value, _ in changes:
        if isinstance(value, list):
            value = "-".join(map(str, value))
        suffix += f"_{SHORT_NAMES.get(name, name)}{'' if value is True else value}"
    return suffix


def plan(table: str, rows: list[tuple[str, list[str]]], extra: list[str]) -> tuple[dict[str, list[str]], int]:
    """Run name -> flags, all of one seed before the next, checked; and the number of GPUs to divide among the runs."""
    import torch

    from main import RUNTIME_FLAGS, build_parser, default_args, default_run_name, parse_args

    common = ["--end_epoch", os.environ["EPOCHS"]] if os.environ.get("EPOCHS") else []
    common += ["--experiments_dir", os.environ["EXPERIMENTS"]] if os.environ.get("EXPERIMENTS") else []
    runs = {}
    for seed in os.environ.get("SEEDS", "").split() or ["4"]:
        for key, row_flags in rows:
            flags = [*row_flags, "--seed", seed, *common, *extra]
            # Not the checked flags, in which `auto` stands for what this machine can do.
            main_parser = build_parser()
            given = main_parser.parse_args(flags)
            if given.run_name:
                main_parser.error("argument --run_name: a table names its runs; EXPERIMENTS says where they go")
            changes = find_changes(vars(default_args()), vars(given), {})
            suffix = name_suffix([c for c in changes if c.name not in NAMED_FLAGS | RUNTIME_FLAGS])
            name = f"{key}_seed{given.seed}"
            if table != "study":
                name = default_run_name(given).replace("_seed", f"{suffix}_seed")
            runs[name] = [*flags, "--run_name", name]
            device = parse_args(runs[name]).device
    return runs, torch.cuda.device_count() if device == "cuda" else 0  # with --device cuda:1, all runs use that GPU


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "scripts/table1.sh [ROW...] [--dry-run] [-- FLAG...]"
    parser.add_argument("table", choices=("1", "2", "3", "4", "study"), help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv[:cut])
    jobs = os.environ.get("JOBS") or "1"
    if not is_number(jobs) or int(jobs) == 0:
        parser.error(f"JOBS={jobs}: must be a positive whole number")

    rows, selected = find_rows(args.table), []
    for word in args.words:
        if not (found := select(rows, word)):
            parser.error(f"{word}: not a row (1 to {len(rows)}), a range such as 1-2, or a network of this table")
        selected += found
    os.chdir(ROOT)  # the runs start there, so relative paths are checked from there
    try:
        runs, gpus = plan(args.table, selected or rows, argv[cut + 1 :])
    except ImportError as e:
        parser.error(f"{e}: activate the virtual environment, or set PYTHON to its interpreter")
    commands = [shlex.join([sys.executable, "main.py", *flags]) for flags in runs.values()]
    if not args.dry_run:  # in place of this process, which holds PyTorch and perhaps a GPU
        os.execv(sys.executable, [sys.executable, str(RUNNER), jobs, str(gpus), *commands])
    for command in commands:
        tell(command)
    return 0


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while flags are checked: no traceback
    run_command(main)
