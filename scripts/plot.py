#!/usr/bin/env python
"""Figures of runs for print: means over seeds with one standard deviation, as PNG and PDF.

  error_against_ranking  top-1 error against AUGRC, and against NLL after temperature scaling (needs --val_split), with
                         95 % intervals of the differences from the baseline, as summarize.py --pairs prints them
  reliability            accuracy against confidence (needs --save_predictions)
  risk_coverage          error among the most confident images against coverage (needs --save_predictions)
  learning_curves        validation top-1 error per epoch
  exits                  top-1 accuracy of each exit, of the final classifier and of the ensemble
  early_exit             top-1 accuracy against MACs (multiply-adds) in % of the backbone's (needs trained exits and
                         --val_split)

All but the learning curves are of the last epoch. Reliability, risk and learning curves are of the validation split,
which without --val_split is the test split, and need run directories; the others are of the test split, and study files
(.jsonl) have them too. Runs that differ only in the seed are one group, and have the label that summarize.py gives
them; each network and data set has a panel.
"""

import argparse
import json
import signal
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
from intervals import pair_runs, paired_intervals
from paper import ROOT
from runs import DAMAGED, Run, find_runs, group_runs

from utils import figures
from utils.errors import UserError, print_error, printable, run_command
from utils.metrics import confidence_and_error
from utils.parser import Parser, path_type

BASE = "baseline"  # its label; black, solid and thick in all figures
# Nine colours, so that the ten settings of a study have one each: Paul Tol's "muted" scheme, distinguishable by the
# colour-blind; orange replaces its sand, too pale on paper. With ten lines or eight markers, 72 groups differ.
COLOURS = ("#332288", "#cc6677", "#44aa99", "#882255", "#88ccee", "#999933", "#aa4499", "#117733", "#ee7733")
DASHES = (
    (5, 1.5), (1, 1), (6, 1, 1, 1), (3, 3), (6, 1, 1, 1, 1, 1), (10, 2), (2, 1), (8, 1, 3, 1), (1, 3), (4, 1, 4, 3)
)  # fmt: skip
MARKERS = "sD^vPX<>"
# In figures of all classifiers the markers say which one it is.
CLASSIFIERS = {"exit 1": "o", "exit 2": "o", "exit 3": "o", "final": "D", "ensemble": "*"}
FINAL = 3  # its place there
TITLE_WIDTH = 34  # characters that fit above a panel
MARKER_SIZES = {"o": 4, "D": 4, "*": 8}


def reliability(axis, runs: list[Run], **line) -> None:
    figures.reliability_diagram(axis, [read_predictions(run) for run in runs], **line)


def risk_coverage(axis, runs: list[Run], **line) -> None:
    figures.risk_coverage(axis, [read_predictions(run) for run in runs], **line)


def read_predictions(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence of each validation image's prediction, and 1 where it is wrong: (M,) each."""
    path = run_directory(run) / "predictions.npz"
    if not path.exists():
        raise ValueError("needs --save_predictions")
    with np.load(path) as file:
        return confidence_and_error(torch.from_numpy(file["logits"]), torch.from_numpy(file["labels"]))


def run_directory(run: Run) -> Path:
    """Raises ValueError for a run of a study file."""
    path = Path(run.name)
    if not path.is_dir():
        raise ValueError("needs the run directory: a study file has neither epochs nor predictions")
    return path


def learning_curves(axis, runs: list[Run], **line) -> None:
    errors = []
    for run in runs:
        lines = (run_directory(run) / "metrics.jsonl").read_text().splitlines()
        errors.append([json.loads(line)["val"]["top1_error"] for line in lines])
    figures.mean_band(axis, range(1, len(errors[0]) + 1), np.array(errors), **line)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel="validation top-1 error (%)")


def accuracies(runs: list[Run]) -> np.ndarray:
    """Top-1 accuracy in %, (runs, CLASSIFIERS); NaN where there is none."""
    return np.array([[100 - run.values.get(name, np.nan) for name in CLASSIFIERS] for run in runs])


