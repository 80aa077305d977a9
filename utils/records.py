"""What a run is, as types: written by training, stored in the checkpoint, exported to JSON, read back by evaluation,
tables and figures. Needs neither torch nor the rest of the program.

RunRecord                 a run: flags, images, starts, changes, epochs, test split
  DataRecord              which images: classes, normalisation, and of each split its SplitRecord
  Start, Change           where the command ran; what differed on resume
  EpochRecord             an epoch: a line of metrics.jsonl
  TestRecord              the last or best epoch's metrics on the test split, temperatures, early exit
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric is printed, and whether the console, the tables and TensorBoard show it without being asked."""

    heading: str
    unit: str
    decimals: int
    shown: bool = True


# Their formulas are in utils/metrics.py.
METRICS = {
    "top1_error": Metric("top-1 err", "%", 2),
    "top5_error": Metric("top-5 err", "%", 2),
    "nll": Metric("NLL", "nats", 4),
    "ece": Metric("ECE", "%", 2),
    "aurc": Metric("AURC", "x 1000", 2),
    "eaurc": Metric("E-AURC", "x 1000", 2),
    "augrc": Metric("AUGRC", "x 1000", 2, shown=False),
    "auroc_failure": Metric("AUROC_f", "%", 2, shown=False),
    "brier": Metric("Brier", "", 4, shown=False),
    "adaptive_ece": Metric("ad. ECE", "%", 2, shown=False),
}
SHOWN = {name: metric for name, metric in METRICS.items() if metric.shown}
AFTER_TEMPERATURE = ("nll", "ece", "brier", "adaptive_ece")  # those that a temperature changes

# Metrics by the name of a classifier that a loss trains, `exit 1`, ..., `final`; `ensemble`, the mean of their
# probabilities, where there are several.
Classifiers = dict[str, dict[str, float | None]]


class Change(NamedTuple):
    """A value that differs: a flag, or the number of processes; `epoch` is the first that was trained with it."""

    name: str
    before: object
    after: object
    epoch: int | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.after}"


def find_changes(before: dict, after: dict, defaults: dict) -> list[Change]:
    """The names, in order, under which two sets of values differ. What one of them lacks, because its program was
    younger or older, has its default; without a default it counts as off, as None, False, 0 and empty values do."""
    changes = []
    for name in sorted(before.keys() | after.keys()):
        old, new = (values.get(name, defaults.get(name)) for values in (before, after))
        is_off_in_both = not old and not new and not (name in before and name in after)
        if old != new and not is_off_in_both:
            changes.append(Change(name, old, new))
    return changes


@dataclass
class SplitRecord:
    images: int
    digest: str  # of pixels, labels and their order


@dataclass
class DataRecord:
    """Which images a run uses."""

    class_names: list[str]  # in the labels' order
    mean: list[float]  # of RGB in 0..1
    std: list[float]
    # train, val, test; with --val_split also `train_and_val`, the training images before any are held out
    splits: dict[str, SplitRecord]

    @property
    def selects_on_val(self) -> bool:
        """Whether `val` selects the model, and the test split, if there is one, is `test`; or else `val` is the test
        split."""
        return "test" in self.splits or "train_and_val" in self.splits


@dataclass
class Start:
    """A start of the command: its first epoch, and where it ran."""

    epoch: int
    python: str
    torch: str
    torchvision: str
    device_name: str
    processes: int
    git_commit: str | None = None
    resumed_from: str | None = None  # the checkpoint of another directory that the run went on from


@dataclass
class EpochRecord:
    """An epoch: a line of metrics.jsonl."""

    epoch: int  # from 0
    lr: float
    seconds: float  # of training
    images_per_second: float
    train: dict[str, float]  # loss, each of its parts, top1_error
    val: Classifiers
    seconds_validation: float = 0.0
    seconds_saving: float = 0.0  # of the save before this line was written
    alpha_t: float | None = None  # PS-KD's
    skipped_steps: int | None = None  # fp16's


