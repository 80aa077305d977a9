#!/usr/bin/env python
"""The paper's tables from runs: mean ± sample standard deviation over n seeds.

Runs that differ in a flag that defines the experiment are never averaged together. Published numbers appear only
beside runs in the paper's setting. Runs that are unfinished, unreadable or duplicates are named with the reason.
"""

import argparse
import json
import math
import os
import signal
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from run_table import BLOCK_FLAGS, PUBLISHED, ROOT, table_rows

sys.path.insert(0, str(ROOT))
from loss import METHODS
from main import parse_args
from utils.flags import RUNTIME_FLAGS
from utils.metrics import METRICS
from utils.runtime import MACHINE_FACTS

NOT_FLAGS = {*RUNTIME_FLAGS, *MACHINE_FACTS, "seed", "starts", "data"}  # entries of config.json
COLUMNS = {  # heading, decimals
    **{name: (f"{metric.heading} ({metric.unit})", metric.decimals) for name, metric in METRICS.items()},
    "ece_after_T": ("ECE after T (%)", 2),  # T: each classifier's temperature, fitted on held-out images
    "early_exit": ("early exit (% MACs)", 1),  # for the final accuracy less 0.5 points; 100 is the backbone
    "seconds_per_epoch": ("s/epoch", 1),
    "hours": ("hours", 2),
}
TIMES = ("seconds_per_epoch", "hours")
ACCURACIES = {name: (name, 2) for name in ("4/4", "3/4", "2/4", "1/4", "ensemble")}  # exit i of N is i/N, final N/N


class Run(NamedTuple):
    name: str  # the path of its directory, or file:line
    config: dict
    results: dict
    flags: dict  # that define the experiment
    seed: int
    values: dict  # column -> number
    classifiers: dict  # "1/4", ..., "4/4", "ensemble" -> column -> number
    label: str = ""  # see group_runs


def defining_flags(config: dict) -> dict:
    """The flags that define the experiment, lists as tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if key not in NOT_FLAGS}


@cache
def paper_setting() -> dict:
    """The flags of the published numbers: main.py's defaults, in float32."""
    return defining_flags(vars(parse_args([]))) | {"precision": "fp32"}


def departures(flags: dict) -> set[str]:
    """The flags that are not as in the paper's setting, apart from the network and the methods."""
    return {key for key, _ in flags.items() - paper_setting().items()} - {"classifier_type", *METHODS}


def common_departures(groups: list[list[Run]]) -> set[str]:
    """The departures that are the same in all groups."""
    keys = departures(groups[0][0].flags) if groups else set()
    return {key for key in keys if len({group[0].flags.get(key) for group in groups}) == 1}


def listing(flags: dict, keys: set[str]) -> str:
    """Such as `end_epoch 30, width 8`."""
    return ", ".join(f"{key} {flags.get(key)}" for key in sorted(keys))


def read_run(name: str, source: Path | str, which: str) -> Run:
    """The `last` or `best` epoch of a run, given its directory or a line that --export wrote.

    Raises:
        ValueError, KeyError, TypeError, OSError: the run is unfinished or cannot be read.
    """
    if isinstance(source, Path):
        config, results = (json.loads((source / f"{part}.json").read_text()) for part in ("config", "results"))
    else:
        config, results = (json.loads(source)[part] for part in ("config", "results"))
    if results["status"] != "finished":
        raise ValueError(f"{results['status']}, {results['epochs']} of {config['end_epoch']} epochs")
    flags = paper_setting() | defining_flags(config)  # a flag that is newer than the run has its default
    line = results["test"][which] if flags["val_split"] else results[which]  # with val_split, val is of held-out images
    blocks, numbers = flags["num_resnet_blocks"], [*line["exits"], line["val"]]
    first = blocks - len(numbers) + 1  # without exits there is the final classifier alone
    classifiers = {f"{i}/{blocks}": dict(metrics or {}) for i, metrics in enumerate(numbers, first)}
    if calibrated := line.get("calibrated"):
        for metrics, after in zip(classifiers.values(), [*calibrated["exits"], calibrated["val"]], strict=True):
            metrics |= {"ece_after_T": after["ece"]} if after else {}
    classifiers["ensemble"] = line["ensemble"] or {}
    values = {key: 100 - metrics["top1_error"] for key, metrics in classifiers.items() if metrics}
    values |= classifiers[f"{blocks}/{blocks}"] | {key: results[key] for key in TIMES if key in results}
    if early := line.get("early_exit"):
        values["early_exit"] = 100 * early["chosen"]["multiply_adds"] / early["backbone_multiply_adds"]
    return Run(name, config, results, flags, config["seed"], values, classifiers)