def exits(axis, runs: list[Run], **line) -> None:
    mean, sd = figures.mean_sd(accuracies(runs))
    number = len(axis.containers)
    side = -1 if number % 2 else 1
    shift = side * 0.03 * ((number + 1) // 2)  # so that the groups' error bars stand side by side
    position = np.arange(len(mean)) + shift
    is_trained = ~np.isnan(mean)
    line["marker"] = ""
    by_depth = is_trained & (np.arange(len(mean)) <= FINAL)
    axis.errorbar(position[by_depth], mean[by_depth], sd[by_depth], **line)
    axis.errorbar(position[-1], mean[-1], sd[-1], color=line["color"])
    mark_classifiers(axis, position, mean, line["color"])
    axis.set_xticks(range(len(mean)), CLASSIFIERS)
    axis.set(xlabel="classifier, from shallow to deep", ylabel="top-1 accuracy (%)")


def mark_classifiers(axis, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """A marker for each classifier, at x and y (CLASSIFIERS,)."""
    for i, marker in enumerate(CLASSIFIERS.values()):
        axis.plot(x[i], y[i], marker=marker, markersize=MARKER_SIZES[marker], color=colour, linestyle="")


def early_exit(axis, runs: list[Run], **line) -> None:
    text = [
        "MACs (multiply-adds) per image, % of the backbone's",
        "circles, diamonds, stars: all images at that classifier",
        "crosses: the threshold chosen on held-out images",
    ]
    axis.set(xlabel="\n".join(text), ylabel="top-1 accuracy (%)")
    results = [run.results.get("test", {}).get("last", {}).get("early_exit") for run in runs]
    if None in results:
        if runs[0].label != BASE:
            raise ValueError("no trained exits, or no --val_split")
        axis.plot(100, accuracies(runs)[:, FINAL].mean(), color="black", marker="D", linestyle="", label=line["label"])
        return
    backbone = results[0]["backbone_multiply_adds"]
    curves = []
    for result in results:
        points = sorted((point["multiply_adds"], point["accuracy"]) for point in result["curve"])
        curves.append(np.transpose(points))  # (2, thresholds)
    costs = np.unique(np.concatenate(curves, axis=1)[0])
    accuracy = np.array([np.interp(costs, *curve) for curve in curves])
    line["marker"] = ""
    figures.mean_band(axis, 100 * costs / backbone, accuracy, markevery=[], **line)
    for result in results:
        chosen = result["chosen"]
        cost = 100 * chosen["multiply_adds"] / backbone
        axis.plot(cost, chosen["accuracy"], marker="x", markersize=5, color=line["color"], linestyle="")

    *at_exits, all_exits = results[0]["multiply_adds"]
    missing = [np.nan] * (3 - len(at_exits))
    costs = np.array([*at_exits, *missing, backbone, all_exits])
    mark_classifiers(axis, 100 * costs / backbone, accuracies(runs).mean(axis=0), line["color"])


def ranking(axis, groups: list[list[Run]], key: str, title: str, styles: dict[str, dict]) -> None:
    """Means of top-1 error and of the column `key`, with 95 % intervals of the differences from the baseline."""
    means, half_widths = {}, {}
    paired, _ = pair_runs(BASE, groups)
    for column in ("top1_error", key):
        for runs in groups:
            means[column, runs[0].label] = np.mean([run.values.get(column, np.nan) for run in runs])
        having = [runs for runs in paired if all(column in run.values for run in runs)]
        differences = [[run.values[column] for run in runs] for runs in having]
        intervals = paired_intervals(differences)
        for runs, values, half_width in zip(having, differences, intervals.half_widths, strict=True):
            label = runs[0].label
            half_widths[column, label] = half_width
            # Not the mean of all its seeds, of which the baseline may lack some: the bar is the difference's.
            means[column, label] = means[column, BASE] + np.mean(values)
    for runs in groups:
        if any(key not in run.values for run in runs):
            continue
        label = runs[0].label
        x, y = means["top1_error", label], means[key, label]
        style = styles[label] | {"linestyle": "", "elinewidth": 1, "markersize": 6}
        errors = {"xerr": half_widths.get(("top1_error", label)), "yerr": half_widths.get((key, label))}
        axis.errorbar(x, y, **errors, label=wrapped(label), **style)
        if label == BASE:
            axis.axvline(x, color="black", linewidth=0.8, linestyle=":")
            axis.axhline(y, color="black", linewidth=0.8, linestyle=":")
    text = "top-1 error (%)\nbars: 95 % interval of the difference\nfrom the baseline (dotted lines)"
    axis.set(xlabel=text, ylabel=title)


def error_against_ranking(Figure, groups: list[list[Run]], styles: dict[str, dict]):
    """A row per network and data set and a panel per quantity; None where no run has one of them."""
    titles = {"augrc": "AUGRC (x 1000)", "nll_after_T": "NLL after temperature scaling (nats)"}
    groups = [runs for runs in groups if not titles.keys().isdisjoint(runs[0].values)]
    keys = [key for key in titles if any(key in runs[0].values for runs in groups)]
    if not keys:
        return None
    panels = panels_of(groups)
    figure, axes = make_figure(Figure, len(panels), len(keys), len(styles))
    for row, (title, in_panel) in zip(axes, panels.items(), strict=True):
        for axis, key in zip(row, keys, strict=True):
            axis.set_title(textwrap.fill(title, TITLE_WIDTH))
            ranking(axis, in_panel, key, titles[key], styles)
            axis.set_visible(axis.has_data())
    add_legend(figure, styles)
    return figure


def draw(Figure, draw_group, groups: list[list[Run]], styles: dict[str, dict]):
    """A figure with a panel per network and data set, or None without any data; a group of which a run lacks something
    is left out, and printed.

    draw_group: one of the functions above.
    """
    if not groups:
        return None
    panels = panels_of(groups)
    incomplete: dict[str, list[list[Run]]] = {}  # reason -> groups
    figure, (axes,) = make_figure(Figure, 1, len(panels), len(styles))
    for axis, (title, in_panel) in zip(axes, panels.items(), strict=True):
        axis.set_title(textwrap.fill(title, TITLE_WIDTH))
        for runs in in_panel:
            label = runs[0].label
            try:
                draw_group(axis, runs, label=wrapped(label), **styles[label])
            except (*DAMAGED, EOFError, zipfile.BadZipFile) as error:
                incomplete.setdefault(str(error), []).append(runs)
    for reason, without in incomplete.items():
        names = [run.name for runs in without for run in runs]
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(printable(f"left out of {draw_group.__name__}: {', '.join(names[:3])}{others} ({reason})"))
        groups = [runs for runs in groups if runs not in without]
    if incomplete:  # anew, so that every panel has something to show
        return draw(Figure, draw_group, groups, styles)
    markers = {"exits": "o", "final": "D", "ensemble": "*"} if draw_group in (exits, early_exit) else {}
    add_legend(figure, styles, markers)
    return figure


def panels_of(groups: list[list[Run]]) -> dict[str, list[list[Run]]]:
    """Title -> groups, of each network and data set; a title says only what differs between panels."""
    several_data = len({runs[0].data for runs in groups}) > 1
    panels = {}
    for runs in groups:
        title = f"{runs[0].network}, {runs[0].data}" if several_data else runs[0].network
        panels.setdefault(title, []).append(runs)
    return panels


def group_styles(groups: list[list[Run]]) -> dict[str, dict]:
    """Label -> matplotlib's keywords for its lines and markers."""
    labels = dict.fromkeys(runs[0].label for runs in groups)
    styles = {}
    if BASE in labels:
        styles[BASE] = {"color": "black", "linestyle": "-", "marker": "o", "linewidth": 2.2}
    for i, label in enumerate(label for label in labels if label != BASE):
        dashes = (0, DASHES[i % len(DASHES)])
        styles[label] = {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes, "marker": MARKERS[i % len(MARKERS)]}
    return styles


def wrapped(label: str) -> str:
    return textwrap.fill(label, 40)


def make_figure(Figure, rows: int, columns: int, num_labels: int):
    """A figure, and its axes (rows, columns); the legend below gets room of its own."""
    width = max(4.5, 3.4 * columns)
    figure = Figure(figsize=(width, 3.2 * rows + 0.17 * (num_labels + 3) / legend_columns(width)))
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend_columns(width: float) -> int:
    """As many as fit into a figure of this width in inches."""
    return max(1, int(width / 2.2))


def add_legend(figure, styles: dict[str, dict], markers: dict[str, str] | None = None) -> None:
    """Below the panels: the groups that were drawn, and what markers mean (text -> marker)."""
    drawn = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    shown = [drawn[wrapped(label)] for label in styles if wrapped(label) in drawn]
    for text, marker in (markers or {}).items():
        size = MARKER_SIZES[marker]
        shown += figure.axes[0].plot([], [], color="#777777", marker=marker, markersize=size, linestyle="", label=text)
    columns = legend_columns(figure.get_figwidth())
    figure.legend(handles=shown, loc="outside lower center", ncols=columns)


def plot(paths: list[Path], out: Path) -> None:
    """Write every figure that the runs have data for.

    Raises:
        UserError: no finished run. ImportError: no matplotlib. OSError: a file cannot be written.
    """
    groups, left_out = group_runs(find_runs(paths), "last")
    for line in left_out:
        print(printable(f"left out: {line}"))
    if not groups:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}")
    out.mkdir(parents=True, exist_ok=True)
    styles = group_styles(groups)
    with figures.drawing() as Figure:
        drawn = {"error_against_ranking": error_against_ranking(Figure, groups, styles)}
        for draw_group in (reliability, risk_coverage, learning_curves, exits, early_exit):
            drawn[draw_group.__name__] = draw(Figure, draw_group, groups, styles)
        for name, figure in drawn.items():
            if figure is None:
                continue
            for kind in ("png", "pdf"):
                path = out / f"{name}.{kind}"
                figure.savefig(path, metadata={"CreationDate": None})  # the same runs give the same file
                print(f"written: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "run directories, directories that hold some, or study files (default: the repository's experiments)"
    parser.add_argument("runs", nargs="*", type=path_type, default=[ROOT / "experiments"], metavar="RUNS", help=text)
    text = "(default: %(default)s)"
    parser.add_argument("--out", type=path_type, default=Path("figures"), metavar="DIR", help=text)
    args = parser.parse_args(argv)
    try:
        plot(args.runs, args.out)
    except ImportError:
        print_error("matplotlib is missing: pip install -r scripts/requirements.txt")
    except (UserError, OSError) as error:
        print_error(str(error))
    else:
        return 0
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    run_command(main)