@dataclass
class TestRecord:
    """What the held-out images chose for an epoch, and what the test split, where there is one, says of it."""

    epoch: int
    temperatures: dict[str, float]  # by classifier
    metrics: Classifiers | None = None
    calibrated: Classifiers | None = None  # after temperature scaling
    early_exit: dict | None = None


@dataclass
class RunRecord:
    args: dict  # every flag
    data: DataRecord
    starts: list[Start] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    history: list[EpochRecord] = field(default_factory=list)
    test: dict[str, TestRecord] | None = None  # `last`, `best`; of a finished run with --val_split
    finished: bool = False

    @property
    def trained(self) -> list[str]:
        """The names of the classifiers that a loss trains, shallow to deep."""
        return [name for name in self.history[-1].val if name != "ensemble"]


def to_json(value):
    """A record as dicts, lists and plain values. Fields that are None are left out, since None is their default."""
    if isinstance(value, float | int | str):  # nearly all are, and are converted anew at every save
        return value
    if isinstance(value, Change):
        return value._asdict()
    if dataclasses.is_dataclass(value):
        return {name: to_json(entry) for name, entry in vars(value).items() if entry is not None}
    if isinstance(value, dict):
        return {name: to_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return value


_type_hints = functools.cache(typing.get_type_hints)  # of a record, looked up for every epoch


def from_json(kind, value):
    """The inverse of `to_json`: `kind` is the type of a record or of one of its fields.

    Raises:
        TypeError: an entry is missing, unknown or of another type.
    """
    if isinstance(kind, types.UnionType):  # X | None
        first, _ = typing.get_args(kind)
        return None if value is None else from_json(first, value)
    container, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    is_record = dataclasses.is_dataclass(kind) or kind is Change
    expected = dict if is_record else (int, float) if kind is float else container
    if not isinstance(value, expected):
        raise TypeError(f"{value!r} in place of a {container.__name__}")
    if is_record:
        hints = _type_hints(kind)
        return kind(**{name: from_json(hints.get(name, object), entry) for name, entry in value.items()})
    if container is dict and inner:
        return {name: from_json(inner[1], entry) for name, entry in value.items()}
    if container is list and inner:
        return [from_json(inner[0], entry) for entry in value]
    return value


def classifier_names(num: int) -> list[str]:
    """Of `num` classifiers, shallow to deep: `exit 1`, `exit 2`, ..., `final`."""
    return [*(f"exit {i}" for i in range(1, num)), "final"]


def best_epoch(history: list[EpochRecord]) -> EpochRecord:
    """The epoch of lowest top-1 error of the final classifier, the earliest where several tie."""
    return min(history, key=lambda record: record.val["final"]["top1_error"])


def shown_metrics(values: dict) -> dict:
    """Entries without the metrics that are not shown by default."""
    return {name: value for name, value in values.items() if name in SHOWN or name not in METRICS}


def results_table(blocks: dict[str, Classifiers]) -> str:
    """A row for each classifier of each block, below the block's title."""
    lines = []

    def add(label: str, cells: Iterable[str] = ()) -> None:
        lines.append(f"{label:14}" + "".join(f" {cell:>10}" for cell in cells))

    add("", (metric.heading for metric in SHOWN.values()))
    add("", (metric.unit for metric in SHOWN.values()))
    for title, classifiers in blocks.items():
        add(title)
        for name, metrics in classifiers.items():
            add(f"  {name}", (f"{metrics[key]:.{m.decimals}f}" if key in metrics else "-" for key, m in SHOWN.items()))
    return "\n".join(lines)


def early_exit_line(early_exit: dict) -> str:
    """What early exit costs and errs at the chosen threshold; on the held-out images where there is no test split."""
    chosen = early_exit["chosen"]
    accuracy = chosen.get("accuracy", chosen["heldout_accuracy"])
    multiply_adds = chosen.get("multiply_adds", chosen["heldout_multiply_adds"])
    share = 100 * multiply_adds / early_exit["backbone_multiply_adds"]
    error = f"top-1 err {100 - accuracy:.2f} % with {share:.0f} % of the backbone's MACs (multiply-adds)"
    return f"early exit at confidence {chosen['threshold']:.2f}, chosen on held-out images: {error}"
