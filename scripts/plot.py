#!/usr/bin/env python
"""Figures of runs, as files to print: curves and points are means over seeds, with one standard deviation.

usage: scripts/plot.py [RUNS...] [--out DIR] [--format png pdf]

  reliability      accuracy against confidence, a panel for each group of runs
  risk_coverage    error among the most confident images against the share of images that they are
  learning_curves  validation top-1 error and NLL after each epoch
  exits            accuracy of each exit, of the final classifier and of their ensemble
  error_time       top-1 error against seconds of training an epoch, with the paper's points

Runs are grouped over seeds as summarize.py groups them; each network has a panel. The first two figures need
predictions.npz, which main.py writes with --save_predictions. All but the curves is of the last epoch, and of the
validation split, which is the test split; of runs with --val_split, the last two figures are of the test split.
"""

import argparse
import json
import statistics
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import NamedTuple

from run_table import METHODS, PUBLISHED, ROOT, table_rows
from summarize import OPTIONS, Run, find_runs, group_runs, listing

sys.path.insert(0, str(ROOT))
try:
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    import torch
    from matplotlib import pyplot as plt

    from utils.metrics import confidence_and_wrong, reliability, risk_coverage_curve
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"{error.name} is missing: pip install -r requirements.txt -r scripts/requirements.txt")

# Combinations of methods in the order of the paper's Table 1, each with a look of its own everywhere: Okabe and
# Ito's colours, their yellow, too pale on paper, replaced by grey.
COMBINATIONS = ["+".join(row["methods"]) or "baseline" for row in table_rows(1)[:8]]
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#777777")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (8, 3)))
MARKERS = "os^DvPX*"
PANEL = 3.0  # inches
RC = {
    "font.size": 8, "axes.titlesize": 9, "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False,
    "figure.constrained_layout.use": True, "savefig.dpi": 200,
    "pdf.fonttype": 42, "ps.fonttype": 42,  # TrueType, which every publisher can embed
}  # fmt: skip


class Prediction(NamedTuple):
    """One run's, of its M validation images: probability of the predicted class, and 1 where it is wrong, (M,)."""

    confidence: torch.Tensor
    wrong: torch.Tensor


class Group(NamedTuple):
    """Runs that differ in the seed alone."""

    runs: list[Run]
    panel: str  # the network, and what else is not of the methods and differs
    label: str  # what tells it from the panel's other groups
    look: dict  # of a line: color, linestyle, marker
    predictions: dict[str, Prediction]  # by name, of those runs that have them


def name_groups(found: list[list[Run]]) -> list[Group]:
    """The groups in the order of Table 1. Methods and their options tell a panel's groups apart; networks, data
    sets and whatever else differs have panels of their own."""
    found = sorted(found, key=lambda runs: (runs[0].flags["classifier_type"], place(runs)))
    flags = [runs[0].flags for runs in found]
    differing = {key for key in set().union(*flags) if len({own.get(key) for own in flags}) > 1}
    options = differing & {"num_resnet_blocks", *(option for of_method in OPTIONS.values() for option in of_method)}
    setting = differing - options - {*METHODS, "classifier_type"}
    named = []
    for runs, own in zip(found, flags, strict=True):
        panel = "\n".join([own["classifier_type"], *textwrap.wrap(listing(own, setting), 38)])
        label = COMBINATIONS[place(runs)]
        label += f" ({more})" if (more := listing(own, options)) else ""
        predictions = {run.name: prediction for run in runs if (prediction := read_prediction(run))}
        named.append(Group(runs, panel, label, {}, predictions))
    named.sort(key=lambda group: group.panel)  # stable: in a panel the order stays
    labels = list(dict.fromkeys(group.label for group in named))
    looks = COMBINATIONS if set(labels) <= set(COMBINATIONS) else labels  # a label looks the same in every panel
    return [group._replace(look=look(looks.index(group.label))) for group in named]


