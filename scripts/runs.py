"""Runs as tables and figures use them: read from directories or exported lines, checked, and grouped over seeds."""

import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from paper import ROOT

sys.path.insert(0, str(ROOT))
from loss import METHODS
from main import RUNTIME_FLAGS, default_args
from utils.errors import printable
from utils.machine import ENVIRONMENT
from utils.metrics import METRICS
from utils.records import classifiers


class Column(NamedTuple):
    """How a number of a run is printed."""

    heading: str
    decimals: int


# Every number that a table may show. T: each classifier's temperature, p: its norm, both fitted on held-out images.
COLUMNS = {key: Column(f"{m.heading} ({m.unit})".removesuffix(" ()"), m.decimals) for key, m in METRICS.items()}
COLUMNS |= {
    "nll_after_T": Column("NLL after T (nats)", 4),
    "ece_after_T": Column("ECE after T (%)", 2),
    "brier_after_T": Column("Brier after T", 4),
    "adaptive_ece_after_T": Column("ad. ECE after T (%)", 2),
    "augrc_pnorm": Column("AUGRC of pNorm (x 1000)", 2),
    "pnorm_p": Column("p of pNorm", 1),
    "exit 1": Column("exit 1 err (%)", 2),
    "exit 2": Column("exit 2 err (%)", 2),
    "exit 3": Column("exit 3 err (%)", 2),
    "final": Column("final err (%)", 2),
    "ensemble": Column("ensemble err (%)", 2),
    "early_exit": Column("early exit (% MACs)", 1),  # for the final accuracy less 0.5 points; 100 is the backbone
    "seconds_per_epoch": Column("s/epoch", 1),
    "hours": Column("hours", 2),
}
OF_PNORM = ("augrc_pnorm", "pnorm_p")
TIMES = ("seconds_per_epoch", "hours")

DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError)

LIMITS = ("classes", "limit_train", "limit_val")  # flags that make a data set smaller
# Entries of config.json that have no value in the paper's setting; network and methods vary within its tables.
NOT_COMPARED = {*RUNTIME_FLAGS, *ENVIRONMENT, *METHODS, *LIMITS, "data_type", "classifier_type", "seed"}
NOT_COMPARED |= {"data", "starts", "changes"}


class Run(NamedTuple):
    name: str  # the path of its directory, or file:line
    config: dict
    results: dict
    flags: dict  # config, and the defaults of flags that are newer than the run
    seed: int
    methods: tuple[str, ...]
    non_paper_flags: frozenset[str]  # from the paper's setting, such as "width 8"
    data: str  # the data set, such as "cifar100, classes 20"
    images: dict[str, str]  # what its record says of them and all seeds share, such as "test digest": "0a1b"
    machines: frozenset[str]  # of all its starts
    environments: frozenset[str]  # the same with version and commit
    values: dict[str, float]  # column -> number, of the final classifier
    classifiers: dict[str, dict]  # "exit 1", ..., "final", "ensemble", if trained -> column -> number
    label: str = ""  # the methods, and the non_paper_flags that are not common to all runs on the same data

    @property
    def network(self) -> str:
        return self.flags["classifier_type"]


def paper_flags() -> dict:
    """The paper's setting: main.py's defaults. They are not checked, so that no device is asked for memory."""
    return vars(default_args()) | {"precision": "fp32", "lr_decay_schedule": [150, 225]}


def find_runs(paths: list[Path]) -> dict[str, Path | str]:
    """Name -> run directory (a path or below it) or line of a .jsonl file; sorted, each once."""
    sources = {}
    for path in paths:
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            sources |= {f"{path}:{number}": line for number, line in enumerate(lines, 1)}
        sources |= {os.path.relpath(file.parent): file.parent for file in path.rglob("config.json")}
    return dict(sorted(sources.items()))


def read_run(name: str, source: Path | str, which: str, paper: dict) -> Run:
    """The `last` or `best` epoch of a run, given its directory or a line that --export wrote, and the paper's flags.

    Raises:
        One of DAMAGED: the run is unfinished, damaged or cannot be read.
    """
    if isinstance(source, Path):
        config = json.loads((source / "config.json").read_text())
        results = json.loads((source / "results.json").read_text())
    else:
        line = json.loads(source)
        config, results = {"run_name": line.get("name", name), **line["config"]}, line["results"]
    if results["status"] != "finished":
        raise ValueError(f"{results['status']}, {results['epochs']} of {config['end_epoch']} epochs")
    flags = {**paper, **config}
    if type(flags["seed"]) is not int:
        raise ValueError(f"seed is {flags['seed']!r}")

    # Without held-out images, validation is the test split.
    has_held_out = bool(flags["val_split"])
    data = ", ".join([flags["data_type"], *(f"{limit} {flags[limit]}" for limit in LIMITS if flags[limit])])
    record = results[which]
    if has_held_out and results.get("test"):
        record = results["test"][which]
    elif has_held_out:
        data += ", no test split: held-out images"
    found = classifier_values(record)
    values = found["final"] | {key: number(key, results[key]) for key in TIMES if key in results}
    values |= {classifier: metrics["top1_error"] for classifier, metrics in found.items()}
    early_exit = record.get("early_exit")
    if early_exit:
        share = early_exit["chosen"]["multiply_adds"] / early_exit["backbone_multiply_adds"]
        values["early_exit"] = number("early_exit", 100 * share)

    starts = config.get("starts", [config])
    return Run(
        name=name,
        config=config,
        results=results,
        flags=flags,
        seed=flags["seed"],
        methods=tuple(method for method in METHODS if flags[method]),
        non_paper_flags=find_non_paper_flags(config, starts, paper),
        data=data,
        images=image_facts(config.get("data", {}), has_held_out),
        machines=frozenset(start["device_name"] for start in starts),
        environments=frozenset(
            f"{start['device_name']}, torch {start.get('torch')}, commit {start.get('git_commit')}" for start in starts
        ),
        values=values,
        classifiers=found,
    )


