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
from paper import BLOCK_FLAGS, PUBLISHED, ROOT, SETTINGS, table_rows
from runs import CLASSIFIERS, COLUMNS, LIMITS, TIMES, Column, Group, Run, Skipped, change_text, load
from tables import FORMATS, Table, difference_cells, mean_cells

from utils.errors import UserError, print_error, printable, run_command
from utils.files import write_output
from utils.parser import Parser, path_type
from utils.records import SHOWN

PAPER_DATA = PUBLISHED["table1"]["dataset"]
DEFAULT = (*SHOWN, "ece_after_T", "early_exit", *TIMES)
DEFAULT_OF_PAIRS = ("top1_error", "nll_after_T", "augrc")
DEFAULT_OF_STUDY = ("top1_error", "ece", "nll_after_T", "augrc")
# Table 2's headings; its values are accuracies.
TABLE_2 = {"4/4": "final", "3/4": "exit 3", "2/4": "exit 2", "1/4": "exit 1", "ensemble": "ensemble"}
TABLE_2 = {heading: Column(heading, 2, (name, "accuracy")) for heading, name in TABLE_2.items()}
TABLE_2["early_exit"] = COLUMNS["early_exit"]


def labels(group: Group, runs: list[Run]) -> dict[str, str]:
    """The first cells of a row of these runs of a group."""
    seeds = " ".join(str(run.seed) for run in runs)
    return {"network": printable(runs[0].network), "methods": group.label, "n": str(len(runs)), "seeds": seeds}


def mean_row(group: Group, columns: dict[str, Column], row: str = "", published: dict | None = None) -> dict:
    return {"row": row, **labels(group, group.runs), **mean_cells(group.runs, columns, published)}


def find_published(group: Group, row: dict) -> dict | None:
    """The paper's values of one of its rows, as {} where they are not comparable, because more than the precision
    differs (or DML is the published script's); None for another row's runs."""
    run = group.runs[0]
    wanted = {"classifier_type": row["model"], **{flag: row[flag] for flag in BLOCK_FLAGS}}
    if run.methods != tuple(row["methods"]) or not wanted.items() <= run.flags.items():
        return None
    others = {change.name for change in run.changes} - {*BLOCK_FLAGS, "precision", "sync_bn", "DML_as_published"}
    return {} if others else row


def data_tables(groups: list[Group], number: str | None, columns: dict[str, Column]) -> tuple[list[Table], list[str]]:
    """The tables of groups on one data set: the paper's, or the one of this number, and that of all other groups; and
    what the paper says of those that have published values."""
    tables, notes, rest = [], [], list(groups)
    run, data = groups[0].runs[0], groups[0].data
    is_papers_data = run.flags["data_type"] == PAPER_DATA and not any(run.flags.get(limit) for limit in LIMITS)
    for which in (number or "1234") if is_papers_data else "":
        rows = []
        for paper_row in table_rows(int(which)):
            for group in groups:
                published = find_published(group, paper_row)
                if published is None:
                    continue
                rows.append(mean_row(group, TABLE_2 if which == "2" else columns, str(paper_row["row"]), published))
                rest = [other for other in rest if other is not group]
                if published:
                    notes += [PUBLISHED["about"], *PUBLISHED[f"table{which}"]["notes"]]
        title = f"Table {which}: {PUBLISHED[f'table{which}']['title']}"
        if data != PAPER_DATA:  # several versions of it
            title += f", {data}"
        if rows:
            tables.append(Table(title, rows))
    if rest and not number:
        tables.append(Table(f"Other runs: {data}", [mean_row(group, columns) for group in rest]))
    return tables, notes


def classifier_tables(groups: list[Group], columns: dict[str, Column]) -> tuple[list[Table], list[str]]:
    """A row for each trained classifier of each group, with the metrics that every classifier has."""
    rows = []
    for group in groups:
        for name in CLASSIFIERS:
            if (name, "top1_error") not in group.runs[0].values:
                continue
            of_classifier = {}
            for key, column in columns.items():
                owner, metric = column.value
                if owner == "final":
                    of_classifier[key] = column._replace(value=(name, metric))
            cells = mean_cells(group.runs, of_classifier)
            rows.append({"classifier": name, **labels(group, group.runs), **cells})
    return [Table(f"Every classifier: {groups[0].data}", rows)], []


def paired_tables(
    base: str, groups: list[Group], columns: dict[str, Column], pooled: bool
) -> tuple[list[Table], list[str]]:
    """A table of differences from `base` for each network, and notes on their intervals."""
    variance = "pooled over the settings, which share the base's runs" if pooled else "of each setting's own seeds"
    tables, notes = [], []
    all_paired, left_out = pair_runs(base, groups)
    data = groups[0].data
    for network in dict.fromkeys(pairs.group.runs[0].network for pairs in all_paired):
        paired = [pairs for pairs in all_paired if pairs.group.runs[0].network == network]
        rows = [labels(group, [run for run, _ in pairs]) for group, pairs in paired]
        rests_on: dict[str, list[str]] = {}  # words -> columns' headings
        for key, column in columns.items():
            cells, intervals = difference_cells(paired, column, pooled)
            for row, cell in zip(rows, cells, strict=True):
                row[key] = cell
            if intervals.num_settings:
                settings = count(intervals.num_settings, "setting")
                words = f"{settings}, {intervals.degrees_of_freedom:.1f} degrees of freedom"
                rests_on.setdefault(words if pooled else "n - 1 degrees of freedom", []).append(column.heading)
        tables.append(Table(f"Differences from {base}, paired by seed: {data}", rows))
        shown = [words if len(rests_on) == 1 else f"{', '.join(found)}: {words}" for words, found in rests_on.items()]
        if shown:
            notes.append(
                "in brackets: 95 % interval of the mean difference (Student's t), with * where it leaves out 0; the"
                f" variance of paired differences is {variance} ({network}, {data}: {'; '.join(shown)})"
            )
    return tables, [*notes, *(f"not paired: {line}" for line in left_out)]


