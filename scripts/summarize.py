#!/usr/bin/env python
"""The paper's tables from runs: mean ± sample standard deviation over n seeds.

Runs that differ in a flag that defines the experiment, in their images, or in their number of processes are never
averaged together. The paper's rows are for runs on its data, one table for each other data set; published numbers
appear only beside runs in the paper's setting. Runs that are unfinished, damaged or duplicates are named with the
reason.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
from intervals import pair_runs
from paper import BLOCK_FLAGS, PUBLISHED, ROOT, table_rows
from runs import COLUMNS, LIMITS, TIMES, Column, Run, find_runs, group_runs
from tables import FORMATS, Line, Table, make_paired_table, make_table

from main import RUNTIME_FLAGS
from utils.errors import UserError, print_error, printable, run_command
from utils.files import write_output
from utils.metrics import SHOWN
from utils.parser import Parser, path_type

PAPER_DATA = PUBLISHED["table1"]["dataset"]
DEFAULT = (*SHOWN, "ece_after_T", "early_exit", *TIMES)
DEFAULT_OF_PAIRS = ("top1_error", "nll_after_T", "augrc")
# Table 2's headings; its values are accuracies.
TABLE_2 = {"4/4": "final", "3/4": "exit 3", "2/4": "exit 2", "1/4": "exit 1", "ensemble": "ensemble"}


def paper_lines(table: str, groups: list[list[Run]]) -> list[Line]:
    """The groups that are rows of the table, in the paper's order.

    Published values are left out unless only the precision differs, or DML is the published script's.
    """
    lines = []
    for row in table_rows(int(table)):
        wanted = {"classifier_type": row["model"], **{flag: row[flag] for flag in BLOCK_FLAGS}}
        for group in groups:
            run = group[0]
            if run.methods == tuple(row["methods"]) and wanted.items() <= run.flags.items():
                changed = {flag.split()[0] for flag in run.non_paper_flags}
                others = changed - {*BLOCK_FLAGS, "precision", "sync_bn", "DML_as_published"}
                lines.append(Line(group, str(row["row"]), {} if others else row))
    return lines


def paper_tables(groups: list[list[Run]], numbers: str, columns: dict[str, Column]) -> tuple[list[Table], list[str]]:
    """The paper's tables of groups on its data, and what the paper says of those that have published values."""
    tables, notes = [], []
    data = groups[0][0].data
    for number in numbers:
        lines = paper_lines(number, groups)
        if not lines:
            continue
        paper = PUBLISHED[f"table{number}"]
        if any(line.published for line in lines):
            notes += [PUBLISHED["about"], *paper["notes"]]
        title = f"Table {number}: {paper['title']}"
        if data != PAPER_DATA:  # several versions of it
            title += f", {data}"
        if number == "2":
            tables.append(make_table(title, accuracy_columns(), accuracy_lines(lines)))
        else:
            tables.append(make_table(title, columns, lines))
    return tables, notes


def accuracy_columns() -> dict[str, Column]:
    return {heading: Column(heading, 2) for heading in TABLE_2} | {"early_exit": COLUMNS["early_exit"]}


def accuracy_lines(lines: list[Line]) -> list[Line]:
    """Lines of Table 2: accuracies under the paper's headings in place of errors."""
    converted = []
    for line in lines:
        runs = []
        for run in line.runs:
            values = {heading: 100 - run.values[name] for heading, name in TABLE_2.items() if name in run.values}
            if "early_exit" in run.values:
                values["early_exit"] = run.values["early_exit"]
            runs.append(run._replace(values=values))
        converted.append(line._replace(runs=runs))
    return converted


def is_papers_data(run: Run) -> bool:
    return run.flags["data_type"] == PAPER_DATA and not any(run.flags[limit] for limit in LIMITS)


def all_tables(groups: list[list[Run]], table: str | None, columns: dict[str, Column]) -> tuple[list[Table], list[str]]:
    """The tables of groups on one data set, and notes; `table` is a number, or None for all that have rows."""
    tables, notes = [], []
    if is_papers_data(groups[0][0]):
        tables, notes = paper_tables(groups, table or "1234", columns)
    settings = {(line.runs[0].network, line.runs[0].label) for found in tables for line in found.lines}
    others = [Line(group, "", {}) for group in groups if (group[0].network, group[0].label) not in settings]
    if others and not table:
        tables.append(make_table(f"Other runs: {groups[0][0].data}", columns, others))
    return tables, notes