def classifier_values(record: dict) -> dict[str, dict]:
    """`exit 1`, ..., `final`, `ensemble`, if trained -> column -> number, of a line of metrics.jsonl or a block of the
    test split.

    Raises:
        ValueError: a metric is not a finite number.
    """
    calibrated = classifiers(record["calibrated"]) if record.get("calibrated") else {}
    found = {}
    for classifier, metrics in classifiers(record).items():
        fitted = calibrated.get(classifier, {})
        values = metrics | {key if key in OF_PNORM else f"{key}_after_T": value for key, value in fitted.items()}
        found[classifier] = {}
        for key, value in values.items():
            if key == "auroc_failure" and value is None:  # where all predictions are right, or all wrong
                continue
            if key in COLUMNS:
                found[classifier][key] = number(key, value)
    return found


def number(name: str, value) -> float:
    """The value; ValueError where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}")
    return value


def find_non_paper_flags(config: dict, starts: list[dict], paper: dict) -> frozenset[str]:
    """In what a run is not the paper's: flags, flags that changed on resume, and several processes, because
    BatchNorm is per process."""
    environment = {key for start in config.get("starts", ()) for key in start} - paper.keys()
    flags = {**paper, **config}
    found = []
    for key in flags.keys() - NOT_COMPARED - environment:
        if (key, flags[key]) not in paper.items():
            found.append(f"{key} {flags[key]}")
    for change in config.get("changes", ()):
        what = f"{change['name']} {change['before']} -> {change['after']}"
        found.append(f"changed {what} after epoch {change['epoch']}")
    processes = sorted({start.get("processes", 1) for start in starts})
    if processes != [1]:
        found.append(f"processes {' and '.join(map(str, processes))}")
    return frozenset(found)


def image_facts(data: dict, has_held_out: bool) -> dict[str, str]:
    """What a data record (data/__init__.py) says of a run's images, by name, without what the seed draws: which of
    the training images are held out, and the means measured on the others."""
    facts = {}
    if not has_held_out:
        for key in ("mean", "std"):
            if key in data:
                facts[key] = " ".join(f"{value:.6g}" for value in data[key])
    if "splits" not in data:
        return facts | {"test images": "not recorded"}
    for name, split in data["splits"].items():
        name = "test" if name == "val" and not has_held_out else name
        facts[f"{name} images"] = str(split["images"])
        if name == "test" or not has_held_out:
            facts[f"{name} digest"] = split["digest"][:12]
    return facts


def other_images(run: Run, other: Run) -> list[str]:
    """The names of what two data records of one seed differ in."""
    first, second = (r.config.get("data", {}).get("splits", {}) for r in (run, other))
    return [f"{name} images" for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]


def group_runs(sources: dict[str, Path | str], which: str) -> tuple[list[list[Run]], list[str]]:
    """Runs with the same defining flags on the same images, one per seed, in order; a line for each run left out, and
    why. Groups on one data set, with one `data`, stand together."""
    paper = paper_flags()
    settings, left_out = {}, []
    for name, source in sources.items():
        try:
            run = read_run(name, source, which, paper)
            setting = (run.data, run.network, run.methods, run.non_paper_flags, tuple(run.images.items()))
            group = settings.setdefault(setting, {})
            used = group.setdefault(run.seed, run)
            if used is not run:
                others = other_images(run, used)
                but = f", but with other {', '.join(others)}" if others else ""
                raise ValueError(f"the same flags and seed as {used.name}, which is used{but}")
        except DAMAGED as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else error
            left_out.append(f"{name} ({reason})")
    groups = [[group[seed] for seed in sorted(group)] for group in settings.values() if group]
    groups = name_groups(groups)
    return sorted(groups, key=lambda group: (group[0].data, len(group[0].methods), group[0].label)), left_out


def name_groups(groups: list[list[Run]]) -> list[list[Run]]:
    """Give runs their `label`, and to `data` the test split's record where data sets of one name have several."""
    test_splits = {}
    for run, *_ in groups:
        test_splits.setdefault(run.data, set()).add(test_split(run))
    for i, group in enumerate(groups):
        if len(test_splits[group[0].data]) > 1:
            data = f"{group[0].data} ({test_split(group[0])})"
            groups[i] = [run._replace(data=data) for run in group]

    named = []
    for group in groups:
        run = group[0]
        together = [other for other, *_ in groups if other.data == run.data]
        common = frozenset.intersection(*(other.non_paper_flags for other in together))
        words = ["+".join(run.methods) or "baseline", *sorted(run.non_paper_flags - common)]
        # Groups that differ in their training images alone.
        flags = (run.network, run.methods, run.non_paper_flags)
        twins = [other for other in together if (other.network, other.methods, other.non_paper_flags) == flags]
        for key, value in run.images.items():
            if any(twin.images.get(key) != value for twin in twins):
                words.append(f"{key} {value}")
        named.append([run._replace(label=printable(", ".join(words))) for run in group])
    return named


def test_split(run: Run) -> str:
    return ", ".join(f"{key} {value}" for key, value in run.images.items() if key.startswith("test "))