def study_tables(groups: list[Group], columns: dict[str, Column]) -> tuple[list[Table], list[str]]:
    """README's table: the study's settings in their order and words, the first column's difference from the baseline,
    and what the paper has for ResNet-18."""
    names = [name for name, *_ in SETTINGS]
    groups = sorted(groups, key=lambda group: names.index(group.setting.name))
    paired, left_out = pair_runs(names[0], groups)
    first = next(iter(columns.values()))
    cells, _ = difference_cells(paired, first)
    by_label = {pairs.group.label: cell for pairs, cell in zip(paired, cells, strict=True)}
    papers = {}
    for row in table_rows(1):
        if row["model"] == "resnet18":
            papers["+".join(row["methods"]) or names[0]] = f"{row['top1_error']:.2f}, {row['ece']:.2f}"
    rows = []
    for group in groups:
        row = {"losses": group.label.replace(group.setting.name.replace("_", " "), group.setting.words, 1)}
        row |= {**mean_cells(group.runs, columns), "n": str(len(group.runs))}
        row[f"{first.heading} minus the baseline's"] = by_label.get(group.label, "")
        row["another setting, the paper's: top-1 err, ECE (%)"] = papers.get(group.setting.name, "-")
        rows.append(row)
    return [Table(f"The study's settings: {groups[0].data}", rows)], [f"not paired: {line}" for line in left_out]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def export(file: Path, groups: list[Group], skipped: list[Skipped]) -> None:
    """One line of JSON per run, without flags that define no experiment; results with 6 significant digits.

    Raises:
        UserError: runs that cannot be read would be lost.
    """
    lost = []
    for run in skipped:
        if run.source.line is not None and not run.is_duplicate and file.exists() and run.source.path.samefile(file):
            lost.append(str(run))
    if lost:
        raise UserError(f"--export would remove runs that cannot be read: {'; '.join(lost)}")
    lines = []
    for run in (run for group in groups for run in group.runs):
        left_out = {"runtime", *run.config.get("runtime", ())}
        config = {key: value for key, value in run.config.items() if key not in left_out}
        config["data"] = {key: value for key, value in config["data"].items() if key != "class_names"}
        results = json.loads(json.dumps(run.results), parse_float=lambda digits: float(f"{float(digits):.6g}"))
        lines.append(json.dumps({"name": run.name, "config": config, "results": results}) + "\n")
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
    text = "the settings of scripts/study.sh in words, the first column's differences from the baseline, and the paper"
    add("--study", action="store_true", help=text)
    args = parser.parse_args(argv)
    if args.unpooled and not args.pairs:
        parser.error("argument --unpooled: has no effect without --pairs")
    for path in args.runs:
        if not path.exists():
            parser.error(printable(f"{path} does not exist"))
    return args


def summarize(args: argparse.Namespace) -> None:
    which = "best" if args.best else "last"
    groups, skipped = load(args.runs, which)
    if not groups:
        raise UserError("; ".join([f"no finished run in {' '.join(map(str, args.runs))}", *map(str, skipped)]))
    runs = [run for group in groups for run in group.runs]
    machines = set()
    for start in (start for run in runs for start in run.starts):
        machines.add(f"{start.device_name}, torch {start.torch}, commit {start.git_commit}")
    notes = [f"{count(len(runs), 'run')}, {which} epoch, made on {'; '.join(sorted(machines))}"]
    notes += [f"left out: {run}" for run in skipped]
    tables = []
    default = DEFAULT_OF_PAIRS if args.pairs else DEFAULT_OF_STUDY if args.study else DEFAULT
    columns = {key: COLUMNS[key] for key in args.metrics or default}
    for data in dict.fromkeys(group.data for group in groups):
        on_data = [group for group in groups if group.data == data]
        common = sorted(map(change_text, on_data[0].common))
        if common:
            notes.append(f"{data}: all runs, unlike the paper: {', '.join(common)}")
        if args.pairs:
            found, more_notes = paired_tables(args.pairs, on_data, columns, pooled=not args.unpooled)
        elif args.all_classifiers:
            found, more_notes = classifier_tables(on_data, columns)
        elif args.study:
            found, more_notes = study_tables(on_data, columns)
        else:
            found, more_notes = data_tables(on_data, args.table, columns)
        tables += found
        notes += more_notes
    if args.pairs and not tables:
        known = dict.fromkeys(group.label for group in groups)
        raise UserError(f"--pairs {args.pairs}: give one of {'; '.join(known)}")
    if args.export:
        export(args.export, groups, skipped)
    tables = [table._replace(title=printable(table.title)) for table in tables]
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