def classifier_lines(groups: list[list[Run]]) -> list[Line]:
    """A line for each trained classifier of each group, with all of its metrics."""
    lines = []
    for group in groups:
        for name in group[0].classifiers:
            runs = [run._replace(values=run.classifiers.get(name, {})) for run in group]
            lines.append(Line(runs, name, {}))
    return lines


def paired_tables(
    base: str, groups: list[list[Run]], columns: dict[str, Column], pooled: bool
) -> tuple[list[Table], list[str]]:
    """A table of differences from `base` for each network, and notes on their intervals."""
    variance = "pooled over the settings, which share the base's runs" if pooled else "of each setting's own seeds"
    tables, notes = [], []
    paired, left_out = pair_runs(base, groups)
    for network in dict.fromkeys(group[0].network for group in paired):
        of_network = [group for group in paired if group[0].network == network]
        data = of_network[0][0].data
        title = f"Differences from {base}, paired by seed: {data}"
        table, rests_on = make_paired_table(title, columns, of_network, pooled)
        tables.append(table)
        if rests_on:
            notes.append(
                "in brackets: 95 % interval of the mean difference (Student's t), with * where it leaves out 0; the"
                f" variance of paired differences is {variance} ({network}, {data}: {rests_on})"
            )
    return tables, [*notes, *(f"not paired: {line}" for line in left_out)]


def export(file: Path, runs: list[Run]) -> None:
    """One line of JSON per run, without what defines no experiment; floats with 6 significant digits."""
    lines = []
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in RUNTIME_FLAGS}
        if "data" in config:
            config["data"] = {key: value for key, value in config["data"].items() if key != "class_names"}
        text = json.dumps({"name": run.config.get("run_name", run.name), "config": config, "results": run.results})
        rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
        lines.append(json.dumps(rounded) + "\n")
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
    args.fail = lambda message: parser.error(printable(message))
    if args.unpooled and not args.pairs:
        args.fail("argument --unpooled: has no effect without --pairs")
    for path in args.runs:
        if not path.exists():
            args.fail(f"{path} does not exist")
    return args


def summarize(args: argparse.Namespace) -> None:
    which = "best" if args.best else "last"
    groups, left_out = group_runs(find_runs(args.runs), which)
    if not groups:
        args.fail("; ".join([f"no finished run in {' '.join(map(str, args.runs))}", *left_out]))
    runs = [run for group in groups for run in group]
    environments = frozenset.union(*(run.environments for run in runs))
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    notes = [f"{count}, {which} epoch, made on {'; '.join(sorted(environments))}"]
    notes += [f"left out: {line}" for line in left_out]
    tables = []
    keys = args.metrics or (DEFAULT_OF_PAIRS if args.pairs else DEFAULT)
    columns = {key: COLUMNS[key] for key in keys}
    for data in dict.fromkeys(run.data for run in runs):
        on_data = [group for group in groups if group[0].data == data]
        common = frozenset.intersection(*(group[0].non_paper_flags for group in on_data))
        if common:
            notes.append(f"{data}: all runs, unlike the paper: {', '.join(sorted(common))}")
        if args.pairs:
            found, more_notes = paired_tables(args.pairs, on_data, columns, pooled=not args.unpooled)
        elif args.all_classifiers:
            table = make_table(f"Every classifier: {data}", columns, classifier_lines(on_data), "classifier")
            found, more_notes = [table], []
        else:
            found, more_notes = all_tables(on_data, args.table, columns)
        tables += found
        notes += more_notes
    if args.pairs and not tables:
        labels = dict.fromkeys(run.label for run in runs)
        args.fail(f"--pairs {args.pairs}: give one of {'; '.join(labels)}")
    if args.export:
        inputs = [path for path in args.runs if args.export.exists() and path.samefile(args.export)]
        prefixes = tuple(f"{path}:" for path in inputs)
        lost = [line for line in left_out if line.startswith(prefixes) and "the same flags" not in line]
        if lost:
            args.fail(f"--export would remove runs that cannot be read: {'; '.join(lost)}")
        export(args.export, runs)
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