def place(runs: list[Run]) -> int:
    """Of the runs' methods among COMBINATIONS."""
    return COMBINATIONS.index("+".join(m for m in METHODS if runs[0].flags.get(m)) or "baseline")


def look(i: int) -> dict:
    i %= len(COLOURS)
    return {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i]}


def read_prediction(run: Run) -> Prediction | None:
    """None where the run kept none, or the file is damaged."""
    try:
        with np.load(Path(run.name, "predictions.npz")) as file:
            return Prediction(*confidence_and_wrong(torch.from_numpy(file["logits"]), torch.from_numpy(file["labels"])))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def read_history(run: Run) -> list[dict]:
    """The final classifier's metrics on the validation split after each epoch; without them, the end."""
    path = Path(run.name, "metrics.jsonl")
    try:
        return [json.loads(line)["val"] for line in path.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {path} cannot be read: {error}")


def mean_sd(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 with one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def band(axis, x, curves: np.ndarray, group: Group) -> None:
    """The mean of curves (n, len(x)) and, where there are several, a band of one standard deviation."""
    mean, apart = curves.mean(axis=0), max(1, len(x) // 6)
    first = COLOURS.index(group.look["color"]) * apart // len(COLOURS)  # so that no curve's marks hide another's
    axis.plot(x, mean, label=group.label, markevery=(first, apart), **group.look)
    if len(curves) > 1:
        sd = curves.std(axis=0, ddof=1)
        axis.fill_between(x, mean - sd, mean + sd, color=group.look["color"], alpha=0.18, linewidth=0)


def points(axis, x, y, group: Group, x_sd=None, y_sd=None, **more) -> None:
    """Marks, joined by the group's line, and bars of one standard deviation where there are several seeds."""
    axis.plot(x, y, **{**group.look, **more})
    if len(group.runs) > 1:
        axis.errorbar(x, y, y_sd, x_sd, fmt="none", ecolor=group.look["color"], elinewidth=0.8, capsize=2)


def panels(groups: list[Group], rows: int = 1):
    """(figure, name -> its column of axes (rows,)): a column for each panel, its name above."""
    names = list(dict.fromkeys(group.panel for group in groups))
    size = (max(4.2, 1.15 * PANEL * len(names)), PANEL * rows)
    figure, axes = plt.subplots(rows, len(names), figsize=size, squeeze=False, sharex="col", sharey="row")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=8)
    return figure, dict(zip(names, axes.T, strict=True))


def legend(figure, axes) -> None:
    """One for all axes, below them, an entry a label."""
    entries = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    most = max(1, int(figure.get_figwidth() / (0.65 + 0.065 * max(map(len, entries)))))
    rows = -(-len(entries) // most)
    options = {"loc": "outside lower center", "ncols": -(-len(entries) // rows), "handlelength": 3.2}
    figure.legend(entries.values(), entries.keys(), **options)


def plot_reliability(groups: list[Group]):
    """Accuracy in ten bins of confidence, over the images of all seeds, and below it the share of images."""
    groups = [group for group in groups if group.predictions]
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = plt.figure(figsize=(max(4.2, 0.75 * PANEL * columns), PANEL * rows))
    cells = figure.subfigures(rows, columns, squeeze=False).ravel()
    several_panels = len({group.panel for group in groups}) > 1
    for i, group in enumerate(groups):
        upper, lower = cells[i].subplots(2, 1, sharex=True, height_ratios=[3, 1])
        sums = [torch.stack(reliability(*prediction)).numpy() for prediction in group.predictions.values()]
        samples, confidence, right = np.sum(sums, axis=0)
        left = 100 * np.arange(len(samples)) / len(samples)
        bars = {"width": 100 / len(samples), "align": "edge", "edgecolor": "black", "linewidth": 0.5}
        some = samples > 0
        accuracy, sure = 100 * right[some] / samples[some], 100 * confidence[some] / samples[some]
        upper.bar(left[some], accuracy, color=COLOURS[2], label="accuracy", **bars)
        hatched = {**bars, "edgecolor": COLOURS[5], "facecolor": "none", "hatch": "/////"}
        low = np.minimum(accuracy, sure)
        upper.bar(left[some], abs(accuracy - sure), bottom=low, label="gap to the mean confidence", **hatched)
        upper.plot([0, 100], [0, 100], "k--", linewidth=0.8, label="perfect calibration")
        ece, sd = mean_sd([100 * np.abs(r - c).sum() / n.sum() for n, c, r in sums])
        name = f"{group.panel}\n{group.label}" if several_panels else group.label
        spread = f"{ece:.2f} ± {sd:.2f} %, {len(sums)} seeds" if len(sums) > 1 else f"{ece:.2f} %"
        upper.set_title(f"{name}\nECE {spread}", fontsize=8)
        tens = range(0, 101, 25)
        upper.set(xlim=(0, 100), ylim=(0, 100), xticks=tens, yticks=tens)
        lower.bar(left, 100 * samples / samples.sum(), color="#bbbbbb", **bars)
        lower.set(ylim=(0, 100), yticks=(0, 50, 100), xlabel="confidence (%)")
        if i % columns == 0:
            upper.set_ylabel("accuracy (%)")
            lower.set_ylabel("images (%)")
    legend(figure, [upper])
    return figure


def plot_risk_coverage(groups: list[Group]):
    groups = [group for group in groups if group.predictions]
    figure, columns = panels(groups)
    top = 0.1
    for group in groups:
        curves = 100 * np.stack([risk_coverage_curve(*prediction).numpy() for prediction in group.predictions.values()])
        images = curves.shape[1]
        # Among a handful of images the error jumps; the curve starts where there are enough to speak of.
        first = min(max(images // 100, 20), images) - 1
        which = np.unique(np.linspace(first, images - 1, 400).astype(int))
        band(columns[group.panel][0], 100 * (which + 1) / images, curves[:, which], group)
        top = max(top, curves[:, which].max())
    for (axis,) in columns.values():
        axis.set(xlim=(0, 100), ylim=(0, 1.05 * top), xlabel="coverage (%), most confident images first")
    figure.axes[0].set_ylabel("error among them (%)")
    legend(figure, figure.axes)
    return figure


def plot_learning_curves(groups: list[Group]):
    figure, columns = panels(groups, rows=2)
    for group in groups:
        histories = [read_history(run) for run in group.runs]
        epochs = range(1, min(map(len, histories)) + 1)
        for axis, metric in zip(columns[group.panel], ("top1_error", "nll"), strict=True):
            curves = [[val[metric] for val in history[: len(epochs)]] for history in histories]
            band(axis, epochs, np.array(curves), group)
    for _, bottom in columns.values():
        bottom.set_xlabel("epoch")
        bottom.xaxis.get_major_locator().set_params(integer=True)
    first = next(iter(columns.values()))
    first[0].set_ylabel("validation top-1 error (%)")
    first[1].set_ylabel("validation NLL (nats)")
    legend(figure, figure.axes)
    return figure


def plot_exits(groups: list[Group]):
    """Depth is the share of the backbone's blocks that a classifier has before it; the ensemble stands apart."""
    figure, columns = panels(groups)
    ticks = {1.25: "ensemble"}
    for i, group in enumerate(groups):
        blocks = group.runs[0].flags["num_resnet_blocks"]
        names = {k / blocks: f"{k}/{blocks}" for k in range(1, blocks + 1)}
        ticks |= names
        values = {x: [run.values.get(name) for run in group.runs] for x, name in {**names, 1.25: "ensemble"}.items()}
        stats = {x: mean_sd(accuracies) for x, accuracies in values.items() if None not in accuracies}
        beside = 0.006 * (i % 8 - 3.5)  # so that no mark hides another
        (axis,) = columns[group.panel]
        for label, part in ((group.label, [x for x in stats if x <= 1]), (None, [x for x in stats if x > 1])):
            if part:
                mean, sd = zip(*(stats[x] for x in part), strict=True)
                points(axis, [x + beside for x in part], mean, group, y_sd=sd, label=label)
    for (axis,) in columns.values():
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set_xlabel("classifier after this part of the backbone")
    figure.axes[0].set_ylabel("top-1 accuracy (%)")
    legend(figure, figure.axes)
    return figure


def plot_error_time(groups: list[Group]):
    """The paper's Figure 2; its points are of CIFAR-100 and stand in panels of CIFAR-100 only."""
    figure, columns = panels(groups)
    marks = {"markersize": 6, "linestyle": "none"}
    for group in groups:
        error, error_sd = mean_sd([run.values["top1_error"] for run in group.runs])
        seconds, seconds_sd = mean_sd([run.values["seconds_per_epoch"] for run in group.runs])
        points(columns[group.panel][0], seconds, error, group, seconds_sd, error_sd, label=group.label, **marks)
    of_cifar = {
        g.panel: g.runs[0].flags["classifier_type"] for g in groups if g.runs[0].flags["data_type"] == "cifar100"
    }
    hollow = {"markerfacecolor": "none", **marks}
    for panel, network in of_cifar.items():
        for row in PUBLISHED["table1"]["rows"]:
            if row["model"] == network:
                own = look(COMBINATIONS.index("+".join(row["methods"]) or "baseline"))
                columns[panel][0].plot(row["seconds_per_epoch"], row["top1_error"], **{**own, **hollow})
    for (axis,) in columns.values():
        axis.set_xlim(0, 1.08 * axis.get_xlim()[1])
        axis.set_xlabel("training time (s / epoch)")
    title = f"on {'; '.join(dict.fromkeys(run.hardware for group in groups for run in group.runs))}"
    if of_cifar:
        columns[next(iter(of_cifar))][0].plot([], [], color="#777777", marker="o", label="hollow: published", **hollow)
        title += "; published: CIFAR-100, 300 epochs, the best of them, on an unnamed GPU"
    figure.suptitle(title, fontsize=8)
    figure.axes[0].set_ylabel("top-1 error (%)")
    legend(figure, figure.axes)
    return figure


FIGURES = {
    "reliability": plot_reliability,
    "risk_coverage": plot_risk_coverage,
    "learning_curves": plot_learning_curves,
    "exits": plot_exits,
    "error_time": plot_error_time,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n")[3])
    runs = parser.add_argument("runs", nargs="*", type=Path, default=[ROOT / "experiments"], metavar="RUNS")
    runs.help = "run directories, or directories that hold some (default: the repository's experiments)"
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--format", nargs="+", choices=("png", "pdf"), default=["png", "pdf"])
    args = parser.parse_args(argv)
    if missing := [path for path in args.runs if not path.is_dir()]:
        parser.error(f"{missing[0]}: no such directory")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    found, left_out = group_runs(find_runs(args.runs), "last")
    for line in left_out:
        print(f"left out: {line}")
    if not found:
        print(f"error: no finished run in {', '.join(map(str, args.runs))}", file=sys.stderr)
        return 1
    groups = name_groups(found)
    lacking = [Path(run.name).name for group in groups for run in group.runs if run.name not in group.predictions]
    if lacking:
        print(f"not in reliability and risk_coverage, for want of a predictions.npz: {', '.join(lacking)}")
    with matplotlib.rc_context(RC):
        for name, plot in FIGURES.items():
            if name in ("reliability", "risk_coverage") and not any(group.predictions for group in groups):
                continue
            figure = plot(groups)
            for kind in args.format:
                dated = {"CreationDate": None} if kind == "pdf" else {}  # the same runs give the same file
                figure.savefig(args.out / f"{name}.{kind}", metadata=dated)
                print(f"written: {args.out / f'{name}.{kind}'}")
            plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
