#!/usr/bin/env python
"""The paper's tables from runs: mean ± sample standard deviation over seeds, published numbers beside.

usage: scripts/summarize.py [RUNS...] [--table N] [--best] [--format markdown|csv|latex]

Runs that differ in any flag that defines the experiment are never averaged together. Published numbers
stand only beside runs made in the paper's setting. Runs that are unfinished or cannot be read are named.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import signal
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from run_table import METHODS, PUBLISHED, ROOT, table_rows

# Entries of config.json that do not define the experiment. All others do, also those unheard of here.
NOT_DEFINING = (
    "seed", "run_name", "experiments_dir", "data_path", "workers", "device", "compile", "save_predictions",
    "saveckp_freq", "resume", "overwrite", "val_only", "allow_end_epoch_change",
    "python", "torch", "torchvision", "device_name", "git_commit",
)  # fmt: skip
# What a row of the paper is.
IDENTITY = ("classifier_type", *METHODS, "BYOT_from_k_block", "num_resnet_blocks")
# The setting of the published numbers; None stands for a flag left out.
PAPER = {
    "data_type": "cifar100", "end_epoch": 300, "lr_decay_schedule": (150, 225), "lr": 0.1,
    "lr_decay_rate": 0.1, "weight_decay": 5e-4, "batch_size": 128, "alpha_T": 0.8, "temperature": 3,
    "alpha": 0.1, "beta": 1e-6, "BYOT_from_k_block": 1, "num_resnet_blocks": 4, "image_size": 32, "width": 64,
    "DML_on_output": None, "limit_train": None, "limit_val": None, "classes": None, "val_split": None,
}  # fmt: skip
# Flags that act through one method only; the paper's value is put in their place where the method is off.
OPTIONS = {
    "PSKD": ("alpha_T",),
    "BYOT": ("temperature", "alpha", "beta", "BYOT_from_k_block"),
    "DML": ("DML_on_output", "DML_as_published"),
}
OLD_NAMES = {"ResNetBeMyOwnTeacher18": "resnet18", "ResNetBeMyOwnTeacher50": "resnet50"}

# column: (heading, decimals of ours)
METRICS = {
    "top1_error": ("top-1 err (%)", 2),
    "top5_error": ("top-5 err (%)", 2),
    "nll": ("NLL", 3),
    "ece": ("ECE (%)", 2),
    "aurc": ("AURC (x 10³)", 2),
    "seconds_per_epoch": ("s/epoch", 1),
}
ACCURACIES = {name: (name, 2) for name in PUBLISHED["table2"]["columns"]}
ERRORS = {name: METRICS[name] for name in ("top1_error", "top5_error")}
TABLES = {
    "1": ("Table 1: networks and losses", METRICS),
    "2": ("Table 2: top-1 accuracy (%) of each classifier", ACCURACIES),
    "3": ("Table 3: self-distillation from block k on (ResNet-18, PSKD+BYOT+DML)", ERRORS),
    "4": ("Table 4: number of blocks N (ResNet-18, PSKD+BYOT+DML)", ERRORS),
    "other": ("Other runs: no row of the paper", METRICS),
}


class Unusable(Exception):
    """Why a run cannot be averaged."""


class Run(NamedTuple):
    name: str
    flags: dict  # canonical, see canonical()
    seed: int
    values: dict  # column -> number or None
    hardware: str
    version: str


class Cell(NamedTuple):
    mean: float | None
    sd: float | None = None  # None with one run
    published: float | None = None
    difference: float | None = None
    mark: str = ""


def canonical(flags: dict) -> dict:
    """Defining flags, hashable; what is off is absent, what has no effect is as the paper has it."""
    flags = {key: value for key, value in flags.items() if key not in NOT_DEFINING}
    flags = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}
    flags["classifier_type"] = OLD_NAMES.get(flags["classifier_type"], flags["classifier_type"])
    for method, options in OPTIONS.items():
        if not flags.get(method):
            flags.update(dict.fromkeys(options))
    for key, usual in PAPER.items():
        if flags.get(key) is None or (usual is None and not flags[key]):
            flags[key] = usual
    return {key: value for key, value in flags.items() if value is not None and value is not False}


def read_run(directory: Path, which: str) -> Run:
    """The run in `directory`, with the numbers of its `last` or `best` epoch; raises Unusable."""
    try:
        config = json.loads((directory / "config.json").read_text())
        results = json.loads((directory / "results.json").read_text())
        flags = config.get("flags", config)  # all on one level, or the flags apart
        if results["status"] != "finished":
            raise Unusable(f"{results['status']}, {results.get('epochs', 0)} of {flags['end_epoch']} epochs")
        line = results[which]
        if flags.get("val_split"):  # then `val` is of training images, which are no row of any table
            line = results["test"].get(which, results["test"])
            line = line if "val" in line else {**line, "val": line}
        values = {key: float(line["val"][key]) for key in METRICS if key != "seconds_per_epoch"}
        values["seconds_per_epoch"] = float(results["seconds_per_epoch"])
        exits = line.get("exits") or []
        blocks = flags["num_resnet_blocks"]
        classifiers = {f"{i}/{blocks}": metrics for i, metrics in enumerate(exits, 1)}
        classifiers |= {f"{blocks}/{blocks}": line["val"], "ensemble": line.get("ensemble")}
        values |= {name: 100 - metrics["top1_error"] if metrics else None for name, metrics in classifiers.items()}
        if bad := [name for name, value in values.items() if not math.isfinite(value or 0)]:
            raise Unusable(f"{bad[0]} is not finite")
        commit = config.get("git_commit") or "unknown"
        commit = commit[:7] + commit[40:]  # `with changes` stays
        version = f"torch {config.get('versions', config).get('torch')}, commit {commit}"
        hardware = str(config.get("device_name") or "unnamed hardware")
        return Run(os.path.relpath(directory), canonical(flags), flags["seed"], values, hardware, version)
    except FileNotFoundError as error:
        raise Unusable(f"no {Path(error.filename).name}") from None
    except json.JSONDecodeError as error:
        raise Unusable(f"not readable as JSON: {error}") from None
    except KeyError as error:
        raise Unusable(f"an entry is missing: {error}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Unusable(f"not readable: {error}") from None


def find_runs(paths: list[Path]) -> list[Path]:
    """Run directories among the paths and below them, sorted, each once."""
    files = [file for path in paths for name in ("config.json", "results.json") for file in path.rglob(name)]
    return sorted({file.parent.resolve() for file in files})


def group_runs(directories: list[Path], which: str) -> tuple[list[list[Run]], list[str]]:
    """Runs with the same defining flags and different seeds; a line for each run left out, and why."""
    groups, left_out = {}, []
    for directory in directories:
        try:
            run = read_run(directory, which)
        except Unusable as why:
            left_out.append(f"{os.path.relpath(directory)} ({why})")
            continue
        group = groups.setdefault(frozenset(run.flags.items()), [])
        if twin := [other.name for other in group if other.seed == run.seed]:
            left_out.append(f"{run.name} (the same flags and seed as {twin[0]}, which is used)")
        else:
            group.append(run)
    return list(groups.values()), left_out


def departures(flags: dict) -> str:
    """In what the flags depart from the paper's setting, apart from what makes the row."""
    return listing(flags, {key for key in PAPER if key not in IDENTITY and flags.get(key) != PAPER[key]})


