#!/usr/bin/env python
"""The paper's tables from runs: mean ± sample standard deviation over n seeds.

Runs that differ in a flag that defines the experiment are never averaged together. Published numbers appear only
beside runs in the paper's setting. Runs that are unfinished, unreadable or duplicates are named with the reason.
"""

import argparse
import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from run_table import BLOCK_FLAGS, PUBLISHED, ROOT, table_rows

sys.path.insert(0, str(ROOT))
from loss import METHODS
from main import RUNTIME_FLAGS, default_args
from utils.machine import MACHINE_FACTS
from utils.metrics import SHOWN

# Entries of config.json that are no departure from the paper's setting; network and methods vary within its tables.
NO_DEPARTURE = {*RUNTIME_FLAGS, *MACHINE_FACTS, "starts", "data", "seed", "classifier_type", *METHODS}
COLUMNS = {  # heading, decimals
    **{name: (f"{metric.heading} ({metric.unit})", metric.decimals) for name, metric in SHOWN.items()},
    "ece_after_T": ("ECE after T (%)", 2),  # T: each classifier's temperature, fitted on held-out images
    "early_exit": ("early exit (% MACs)", 1),  # for the final accuracy less 0.5 points; 100 is the backbone
    "seconds_per_epoch": ("s/epoch", 1),
    "hours": ("hours", 2),
}
TIMES = ("seconds_per_epoch", "hours")
ACCURACIES = {name: (name, 2) for name in ("4/4", "3/4", "2/4", "1/4", "ensemble")}  # exit i of N is i/N, final N/N
ACCURACIES["early_exit"] = COLUMNS["early_exit"]


class Run(NamedTuple):
    name: str  # the path of its directory, or file:line
    config: dict
    results: dict
    flags: dict  # config, and the defaults of flags that are newer than the run
    seed: int
    methods: tuple[str, ...]
    departures: frozenset[str]  # from the paper's setting, such as "width 8"
    values: dict  # column -> number
    classifiers: dict  # "1/4", ..., "4/4", "ensemble", if trained -> column -> number
    label: str = ""  # the methods, and the departures that are not common to all runs


def read_run(name: str, source: Path | str, which: str, paper: dict) -> Run:
    """The `last` or `best` epoch of a run, given its directory or a line that --export wrote, and the paper's flags.

    Raises:
        ValueError, KeyError, TypeError, OSError: the run is unfinished or cannot be read.
    """
    if isinstance(source, Path):
        config = json.loads((source / "config.json").read_text())
        results = json.loads((source / "results.json").read_text())
    else:
        config, results = json.loads(source)["config"], json.loads(source)["results"]
    if results["status"] != "finished":
        raise ValueError(f"{results['status']}, {results['epochs']} of {config['end_epoch']} epochs")
    flags = {**paper, **config}
    methods = tuple(method for method in METHODS if flags[method])
    changed = [key for key in flags if key not in NO_DEPARTURE and (key, flags[key]) not in paper.items()]
    departures = frozenset(f"{key} {flags[key]}" for key in changed)

    record = results["test"][which] if flags["val_split"] else results[which]  # else val is the test split
    blocks = flags["num_resnet_blocks"]
    metrics = [*record["exits"], record["val"]]  # None for an exit that no loss trains
    names = [f"{i}/{blocks}" for i in range(1, blocks + 1)][-len(metrics) :]  # without exits, the final one alone
    classifiers = {key: dict(found) for key, found in zip(names, metrics, strict=True) if found}
    if record.get("calibrated"):
        calibrated = dict(zip(names, [*record["calibrated"]["exits"], record["calibrated"]["val"]], strict=True))
        for key in classifiers:
            classifiers[key]["ece_after_T"] = calibrated[key]["ece"]
    values = {**classifiers[names[-1]], **{key: results[key] for key in TIMES if key in results}}
    if record["ensemble"]:
        classifiers["ensemble"] = record["ensemble"]
    values |= {key: 100 - found["top1_error"] for key, found in classifiers.items()}
    early = record.get("early_exit")
    if early:
        values["early_exit"] = 100 * early["chosen"]["multiply_adds"] / early["backbone_multiply_adds"]
    return Run(name, config, results, flags, config["seed"], methods, departures, values, classifiers)


