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
from utils.errors import printable
from utils.records import METRICS, Change, EpochRecord, SplitRecord, Start, TestRecord, find_changes, from_json

PAPER = PUBLISHED["setting"]  # the flags that are not off
METHODS = ("PSKD", "BYOT", "DML")
LIMITS = ("classes", "limit_train", "limit_val")  # flags that make a data set smaller
# Network and methods vary within the paper's tables.
NOT_COMPARED = {*METHODS, *LIMITS, "data_type", "classifier_type", "seed"}
# Entries of config.json that are no flags.
FACTS = {"data", "starts", "changes", "runtime", *(field.name for field in dataclasses.fields(Start))}
CLASSIFIERS = ("exit 1", "exit 2", "exit 3", "final", "ensemble")
TIMES = ("seconds_per_epoch", "hours")
LARGEST = 1e100  # no number that is measured: its square would be infinite
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError)


class Column(NamedTuple):
    """A number of a run, and how it is printed."""

    heading: str
    decimals: int
    value: tuple[str, str]  # its key in `Run.values`

    @property
    def is_time(self) -> bool:
        return self.value[0] == "times"


def _metric_column(name: str, after: str = "") -> Column:
    metric = METRICS[name]
    heading = f"{metric.heading}{after.replace('_', ' ')} ({metric.unit})".removesuffix(" ()")
    return Column(heading, metric.decimals, ("final", name + after))


# Every number that a table may show. T: each classifier's temperature, p: its norm, both fitted on held-out images.
COLUMNS = {name: _metric_column(name) for name in METRICS}
COLUMNS |= {f"{name}_after_T": _metric_column(name, "_after_T") for name in ("nll", "ece", "brier", "adaptive_ece")}
COLUMNS |= {
    "augrc_pnorm": Column("AUGRC of pNorm (x 1000)", 2, ("final", "augrc_pnorm")),
    "pnorm_p": Column("p of pNorm", 1, ("final", "pnorm_p")),
}
COLUMNS |= {name: Column(f"{name} err (%)", 2, (name, "top1_error")) for name in CLASSIFIERS}
COLUMNS |= {
    # At the threshold chosen for the final classifier's accuracy less 0.5 points; 100 % is the backbone.
    "early_exit": Column("early exit (% MACs)", 1, ("early exit", "multiply_adds")),
    "early_exit_error": Column("early exit err (%)", 2, ("early exit", "top1_error")),
    "seconds_per_epoch": Column("s/epoch", 1, ("times", "seconds_per_epoch")),
    "hours": Column("hours", 2, ("times", "hours")),
}


class Source(NamedTuple):
    name: str  # the path of a run's directory, or file:line
    path: Path  # of the directory or file
    line: str | None = None


class Skipped(NamedTuple):
    """A run that no table has."""

    source: Source
    reason: str
    is_duplicate: bool = False

    def __str__(self) -> str:
        return f"{self.source.name} ({self.reason})"


class Setting(NamedTuple):
    """A setting of the study (paper.SETTINGS)."""

    name: str
    words: str
    flags: dict  # that are not the paper's


class Run(NamedTuple):
    """The last or best epoch of a finished run."""

    source: Source
    name: str
    config: dict
    results: dict
    flags: dict  # that define the experiment
    seed: int
    network: str
    methods: tuple[str, ...]
    changes: list[Change]  # from the paper's setting
    data: str  # the data set, such as "cifar100, classes 20"
    images: dict[str, str]  # what its record says of them and all seeds share, such as "test digest": "0a1b"
    splits: dict[str, SplitRecord]
    starts: list[Start]
    values: dict[tuple[str, str], float]  # (classifier, metric); also ("early exit", ...) and ("times", ...)
    early_exit: dict | None  # of the test split

    @property
    def machines(self) -> set[str]:
        return {start.device_name for start in self.starts}


class Group(NamedTuple):
    """Runs that differ in the seed alone, in its order."""

    runs: list[Run]
    setting: Setting  # the nearest
    label: str  # its name, and what else differs between groups on the same data
    data: str
    common: list[Change]  # from the paper's setting, in all groups on the same data