def find_runs(paths: list[Path]) -> dict[str, Path | str]:
    """Name -> run directory (a path or below it) or line of a .jsonl file; sorted, each once."""
    sources = {}
    for path in paths:
        if path.suffix == ".jsonl":
            sources |= {f"{path}:{number}": line for number, line in enumerate(path.read_text().splitlines(), 1)}
        sources |= {os.path.relpath(file.parent): file.parent for file in path.rglob("config.json")}
    return dict(sorted(sources.items()))


def group_runs(sources: dict[str, Path | str], which: str) -> tuple[list[list[Run]], list[str]]:
    """Runs with the same defining flags, one per seed; a line for each run left out, and why.

    A group's label is its methods and its departures from the paper's setting, except those common to all groups.
    """
    by_flags, left_out = {}, []
    for name, source in sources.items():
        try:
            run = read_run(name, source, which)
            group = by_flags.setdefault(frozenset(run.flags.items()), {})
            if run.seed in group:
                raise ValueError(f"the same flags and seed as {group[run.seed].name}, which is used")
            group[run.seed] = run
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            left_out.append(f"{name} ({'no entry ' * isinstance(error, KeyError)}{error})")
    groups = [[group[seed] for seed in sorted(group)] for group in by_flags.values()]
    common = common_departures(groups)
    for i, group in enumerate(groups):
        flags = group[0].flags
        methods = "+".join(method for method in METHODS if flags[method]) or "baseline"
        label = ", ".join(filter(None, (methods, listing(flags, departures(flags) - common))))
        groups[i] = [run._replace(label=label) for run in group]
    return sorted(groups, key=lambda group: (sum(group[0].flags[m] for m in METHODS), group[0].label)), left_out


def paper_lines(table: str, groups: list[list[Run]]) -> list[tuple]:
    """(labels, group, published values) of the groups that are rows of the table, in the paper's order.

    Published values are left out unless only the precision differs, or DML is the published script's.
    """
    lines = []
    for row in table_rows(int(table)):
        flags = {"classifier_type": row["model"], **{method: method in row["methods"] for method in METHODS}}
        flags |= {flag: row[flag] for flag in BLOCK_FLAGS}
        for group in groups:
            if flags.items() <= group[0].flags.items():
                others = departures(group[0].flags) - BLOCK_FLAGS.keys()
                published = row if others <= {"precision", "sync_bn", "DML_as_published"} else {}
                lines.append(({"row": row["row"]}, group, published))
    return lines


def paired_lines(base: str, groups: list[list[Run]]) -> list[tuple]:
    """Lines as in paper_lines: differences, seed by seed, from the group labelled `base` of the same network."""
    values = {(run.flags["classifier_type"], run.label, run.seed): run.values for group in groups for run in group}
    lines = []
    for group in groups:
        runs = []
        for run in group:
            theirs = values.get((run.flags["classifier_type"], base, run.seed), {})
            ours = {key: v - theirs[key] for key, v in run.values.items() if key in theirs and key not in TIMES}
            runs += [run._replace(values=ours)] if theirs and run.label != base else []
        lines += [({}, runs, {})] if runs else []
    return lines