def find_runs(paths: list[Path]) -> dict[str, Path | str]:
    """Name -> run directory (a path or below it) or line of a .jsonl file; sorted, each once."""
    sources = {}
    for path in paths:
        if path.suffix == ".jsonl":
            sources |= {f"{path}:{number}": line for number, line in enumerate(path.read_text().splitlines(), 1)}
        sources |= {os.path.relpath(file.parent): file.parent for file in path.rglob("config.json")}
    return dict(sorted(sources.items()))


def group_runs(sources: dict[str, Path | str], which: str) -> tuple[list[list[Run]], list[str]]:
    """Runs with the same defining flags, one per seed, in order; a line for each run left out, and why."""
    paper = vars(default_args()) | {"precision": "fp32"}  # main.py's defaults are its setting
    by_setting, left_out = {}, []
    for name, source in sources.items():
        try:
            run = read_run(name, source, which, paper)
            setting = (run.departures, run.methods, run.flags["classifier_type"])
            group = by_setting.setdefault(setting, {})
            if run.seed in group:
                raise ValueError(f"the same flags and seed as {group[run.seed].name}, which is used")
            group[run.seed] = run
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else error
            left_out.append(f"{name} ({reason})")
    groups = []
    for (departures, methods, _), group in by_setting.items():
        common = departures.intersection(*(other for other, _, _ in by_setting))
        label = ", ".join(["+".join(methods) or "baseline", *sorted(departures - common)])
        groups.append([group[seed]._replace(label=label) for seed in sorted(group)])
    return sorted(groups, key=lambda group: (len(group[0].methods), group[0].label)), left_out


def paper_lines(table: str, groups: list[list[Run]]) -> list[tuple]:
    """(labels, runs, published values) of the groups that are rows of the table, in the paper's order.

    Published values are left out unless only the precision differs, or DML is the published script's.
    """
    lines = []
    for row in table_rows(int(table)):
        wanted = {"classifier_type": row["model"], **{flag: row[flag] for flag in BLOCK_FLAGS}}
        for group in groups:
            if group[0].methods == tuple(row["methods"]) and wanted.items() <= group[0].flags.items():
                changed = {departure.split()[0] for departure in group[0].departures}
                others = changed - {*BLOCK_FLAGS, "precision", "sync_bn", "DML_as_published"}
                lines.append(({"row": row["row"]}, group, {} if others else row))
    return lines


def paired_lines(base: str, groups: list[list[Run]]) -> list[tuple]:
    """Lines as in paper_lines: differences, by seed, from the runs of the same network that are labelled `base`."""
    runs = [run for group in groups for run in group]
    bases = {(run.flags["classifier_type"], run.seed): run.values for run in runs if run.label == base}
    lines = []
    for group in groups:
        differences = []
        for run in group:
            theirs = bases.get((run.flags["classifier_type"], run.seed))
            if theirs and run.label != base:
                values = {key: v - theirs[key] for key, v in run.values.items() if key in theirs and key not in TIMES}
                differences.append(run._replace(values=values))
        if differences:
            lines.append(({}, differences, {}))
    return lines


def cell(runs: list[Run], column: str, decimals: int, published: dict, sign: str) -> str:
    """Such as `21.00 ± 1.00 (20.03, +0.97*)`: mean, standard deviation, published value, and ours minus it, with * if
    over two standard deviations; a dash where a run lacks the number."""
    values = [run.values.get(column) for run in runs]
    machines = {run.config["device_name"] for run in runs}
    if None in values or (column in TIMES and len(machines) > 1):
        return "—"
    mean, sd = statistics.mean(values), float("inf")
    text = f"{mean:{sign}.{decimals}f}"
    if len(values) > 1:
        sd = statistics.stdev(values)
        text += f" ± {sd:.{decimals}f}"
    if column not in published:
        return text
    if column in TIMES:  # of another machine
        return f"{text} ({published[column]:.2f})"
    difference = mean - published[column]
    mark = "*" if abs(difference) > 2 * sd else ""
    return f"{text} ({published[column]:.2f}, {difference:+.{decimals}f}{mark})"