def listing(flags: dict, keys: set[str]) -> str:
    """Such as `end_epoch 30, width 8`; options of a method that is off are not worth a word."""
    idle = {option for method, options in OPTIONS.items() if method not in flags for option in options}
    return ", ".join(f"{key} {spelled(flags.get(key))}" for key in sorted(keys - idle))


def spelled(value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "off" if value is None else "on" if value is True else str(value)


def row_key(row: dict) -> tuple:
    """A row of the paper in the order of IDENTITY."""
    on = (True if method in row["methods"] else None for method in METHODS)
    return (row["model"], *on, row["BYOT_from_k_block"], row["num_resnet_blocks"])


def run_key(flags: dict) -> tuple:
    return tuple(flags.get(key) for key in IDENTITY)


def rows_of(table: str, groups: list[list[Run]]) -> dict[tuple, dict | None]:
    """Key -> row of the paper; under `other`, the keys of the groups that no row has, without a row."""
    if table != "other":
        return {row_key(row): row for row in table_rows(int(table))}
    known = {row_key(row) for t in "1234" for row in table_rows(int(t))}
    return dict.fromkeys(sorted({run_key(group[0].flags) for group in groups} - known, key=str))


def published(table: str, row: dict) -> dict:
    """Column -> printed number. Table 2's columns 3/4 and 1/4, exchanged in print, get their right names."""
    if table != "2":
        return row
    return dict(zip(("4/4", "1/4", "2/4", "3/4", "ensemble"), row["values"], strict=True))


def cell(group: list[Run], column: str, theirs: float | None) -> Cell:
    """One entry of a table, marked where ours and theirs are over two of our standard deviations apart."""
    ours = [run.values[column] for run in group if run.values.get(column) is not None]
    timing = column == "seconds_per_epoch"
    if not ours or (timing and len({run.hardware for run in group}) > 1):  # a mean over machines says nothing
        return Cell(None, published=theirs)
    mean = statistics.mean(ours)
    sd = statistics.stdev(ours) if len(ours) > 1 else None
    if theirs is None or timing:  # seconds on two machines are not to be subtracted
        return Cell(mean, sd, theirs)
    difference = mean - theirs
    return Cell(mean, sd, theirs, difference, "*" if sd is not None and abs(difference) > 2 * sd else "")


def build(table: str, groups: list[list[Run]], complete: bool) -> tuple[list[dict], list[str]]:
    """(lines, notes) of one table; a line is {"labels": strings by heading, "cells": Cells by column}.

    With `complete`, rows of the paper without runs are there too.
    """
    columns = TABLES[table][1]
    rows = rows_of(table, groups)
    shown = [group for group in groups if run_key(group[0].flags) in rows]
    told = set(IDENTITY if table != "other" else IDENTITY[:4])  # what the labels or the row say of a run
    flags_shown = [group[0].flags for group in shown]
    keys = set().union(*flags_shown) - told
    differing = {key for key in keys if len({flags.get(key) for flags in flags_shown}) > 1}
    if table == "other":
        differing |= {key for flags in flags_shown for key in PAPER if flags.get(key) != PAPER[key]}
    lines, settings = [], {}
    for key, row in rows.items():
        labels = {"row": str(row["row"])} if row else {}
        if table in "34":
            labels |= {"k": str(key[4])} if table == "3" else {"N": str(key[5])}
        else:
            methods = "+".join(method for method, on in zip(METHODS, key[1:4], strict=True) if on)
            labels |= {"network": key[0], "methods": methods or "baseline"}
        fitting = [group for group in shown if run_key(group[0].flags) == key]
        if complete and not fitting:
            lines.append({"labels": {**labels, "n": "not run"}, "cells": dict.fromkeys(columns, Cell(None))})
        for group in sorted(fitting, key=lambda group: departures(group[0].flags)):
            flags = group[0].flags
            setting = departures(flags)
            settings.setdefault(setting, []).append(labels.get("row"))
            theirs = published(table, row) if row and not setting else {}
            about = {"differs in": listing(flags, differing)} if differing else {}
            about |= {"n": str(len(group)), "seeds": spelled(tuple(sorted(run.seed for run in group)))}
            cells = {column: cell(group, column, theirs.get(column)) for column in columns}
            lines.append({"labels": labels | about, "cells": cells})
    return lines, notes_of(table, settings, [run for group in shown for run in group])


def notes_of(table: str, settings: dict[str, list[str]], used: list[Run]) -> list[str]:
    """The lines under a table: what its cells hold, what was left out, where the runs come from."""
    notes = []
    if any("val_split" in run.flags for run in used):
        notes.append("Runs with val_split: selected on held-out images; the numbers are of the test split.")
    if "" in settings and table != "other":
        notes.append(
            "In brackets: published, and ours - published, with * where over two standard deviations. "
            "Published numbers are of the best of 300 evaluations on the test split"
            + ("; seconds per epoch of an unnamed GPU." if table == "1" else ".")
        )
        notes += PUBLISHED[f"table{table}"].get("notes", [])
    for setting, rows in settings.items():
        if setting and table != "other":
            where = f" in row {', '.join(dict.fromkeys(rows))}" if len(settings) > 1 else ""
            notes.append(f"Published numbers omitted{where}, the setting being another: {setting}.")
    if used:
        made = dict.fromkeys(f"{run.hardware}, {run.flags.get('precision')}, {run.version}" for run in used)
        notes.append(f"{len(used)} run{'s' * (len(used) > 1)}: {'; '.join(made)}.")
    return notes


def text(cell: Cell, decimals: int) -> str:
    """Such as `21.00 ± 1.00 (20.03, +0.97*)`."""
    ours = "—" if cell.mean is None else f"{cell.mean:.{decimals}f}"
    if cell.sd is not None:
        ours += f" ± {cell.sd:.{decimals}f}"
    if cell.published is None:
        return ours
    difference = "" if cell.difference is None else f", {cell.difference:+.{decimals}f}{cell.mark}"
    return f"{ours} ({cell.published:.2f}{difference})"


def grid(lines: list[dict], columns: dict) -> list[list[str]]:
    """Headings and lines as strings."""
    order = ["row", "k", "N", "network", "methods", "differs in", "n", "seeds"]
    heads = [head for head in order if any(head in line["labels"] for line in lines)]
    rows = [heads + [heading for heading, _ in columns.values()]]
    for line in lines:
        cells = [text(line["cells"][column], decimals) for column, (_, decimals) in columns.items()]
        rows.append([line["labels"].get(head, "") for head in heads] + cells)
    return rows


def markdown(title: str, rows: list[list[str]], notes: list[str]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"### {title}", "", *table, "", *(f"- {note}" for note in notes), ""])