def find_sources(paths: list[Path]) -> tuple[list[Source], list[Skipped]]:
    """Run directories (a path, or below it, also behind links) and lines of .jsonl files, sorted, each once; and
    directories that cannot be read."""
    sources, errors, seen = set(), [], set()
    for path in paths:
        if path.suffix == ".jsonl":
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
    unreadable = [Skipped(Source(error.filename, Path(error.filename)), error.strerror) for error in errors]
    return sorted(sources), unreadable


def read_run(source: Source, which: str) -> Run:
    """The `last` or `best` epoch of a run.

    Raises:
        One of DAMAGED: the run is unfinished, damaged or cannot be read.
    """
    if source.line is None:
        config, results = (read_json(source.path / name) for name in ("config.json", "results.json"))
        name = config.get("run_name", source.name)
    else:
        line = json.loads(source.line)
        name, config, results = line.get("name", source.name), line["config"], line["results"]
    if results["status"] != "finished":
        raise ValueError(f"{results['status']}, {results['epochs']} of {config['end_epoch']} epochs")
    flags = {name: value for name, value in config.items() if name not in FACTS.union(config.get("runtime", ()))}
    if type(flags["seed"]) is not int:
        raise ValueError(f"seed is {flags['seed']!r}")
    starts = from_json(list[Start], config["starts"])
    flags = PAPER | flags

    # Without held-out images, validation is the test split.
    has_held_out = bool(flags.get("val_split"))
    data = ", ".join([flags["data_type"], *(f"{limit} {flags[limit]}" for limit in LIMITS if flags.get(limit))])
    epoch = from_json(EpochRecord, results[which])
    test = from_json(dict[str, TestRecord], results.get("test", {})).get(which)
    block = TestRecord(epoch.epoch, {}, epoch.val)
    if has_held_out and test is not None and test.metrics is not None:
        block = test
    elif has_held_out:
        data += ", no test split: held-out images"
    splits = from_json(dict[str, SplitRecord], config["data"].get("splits", {}))
    return Run(
        source=source,
        name=name,
        config=config,
        results=results,
        flags=flags,
        seed=flags["seed"],
        network=flags["classifier_type"],
        methods=tuple(method for method in METHODS if flags.get(method)),
        changes=paper_changes(flags, starts, from_json(list[Change], config["changes"])),
        data=data,
        images=image_facts(config["data"], splits, has_held_out),
        splits=splits,
        starts=starts,
        values=read_values(block, results),
        early_exit=block.early_exit,
    )


def read_json(file: Path):
    if not file.is_file():  # a pipe could be read for ever
        raise ValueError(f"{file.name} is no file" if file.exists() else f"no {file.name}")
    return json.loads(file.read_text())


def read_values(block: TestRecord, results: dict) -> dict[tuple[str, str], float]:
    """Every number of a run.

    Raises:
        ValueError: one is missing, or not finite.
    """
    if "final" not in block.metrics:
        raise ValueError("no final classifier")
    values = {("times", name): results[name] for name in TIMES if name in results}
    for classifier, metrics in block.metrics.items():
        for name, value in metrics.items():
            if value is not None or name != "auroc_failure":  # null where all predictions are right, or all wrong
                values[classifier, name] = value
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
        if value is None or not abs(value) < LARGEST:
            raise ValueError(f"{name} of {owner} is {value!r}")
    return values


def paper_changes(flags: dict, starts: list[Start], on_resume: list[Change]) -> list[Change]:
    """In what a run is not the paper's: flags, flags that changed on resume, and several processes, because BatchNorm
    is per process."""
    compared = {name: value for name, value in flags.items() if name not in NOT_COMPARED}
    changes = find_changes(PAPER, compared, PAPER) + on_resume
    processes = sorted({start.processes for start in starts})
    if processes != [1]:
        changes.append(Change("processes", 1, " and ".join(map(str, processes))))
    return changes


def change_text(change: Change) -> str:
    if change.epoch is not None:
        return f"changed {change} after epoch {change.epoch}"
    return f"{change.name} {change.after}"