def print_table(title: str, lines: list[tuple], columns: dict, sign: str = "") -> None:
    """Print lines as in paper_lines as a markdown table; columns without any number are left out."""
    rows = []
    for labels, runs, published in lines:
        row = {**labels, "network": runs[0].flags["classifier_type"], "methods": runs[0].label, "n": len(runs)}
        row["seeds"] = " ".join(str(run.seed) for run in runs)
        for column, (heading, decimals) in columns.items():
            row[heading] = cell(runs, column, decimals, published, sign)
        rows.append(row)
    headings = [heading for heading in rows[0] if any(row[heading] != "—" for row in rows)]
    print(f"### {title}\n")
    for row in [{heading: heading for heading in headings}, dict.fromkeys(headings, "---"), *rows]:
        print("|", " | ".join(str(row[heading]) for heading in headings), "|")
    print()


def export(file: Path, runs: list[Run]) -> None:
    """One line of JSON per run, without what defines no experiment; floats with 6 significant digits."""
    lines = []
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in RUNTIME_FLAGS}
        config.get("data", {}).pop("class_names", None)
        text = json.dumps({"name": run.config.get("run_name", run.name), "config": config, "results": run.results})
        rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
        lines.append(json.dumps(rounded) + "\n")
    file.write_text("".join(lines))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, default=[ROOT / "experiments"], help="directories of runs, or exported files")
    add("--best", action="store_true", help="each run's best epoch instead of its last")
    add("--export", type=Path, metavar="FILE.jsonl", help="write the runs to a file that this script reads")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--table", choices="1234", help="that table alone")
    add("--pairs", metavar="BASE", help="differences, by seed, from the methods BASE, for example baseline")
    add("--all_classifiers", action="store_true", help="all metrics of every classifier")
    args = parser.parse_args(argv)
    for path in args.runs:
        if not path.exists():
            parser.error(f"{path} does not exist")
    which = "best" if args.best else "last"
    groups, left_out = group_runs(find_runs(args.runs), which)
    if not groups:
        parser.error("; ".join([f"no finished run in {' '.join(map(str, args.runs))}", *left_out]))
    runs = [run for group in groups for run in group]
    if args.export:
        export(args.export, runs)
    starts = [start for run in runs for start in run.config.get("starts", [run.config])]
    origins = {f"{start['device_name']}, torch {start['torch']}, commit {start['git_commit']}" for start in starts}
    remarks = [f"{len(runs)} runs, {which} epoch, made on {'; '.join(sorted(origins))}"]
    remarks += [f"left out: {line}" for line in left_out]
    common = frozenset.intersection(*(run.departures for run in runs))
    if common:
        remarks.append(f"all runs, unlike the paper: {', '.join(sorted(common))}")
    if args.pairs:
        lines = paired_lines(args.pairs, groups)
        if not lines:
            parser.error(f"--pairs {args.pairs}: give one of {'; '.join(group[0].label for group in groups)}")
        print_table(f"Differences from {args.pairs}, paired by seed", lines, COLUMNS, sign="+")
    elif args.all_classifiers:
        lines = []
        for group in groups:
            for name in group[0].classifiers:
                lines.append(({"classifier": name}, [run._replace(values=run.classifiers[name]) for run in group], {}))
        print_table("Every classifier", lines, COLUMNS)
    else:
        others = groups
        for number in args.table or "1234":
            lines, paper = paper_lines(number, groups), PUBLISHED[f"table{number}"]
            if lines:
                title = f"Table {number}: {paper['title']}"
                print_table(title, lines, ACCURACIES if number == "2" else COLUMNS)
            others = [group for group in others if group not in [runs for _, runs, _ in lines]]
            if any(published for _, _, published in lines):
                remarks += [PUBLISHED["about"], *paper["notes"]]
        if others and not args.table:
            print_table("Other runs", [({}, group, {}) for group in others], COLUMNS)
    for remark in dict.fromkeys(remarks):
        print("-", remark)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    try:
        main()
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"error: {e}")