def cell(runs: list[Run], column: str, published: float | None, decimals: int, sign: str) -> str:
    """Such as `21.00 ± 1.00 (20.03, +0.97*)`: * if the difference is over two of our standard deviations."""
    text, bracket = "—", [] if published is None else [f"{published:.2f}"]
    values = [run.values.get(column) for run in runs]
    machines = {run.config["device_name"] for run in runs}
    if None not in values and (column not in TIMES or len(machines) == 1):
        mean, sd = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.inf
        text = f"{mean:{sign}.{decimals}f}" + (f" ± {sd:.{decimals}f}" if len(values) > 1 else "")
        if bracket and column not in TIMES:  # the published times are another machine's
            bracket.append(f"{mean - published:+.{decimals}f}" + ("*" if abs(mean - published) > 2 * sd else ""))
    return f"{text} ({', '.join(bracket)})" if bracket else text


def table(title: str, lines: list[tuple], columns: dict, sign: str = "") -> str:
    """The lines as a markdown table; columns without any number are left out."""
    rows = []
    for labels, runs, published in lines:
        labels = {**labels, "network": runs[0].flags["classifier_type"], "methods": runs[0].label, "n": len(runs)}
        labels["seeds"] = " ".join(str(run.seed) for run in runs)
        cells = [cell(runs, key, published.get(key), decimals, sign) for key, (_, decimals) in columns.items()]
        rows.append([*map(str, labels.values()), *cells])
    headings = [*labels, *(heading for heading, _ in columns.values())]
    used = [i for i in range(len(headings)) if any(row[i] != "—" for row in rows)]
    rows = [[row[i] for i in used] for row in [headings, ["---"] * len(headings), *rows]]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def export(file: Path, groups: list[list[Run]]) -> None:
    """One line of JSON per run, without what defines no experiment; floats with 6 significant digits."""
    lines = []
    for run in [run for group in groups for run in group]:
        config = {key: value for key, value in run.config.items() if key not in RUNTIME_FLAGS}
        config.get("data", {}).pop("class_names", None)
        text = json.dumps({"name": run.config.get("run_name", run.name), "config": config, "results": run.results})
        lines.append(json.dumps(json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))))
    file.write_text("\n".join(lines) + "\n")


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
    if missing := [path for path in args.runs if not path.exists()]:
        parser.error(f"{missing[0]} does not exist")
    groups, left_out = group_runs(find_runs(args.runs), "best" if args.best else "last")
    if not groups:
        parser.error(f"no finished run in {', '.join(map(str, args.runs))}" + "".join(f"; {why}" for why in left_out))
    if args.export:
        export(args.export, groups)
    remarks = [f"left out: {line}" for line in left_out]
    if common := common_departures(groups):
        remarks.append(f"all runs, unlike the paper: {listing(groups[0][0].flags, common)}")
    if args.pairs:
        lines = paired_lines(args.pairs, groups)
        if not lines:
            parser.error(f"--pairs {args.pairs}: give one of {'; '.join(group[0].label for group in groups)}")
        print(table(f"Differences from {args.pairs}, paired by seed", lines, COLUMNS, sign="+"))
    elif args.all_classifiers:
        lines = [
            ({"classifier": name}, [run._replace(values=run.classifiers[name]) for run in group], {})
            for group in groups
            for name in group[0].classifiers
            if group[0].classifiers[name]
        ]
        print(table("Every classifier", lines, COLUMNS) if lines else "")
    else:
        in_paper = set()
        for number in args.table or "1234":
            lines, paper = paper_lines(number, groups), PUBLISHED[f"table{number}"]
            columns = {**ACCURACIES, "early_exit": COLUMNS["early_exit"]} if number == "2" else COLUMNS
            if lines:
                print(table(f"Table {number}: {paper['title']}", lines, columns))
            in_paper |= {id(group) for _, group, _ in lines}
            if any(published for _, _, published in lines):
                remarks += [PUBLISHED["about"], *paper["notes"]]
        others = [({}, group, {}) for group in groups if id(group) not in in_paper]
        if others and not args.table:
            print(table("Other runs", others, COLUMNS))
    configs = [run.config for group in groups for run in group]
    starts = [start for config in configs for start in config.get("starts", [config])]
    origins = {f"{s['device_name']}, torch {s['torch']}, commit {s['git_commit']}" for s in starts}
    about = f"{len(configs)} runs, {'best' if args.best else 'last'} epoch, made on {'; '.join(sorted(origins))}"
    for remark in dict.fromkeys([about, *remarks]):
        print("-", remark)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    main()