def latex(title: str, rows: list[list[str]], notes: list[str]) -> str:
    """LaTeX that needs no package; published numbers go on a second line of their cell."""

    def escape(words: str) -> str:
        words = re.sub(r"(?<=[(, ])([+-])(?=\d)", r"$\1$", re.sub(r"([%&#_])", r"\\\1", words))
        for old, new in (("±", r"$\pm$"), ("³", "$^3$"), ("—", "--")):
            words = words.replace(old, new)
        return words

    def entry(words: str) -> str:
        return re.sub(r"(.+) (\(\d.*\))$", r"\\shortstack{\1\\\\\2}", escape(words))

    body = [" & ".join(map(entry, row)) + r" \\" for row in rows]
    top = [r"\begin{table}", rf"\caption{{{escape(title)}}}", rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}"]
    tabular = [r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}", ""]
    return "\n".join([*top, *tabular, *(escape(note) + r"\par" for note in notes), r"\end{table}", ""])


def comma_separated(tables: dict[str, list[dict]]) -> str:
    """All tables under one line of headings; a column that a table lacks is empty there."""
    records = []
    for table, lines in tables.items():
        for line in lines:
            record = {"table": table, **line["labels"]}
            for column, entry in line["cells"].items():
                for field, value in entry._asdict().items():
                    name = column if field == "mean" else f"{column} {field}"
                    record[name] = round(value, 6) if isinstance(value, float) else value
            records.append(record)
    out = io.StringIO()
    fields = dict.fromkeys(key for record in records for key in record)
    writer = csv.DictWriter(out, list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n")[2])
    runs = parser.add_argument("runs", nargs="*", type=Path, default=[ROOT / "experiments"], metavar="RUNS")
    runs.help = "run directories, or directories that hold some (default: the repository's experiments)"
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    parser.add_argument("--best", action="store_true", help="each run's best epoch in place of its last")
    parser.add_argument("--table", choices="1234", help="that table alone, with the rows that were not run")
    args = parser.parse_args(argv)
    if missing := [path for path in args.runs if not path.is_dir()]:
        parser.error(f"{missing[0]}: no such directory")
    groups, left_out = group_runs(find_runs(args.runs), "best" if args.best else "last")
    built = {table: build(table, groups, bool(args.table)) for table in args.table or TABLES}
    built = {table: (lines, notes) for table, (lines, notes) in built.items() if lines}
    end = [f"Left out: {line}" for line in left_out]
    if not groups:
        end.append(f"No finished run in {', '.join(map(str, args.runs))}.")
    about = f"{'Best' if args.best else 'Last'} epoch; mean ± sample standard deviation over n seeds."
    if args.format == "csv":
        print(comma_separated({table: lines for table, (lines, _) in built.items()}), end="")
        notes = dict.fromkeys([about, *(note for _, notes in built.values() for note in notes), *end])
        print(*notes, sep="\n", file=sys.stderr)  # beside the file, which then parses
        return 0
    for table, (lines, notes) in built.items():
        title, columns = TABLES[table]
        render = markdown if args.format == "markdown" else latex
        print(render(title, grid(lines, columns), [about, *notes]))
    for line in end:
        print("- " + line if args.format == "markdown" else "% " + line)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack ± and ×
    sys.exit(main())
