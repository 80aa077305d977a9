#!/usr/bin/env python
"""The paper's tables from runs: mean ± sample standard deviation over n seeds.

Runs that differ in a flag that defines the experiment, in their images, or in their number of processes are never
averaged together. The paper's rows are for runs on its data, one table for each other data set; published numbers
appear only beside runs in the paper's setting. Runs that are unfinished, damaged or duplicates are named with the
reason.
"""

import argparse
import itertools
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
from intervals import pair_runs
from paper import BLOCK_FLAGS, PUBLISHED, ROOT, table_rows
from runs import CLASSIFIERS, COLUMNS, TIMES, Group, Run, Skipped, change_text, load
from tables import FORMATS, Table, difference_cells, mean_cells

from utils.errors import UserError, print_error, printable, run_command
from utils.files import write_output
from utils.parser import Parser, path_type
from utils.records import SHOWN

PAPER_DATA = PUBLISHED["table1"]["dataset"]
DEFAULT = [*SHOWN, "ece_after_T", "early_exit", *TIMES]
DEFAULT_OF_TABLE_2 = ["final", "exit 3", "exit 2", "exit 1", "ensemble", "early_exit"]
DEFAULT_OF_PAIRS = ["top1_error", "nll_after_T", "augrc"]


def labels(group: Group) -> dict[str, str]:
    """The first cells of a group's row."""
    seeds = " ".join(str(run.seed) for run in group.runs)
    network = printable(group.runs[0].network)
    return {"network": network, "methods": group.label, "n": str(len(group.runs)), "seeds": seeds}


def find_published(group: Group, row: dict) -> dict | None:
    """The paper's values of one of its rows, as {} where they are not comparable, because more than the precision
    differs (or DML is the published script's); None for another row's runs."""
    run = group.runs[0]
    wanted = {"classifier_type": row["model"], **{flag: row[flag] for flag in BLOCK_FLAGS}}
    if (run.data, run.methods) != (PAPER_DATA, tuple(row["methods"])) or not wanted.items() <= run.flags.items():
        return None
    others = {change.name for change in run.changes} - {*BLOCK_FLAGS, "precision", "sync_bn", "DML_as_published"}
    return {} if others else row


def mean_tables(groups: list[Group], numbers: str, metrics: list[str] | None) -> tuple[list[Table], list[str]]:
    """The paper's tables of these numbers and that of all other groups; and what the paper says of the published
    values that are shown."""
    tables, notes, used = [], [], []
    data = groups[0].data
    for number in numbers:
        columns = metrics or (DEFAULT_OF_TABLE_2 if number == "2" else DEFAULT)
        about = PUBLISHED[f"table{number}"]
        rows = []
        for paper_row in table_rows(int(number)):
            for group in groups:
                published = find_published(group, paper_row)
                if published is None:
                    continue
                cells = mean_cells(group.runs, columns, published=published)
                rows.append({"row": str(paper_row["row"]), **labels(group), **cells})
                used.append(group)
                if published:
                    notes += [PUBLISHED["about"], *about["notes"]]
        tables.append(Table(f"Table {number}: {about['title']}, {data}", rows))
    rows = [{**labels(group), **mean_cells(group.runs, metrics or DEFAULT)} for group in groups if group not in used]
    if len(numbers) > 1:
        tables.append(Table(f"Other runs: {data}", rows))
    return tables, notes


def classifier_tables(groups: list[Group], columns: list[str]) -> tuple[list[Table], list[str]]:
    """A row for each trained classifier of each group, with the metrics that every classifier has."""
    columns = [name for name in columns if COLUMNS[name].owner == "final"]
    rows = []
    for group in groups:
        for classifier in CLASSIFIERS:
            cells = mean_cells(group.runs, columns, classifier)
            if any(cells.values()):
                rows.append({"classifier": classifier, **labels(group), **cells})
    return [Table(f"Every classifier: {groups[0].data}", rows)], []


