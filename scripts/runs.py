"""Runs as tables and figures use them: found in directories or exported files, read, and grouped over seeds.

Needs neither PyTorch nor main.py.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from paper import PUBLISHED, ROOT, SETTINGS

sys.path.insert(0, str(ROOT))
from utils.errors import UserError, printable
from utils.records import (
    AFTER_TEMPERATURE,
    METRICS,
    Change,
    EpochRecord,
    SplitRecord,
    Start,
    TestRecord,
    find_changes,
    from_json,
)

METHODS = ("PSKD", "BYOT", "DML")
NO_METHOD = dict.fromkeys(METHODS, False)
PAPER = PUBLISHED["setting"] | NO_METHOD | {"processes": "1"}  # BatchNorm is per process; other flags are off
LIMITS = ("classes", "limit_train", "limit_val")  # flags that make a data set smaller
# Network and methods vary within the paper's tables.
NOT_COMPARED = {*METHODS, *LIMITS, "data_type", "classifier_type", "seed"}
# Entries of config.json that are no flags.
FACTS = {"data", "starts", "changes", *(field.name for field in dataclasses.fields(Start))}
CLASSIFIERS = ("exit 1", "exit 2", "exit 3", "final", "ensemble")
TIMES = ("seconds_per_epoch", "hours")
LARGEST = 1e100  # no number that is measured: its square would be infinite
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError)


class Column(NamedTuple):
    """A number of a run, and how it is printed."""

    heading: str
    decimals: int
    owner: str  # a classifier, "early exit" or "times"; with `metric` the key in `Run.values`
    metric: str


def _metric_column(name: str, after: str = "") -> Column:
    metric = METRICS[name]
    heading = f"{metric.heading}{after.replace('_', ' ')} ({metric.unit})".removesuffix(" ()")
    return Column(heading, metric.decimals, "final", name + after)


# Every number that a table may show. T: each classifier's temperature, p: its norm, both fitted on held-out images.
COLUMNS = {name: _metric_column(name) for name in METRICS}
COLUMNS |= {f"{name}_after_T": _metric_column(name, "_after_T") for name in AFTER_TEMPERATURE}
COLUMNS |= {name: Column(f"{name} err (%)", 2, name, "top1_error") for name in CLASSIFIERS}
COLUMNS |= {
    "augrc_pnorm": Column("AUGRC of pNorm (x 1000)", 2, "final", "augrc_pnorm"),
    "pnorm_p": Column("p of pNorm", 1, "final", "pnorm_p"),
    # At the threshold chosen for the final classifier's accuracy less 0.5 points; 100 % is the backbone.
    "early_exit": Column("early exit (% MACs)", 1, "early exit", "multiply_adds"),
    "early_exit_error": Column("early exit err (%)", 2, "early exit", "top1_error"),
    "seconds_per_epoch": Column("s/epoch", 1, "times", "seconds_per_epoch"),
    "hours": Column("hours", 2, "times", "hours"),
}


class Source(NamedTuple):
    name: str  # the path of a run's directory, or file:line
    path: Path  # of the directory or file
    line: str | None = None


class Skipped(NamedTuple):
    """A run that no table has."""

    name: str
    reason: str
    path: Path | None = None  # its directory, or the file that would lose it; None for a duplicate

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class Run(NamedTuple):
    """The last or best epoch of a finished run."""

    source: Source
    name: str
    config: dict  # without flags that define no experiment
    results: dict
    flags: dict  # that define the experiment
    seed: int
    network: str
    methods: tuple[str, ...]
    setting: str  # of the study's with these methods, the one that has most of its other flags
    changes: list[Change]  # from the paper's setting
    data: str  # the data set, such as "cifar100, classes 20"
    splits: dict[str, SplitRecord]
    images: dict[str, str]  # split -> what its record says of it and all seeds share
    starts: list[Start]
    values: dict[tuple[str, str], float]  # (classifier, metric); also ("early exit", ...) and ("times", ...)
    early_exit: dict | None  # of the test split

    @property
    def test_images(self) -> str:
        return "test " + (self.images.get("test") or self.images.get("val", "images not recorded"))

    @property
    def metrics(self) -> dict[tuple[str, str], float]:
        """The values that the same training has on every machine."""
        return {key: value for key, value in self.values.items() if key[0] != "times"}

    @property
    def row(self) -> tuple:
        """What it has in common with runs whose images alone may differ."""
        return self.data, self.test_images, self.network, self.methods, self.changes


class Group(NamedTuple):
    """Runs that differ in the seed alone, in its order."""

    runs: list[Run]
    label: str  # methods, or the study's name of a setting, and what else differs between groups on the same data
    data: str
    common: list[Change]  # from the paper's setting, in all groups on the same data


def find_sources(paths: list[Path]) -> tuple[list[Source], list[Skipped]]:
    """Run directories (a path, or below it, also behind links) and lines of .jsonl files, sorted, each once; and
    directories that cannot be read."""
    sources, errors, seen = set(), [], set()
    for path in paths:
        if path.suffix == ".jsonl":
            if path.exists() and not path.is_file():  # a pipe could be read for ever
                raise UserError(f"{path} is no regular file")
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            sources |= {Source(f"{path}:{number}", path, line) for number, line in enumerate(lines, 1)}
            continue
        for directory, inner, files in os.walk(path, onerror=errors.append, followlinks=True):
            real = os.path.realpath(directory)
            if real in seen:  # behind a link
                inner.clear()
            elif "config.json" in files:
                sources.add(Source(os.path.relpath(directory), Path(directory)))
            seen.add(real)
    return sorted(sources), [Skipped(error.filename, error.strerror) for error in errors]


def read_run(source: Source, which: str) -> Run:
    """The `last` or `best` epoch of a run.

    Raises:
        One of DAMAGED: the run is unfinished, damaged or cannot be read.
    """
    if source.line is None:
        config, results = (read_json(source.path / name) for name in ("config.json", "results.json"))
        name = config["run_name"]
    else:
        line = json.loads(source.line)
        name, config, results = line["name"], line["config"], line["results"]
    if results["status"] != "finished":
        raise ValueError(f"{results['status']}, {results['epochs']} of {config['end_epoch']} epochs")
    runtime = {"runtime", *config.get("runtime", ())}
    config = {key: value for key, value in config.items() if key not in runtime}
    flags = PAPER | {key: value for key, value in config.items() if key not in FACTS}
    methods = tuple(method for method in METHODS if flags[method])
    starts = [start for start in from_json(list[Start], config["starts"]) if start.epoch < results["epochs"]]
    flags["processes"] = " and ".join(sorted({str(start.processes) for start in starts}))
    fitting = [name for name, setting in SETTINGS.items() if (NO_METHOD | setting).items() <= flags.items()]
    changes = [change for change in find_changes(PAPER, flags, PAPER) if change.name not in NOT_COMPARED]

    # Without held-out images, validation is the test split.
    splits = from_json(dict[str, SplitRecord], config["data"].get("splits", {}))
    selects_on_val = bool(flags.get("val_split")) or "test" in splits
    data = ", ".join([flags["data_type"], *(f"{limit} {flags[limit]}" for limit in LIMITS if flags.get(limit))])
    drawn = ("train", "val") if flags.get("val_split") else ()  # by the seed
    images = {}
    for split, record in splits.items():
        if split not in drawn:
            images[split] = f"images {record.images}, digest {record.digest[:12]}"
    epoch = from_json(EpochRecord, results[which])
    block = TestRecord(epoch.epoch, {}, epoch.val)
    test = from_json(dict[str, TestRecord], results.get("test", {})).get(which)
    if test is not None and test.metrics is not None:
        block = test
    elif selects_on_val:
        data += ", no test metrics: held-out images"
    return Run(
        source=source,
        name=name,
        config=config,
        results=results,
        flags=flags,
        seed=from_json(int, flags["seed"]),
        network=from_json(str, flags["classifier_type"]),
        methods=methods,
        setting=max(fitting, key=lambda name: len(SETTINGS[name])),
        changes=changes + from_json(list[Change], config["changes"]),
        data=data,
        splits=splits,
        images=images,
        starts=starts,
        values=read_values(block, results),
        early_exit=block.early_exit,
    )


def read_json(file: Path):
    if not file.is_file():  # a pipe could be read for ever
        raise ValueError(f"no file {file.name}")
    return json.loads(file.read_text())


def read_values(block: TestRecord, results: dict) -> dict[tuple[str, str], float]:
    """Every number of a run.

    Raises:
        One of DAMAGED: one is not finite, or no number.
    """
    values = {("times", name): results[name] for name in TIMES if name in results}
    for classifier, metrics in block.metrics.items():
        values |= {(classifier, name): value for name, value in metrics.items() if value is not None}
        values[classifier, "accuracy"] = 100 - metrics["top1_error"]
    for classifier, metrics in (block.calibrated or {}).items():
        for name, value in metrics.items():
            after = f"{name}_after_T"
            values[classifier, after if after in COLUMNS else name] = value
    if block.early_exit:
        chosen, backbone = block.early_exit["chosen"], block.early_exit["backbone_multiply_adds"]
        values["early exit", "multiply_adds"] = 100 * chosen["multiply_adds"] / backbone
        values["early exit", "top1_error"] = 100 - chosen["accuracy"]
    for (owner, name), value in values.items():
        if not abs(value) < LARGEST:
            raise ValueError(f"{name} of {owner} is {value!r}")
    return values


def change_text(change: Change) -> str:
    if change.epoch is not None:
        return f"changed {change} after epoch {change.epoch}"
    return f"{change.name} {change.after}"


def load(paths: list[Path], which: str) -> tuple[list[Group], list[Skipped]]:
    """The finished runs in groups, those on one data set together; and those that are left out."""
    sources, skipped = find_sources(paths)
    by_setting: dict[str, dict[int, Run]] = {}  # row and images -> seed -> run
    for source in sources:
        try:
            run = read_run(source, which)
        except DAMAGED as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
            skipped.append(Skipped(source.name, reason, source.path))
            continue
        used = by_setting.setdefault(f"{run.row} {run.images}", {}).setdefault(run.seed, run)
        if used is not run:
            differs = run.metrics != used.metrics
            reason = f"the same flags and seed as {used.source.name}, which is used"
            reason += ", but with other numbers" if differs else ""
            skipped.append(Skipped(source.name, reason, source.path if differs else None))
    groups = [[runs[seed] for seed in sorted(runs)] for runs in by_setting.values()]
    return name_groups(groups), skipped


def name_groups(groups: list[list[Run]]) -> list[Group]:
    """Runs of one setting each, as groups; data sets of one name with several test splits get their record's words."""
    named = []
    for runs in groups:
        first = runs[0]
        on_data = [other for other, *_ in groups if other.data == first.data]
        together = [other for other in on_data if other.test_images == first.test_images]
        data = first.data if len(together) == len(on_data) else f"{first.data} ({first.test_images})"
        common = [change for change in first.changes if all(change in other.changes for other in together)]

        said = [*common, *find_changes(PAPER, PAPER | SETTINGS[first.setting], PAPER)]
        words = sorted(change_text(change) for change in first.changes if change not in said)
        for other in together:
            if other.row == first.row:
                words += [f"{key} {text}" for key, text in first.images.items() if other.images.get(key) != text]
        label = ", ".join([first.setting.replace("_", " "), *dict.fromkeys(words)])
        named.append(Group(runs, printable(label), printable(data), common))
    return sorted(named, key=lambda g: (g.data, len(g.runs[0].methods), "+".join(g.runs[0].methods), g.label))


def numbers(runs: list[Run], column: Column, classifier: str | None = None) -> list[float] | None:
    """A number of each run, of this classifier or the column's own; None where one lacks it, or where it is a time and
    several machines were used."""
    machines = {start.device_name for run in runs for start in run.starts}
    found = [run.values.get((classifier or column.owner, column.metric)) for run in runs]
    return None if None in found or (column.owner == "times" and len(machines) > 1) else found