def image_facts(data: dict, splits: dict[str, SplitRecord], has_held_out: bool) -> dict[str, str]:
    """What a data record says of a run's images, by name, without what the seed draws: which of the training images
    are held out, and the means measured on the others."""
    facts = {}
    if not has_held_out:
        for name in ("mean", "std"):
            facts[name] = " ".join(f"{value:.6g}" for value in data[name])
    if not splits:
        facts["test images"] = "not recorded"
    for name, split in splits.items():
        name = "test" if name == "val" and not has_held_out else name
        facts[f"{name} images"] = str(split.images)
        if not has_held_out or name in ("test", "train_and_val"):
            facts[f"{name} digest"] = split.digest[:12]
    return facts


def other_splits(run: Run, other: Run) -> list[str]:
    """The splits in which the images of two runs of one seed differ."""
    return sorted(name for name in run.splits.keys() & other.splits.keys() if run.splits[name] != other.splits[name])


def is_same_setting(run: Run, other: Run) -> bool:
    """Older runs do not say from which images theirs are held out."""
    names = {*run.images, *other.images}
    if not all("train_and_val digest" in r.images for r in (run, other)):
        names -= {"train_and_val images", "train_and_val digest"}
    if any(run.images.get(name) != other.images.get(name) for name in names):
        return False
    return all(getattr(run, name) == getattr(other, name) for name in ("data", "network", "methods", "changes"))


def load(paths: list[Path], which: str) -> tuple[list[Group], list[Skipped]]:
    """The finished runs in groups, those on one data set together; and those that are left out."""
    sources, skipped = find_sources(paths)
    groups: list[list[Run]] = []
    for source in sources:
        try:
            run = read_run(source, which)
        except DAMAGED as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
            skipped.append(Skipped(source, reason))
            continue
        of_setting = [group for group in groups if all(is_same_setting(run, other) for other in group)]
        if not of_setting:
            groups.append([run])
            continue
        used = [other for other in of_setting[0] if other.seed == run.seed]
        if not used:
            of_setting[0].append(run)
            continue
        reason = f"the same flags and seed as {used[0].source.name}, which is used"
        if others := other_splits(run, used[0]):
            reason += f", but with other {', '.join(others)} images"
        skipped.append(Skipped(source, reason, is_duplicate=True))
    return name_groups(groups), skipped


def name_groups(groups: list[list[Run]]) -> list[Group]:
    """Runs of one setting each, as groups; data sets of one name with several test splits get their record's words."""
    named = []
    for runs in groups:
        first = runs[0]
        on_data = [other for other, *_ in groups if other.data == first.data]
        together = [other for other in on_data if test_split(other) == test_split(first)]
        data = first.data if together == on_data else f"{first.data} ({test_split(first)})"
        common = [change for change in first.changes if all(change in other.changes for other in together)]

        setting = nearest_setting(first)
        added = [change for change in first.changes if change.name not in setting.flags or change.epoch is not None]
        words = sorted(change_text(change) for change in added if change not in common)
        for other in together:  # which may differ in its training images alone
            if (other.network, other.methods, other.changes) == (first.network, first.methods, first.changes):
                words += [
                    f"{name} {text}" for name, text in first.images.items() if other.images.get(name, text) != text
                ]
        label = ", ".join(dict.fromkeys([setting.name.replace("_", " "), *words]))
        runs = sorted(runs, key=lambda run: run.seed)
        named.append(Group(runs, setting, printable(label), data, common))
    return sorted(named, key=lambda g: (g.data, len(g.runs[0].methods), "+".join(g.runs[0].methods), g.label))


def test_split(run: Run) -> str:
    return ", ".join(f"{name} {text}" for name, text in run.images.items() if name.startswith("test "))


def study_settings() -> list[Setting]:
    settings = []
    for name, words, text in SETTINGS:
        flags = {}
        for part in text.split("--")[1:]:
            flag, *value = part.split()
            flags[flag] = json.loads(*value) if value else True
        settings.append(Setting(name, words, flags))
    return settings


def nearest_setting(run: Run) -> Setting:
    """Of the settings with the run's methods, the one that has most of its other flags."""
    fitting = []
    for setting in study_settings():
        methods = tuple(method for method in METHODS if method in setting.flags)
        if methods == run.methods and setting.flags.items() <= run.flags.items():
            fitting.append(setting)
    return max(fitting, key=lambda setting: len(setting.flags))