def paired_tables(base: str, groups: list[Group], columns: list[str], pooled: bool) -> tuple[list[Table], list[str]]:
    """A table of differences from `base` for each network, and notes on their intervals."""
    all_paired, left_out = pair_runs(base, groups)
    tables, notes = [], [f"not paired: {line}" for line in left_out]
    data = groups[0].data
    for network in dict.fromkeys(group.runs[0].network for group, _ in all_paired):
        paired = [pairs for pairs in all_paired if pairs.group.runs[0].network == network]
        rows = [labels(group) for group, _ in paired]
        rest_on = []
        for name in columns:
            cells, intervals = difference_cells(paired, COLUMNS[name], pooled)
            for row, cell in zip(rows, cells, strict=True):
                row[name] = cell
            if intervals.num_settings:
                settings = f"settings: {intervals.num_settings}"
                rest_on.append(f"{settings}, degrees of freedom: {intervals.degrees_of_freedom:.1f}")
        tables.append(Table(f"Differences from {base}, paired by seed: {data}", rows))
        if rest_on:
            variance = "of each setting's own seeds (degrees of freedom: n - 1)"
            if pooled:
                words = "; ".join(dict.fromkeys(rest_on))
                variance = f"pooled over the settings, which share the base's runs ({words})"
            notes.append(
                f"{network}, {data}: in brackets: 95 % interval of the mean difference (Student's t), with * where it"
                f" excludes 0; the variance of paired differences is {variance}"
            )
    return tables, notes


def export(file: Path, runs: list[Run], skipped: list[Skipped]) -> None:
    """One line of JSON per run, without flags that define no experiment.

    Raises:
        UserError: runs that cannot be read would be lost.
    """
    lost = [str(run) for run in skipped if run.path and run.path.resolve() == file.resolve()]
    if lost:
        raise UserError(f"--export would remove runs that cannot be read: {'; '.join(lost)}")
    lines = [json.dumps({"name": run.name, "config": run.config, "results": run.results}) + "\n" for run in runs]
    write_output(file, "".join(lines).encode())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    text = "directories of runs, or exported files (default: the repository's experiments)"
    add("runs", nargs="*", type=path_type, default=[ROOT / "experiments"], metavar="RUNS", help=text)
    add("--best", action="store_true", help="each run's best epoch instead of its last")
    add("--export", type=path_type, metavar="FILE.jsonl", help="write the runs to a file that this script reads")
    add("--format", choices=FORMATS, default="markdown", help="(default: %(default)s; csv has its notes on stderr)")
    text = f"columns: {', '.join(COLUMNS)}; `exit 1` and its kin are that classifier's top-1 error"
    add("--metrics", nargs="+", choices=COLUMNS, metavar="NAME", help=text)
    text = "with --pairs: each interval from its setting's own seeds, to see what hangs on pooling the variance"
    add("--unpooled", action="store_true", help=text)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--table", choices="1234", help="that table alone")
    add("--pairs", metavar="BASE", help="differences, by seed, from the methods BASE, for example baseline")
    add("--all_classifiers", action="store_true", help="all metrics of every classifier")
    args = parser.parse_args(argv)
    if args.unpooled and not args.pairs:
        parser.error("argument --unpooled: has no effect without --pairs")
    return args


def summarize(args: argparse.Namespace) -> None:
    which = "best" if args.best else "last"
    groups, skipped = load(args.runs, which)
    if not groups:
        raise UserError("; ".join([f"no finished run in {' '.join(map(str, args.runs))}", *map(str, skipped)]))
    runs = [run for group in groups for run in group.runs]
    starts = [start for run in runs for start in run.starts]
    machines = sorted({f"{start.device_name}, torch {start.torch}, commit {start.git_commit}" for start in starts})
    notes = [f"runs: {len(runs)}, {which} epoch, made on {'; '.join(machines)}"]
    notes += [f"left out: {run}" for run in skipped]
    tables = []
    for data, on_data in itertools.groupby(groups, lambda group: group.data):
        on_data = list(on_data)
        if common := sorted(map(change_text, on_data[0].common)):
            notes.append(f"{data}: all runs, unlike the paper: {', '.join(common)}")
        if args.pairs:
            found = paired_tables(args.pairs, on_data, args.metrics or DEFAULT_OF_PAIRS, pooled=not args.unpooled)
        elif args.all_classifiers:
            found = classifier_tables(on_data, args.metrics or DEFAULT)
        else:
            found = mean_tables(on_data, args.table or "1234", args.metrics)
        tables += [table for table in found[0] if table.rows]
        notes += found[1]
    if args.pairs and not tables:
        known = dict.fromkeys(group.label for group in groups)
        if args.pairs in known:
            raise UserError(f"--pairs {args.pairs}: no run of another setting has its network, images and seed")
        raise UserError(f"--pairs {args.pairs}: give one of {'; '.join(known)}")
    if not tables:
        raise UserError(f"no run is a row of Table {args.table}" if args.table else "no classifier has these metrics")
    if args.export:
        export(args.export, runs, skipped)
    FORMATS[args.format](tables, [printable(note) for note in dict.fromkeys(notes)])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        summarize(args)
    except (OSError, UserError) as e:
        print_error(str(e))
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    run_command(main)
