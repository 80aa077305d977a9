#!/usr/bin/env python
"""Figures of runs for print, as PNG and PDF. Lines are means over seeds, their bands one standard deviation.

  differences      from the baseline of the same seed, with 95 % intervals, as summarize.py --pairs baseline has them:
                   top-1 error, ECE, and ECE after temperature scaling (needs --val_split)
  reliability      accuracy against confidence (needs --save_predictions)
  risk_coverage    error among the most confident images against coverage (needs --save_predictions)
  learning_curves  validation top-1 error per epoch
  exits            top-1 accuracy of each exit, of the final classifier and of the ensemble
  early_exit       top-1 accuracy against MACs (multiply-adds) in % of the backbone's (needs trained exits and
                   --val_split), of BYOT and all three methods where there are some, unless --only says otherwise;
                   the baseline, which has no exits, is a line at its accuracy

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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
import figures
from intervals import pair_runs
from paper import ROOT
from runs import CLASSIFIERS, COLUMNS, DAMAGED, Group, Run, change_text, load
from tables import difference_cells

from utils.errors import UserError, first_names, print_error, printable, run_command
from utils.metrics import confidence_and_error
from utils.parser import Parser, path_type

BASE = "baseline"  # its label; black, solid and thick in all figures
# Nine colours, so that the ten settings of a study have one each: Paul Tol's "muted" scheme, distinguishable by the
# colour-blind; orange replaces its sand, too pale on paper. With ten lines, 90 groups differ.
COLOURS = ("#332288", "#cc6677", "#44aa99", "#882255", "#88ccee", "#999933", "#aa4499", "#117733", "#ee7733")
DASHES = (
    (5, 1.5), (1, 1), (6, 1, 1, 1), (3, 3), (6, 1, 1, 1, 1, 1), (10, 2), (2, 1), (8, 1, 3, 1), (1, 3), (4, 1, 4, 3)
)  # fmt: skip
EARLY_EXIT = {"BYOT", "PSKD+BYOT+DML"}  # more curves cover each other
DIFFERENCES = ("top1_error", "ece", "ece_after_T")
CHARACTERS = 15  # in an inch
SPACE = "\N{NO-BREAK SPACE}"


class Kind(NamedTuple):
    """A kind of figure with a line for each group."""

    read: Callable[[Run], object]  # what it shows of a run; one of DAMAGED where a run lacks it
    draw: Callable  # draws what several runs show on matplotlib's axis


def read_predictions(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence of each validation image's prediction, and 1 where it is wrong: (M,) each."""
    path = run_directory(run) / "predictions.npz"
    if not path.exists():
        raise ValueError("needs --save_predictions")
    with np.load(path) as file:
        return confidence_and_error(torch.from_numpy(file["logits"]), torch.from_numpy(file["labels"]))


def run_directory(run: Run) -> Path:
    """Raises ValueError for a run of a study file."""
    if run.source.line is not None:
        raise ValueError("needs the run directory: a study file has neither epochs nor predictions")
    return run.source.path


def read_errors(run: Run) -> list[float]:
    """Validation top-1 error of each epoch."""
    lines = (run_directory(run) / "metrics.jsonl").read_text().splitlines()
    if len(lines) != run.results["epochs"]:
        raise ValueError(f"metrics.jsonl has {len(lines)} of {run.results['epochs']} epochs")
    return [json.loads(line)["val"]["final"]["top1_error"] for line in lines]


def learning_curves(axis, errors: list[list[float]], **line) -> None:
    figures.mean_band(axis, range(1, len(errors[0]) + 1), np.array(errors), **line)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel="validation top-1 error (%)")


def read_accuracies(run: Run) -> list[float]:
    """Of CLASSIFIERS; NaN where one is not trained."""
    return [run.values.get((name, "accuracy"), np.nan) for name in CLASSIFIERS]


def exits(axis, accuracies: list[list[float]], **line) -> None:
    *by_depth, ensemble = np.transpose(accuracies)  # (runs,) each
    trained = [i for i, values in enumerate(by_depth) if not np.isnan(values).any()]
    figures.mean_band(axis, trained, np.transpose([by_depth[i] for i in trained]), marker="o", **line)
    axis.plot(len(by_depth), ensemble.mean(), marker="*", markersize=8, color=line["color"])
    axis.set_xticks(range(len(CLASSIFIERS)), CLASSIFIERS)
    axis.set(xlabel="classifier, from shallow to deep", ylabel="top-1 accuracy (%)")


def read_early_exit(run: Run) -> tuple[np.ndarray, np.ndarray | None]:
    """Cost in % of the backbone's and accuracy in %: of the curve (2, thresholds), and at the chosen threshold (2,)."""
    if run.early_exit is None:
        if run.methods:
            raise ValueError("no trained exits, or no --val_split")
        accuracy = run.values["final", "accuracy"]
        return np.array([[0, 100], [accuracy, accuracy]]), None
    points = [*sorted(run.early_exit["curve"], key=lambda point: point["multiply_adds"]), run.early_exit["chosen"]]
    cost = [100 * point["multiply_adds"] / run.early_exit["backbone_multiply_adds"] for point in points]
    found = np.array([cost, [point["accuracy"] for point in points]])
    return found[:, :-1], found[:, -1]


def early_exit(axis, found: list[tuple[np.ndarray, np.ndarray | None]], **line) -> None:
    costs = np.unique(np.concatenate([curve[0] for curve, _ in found]))
    accuracy = np.array([np.interp(costs, *curve) for curve, _ in found])
    figures.mean_band(axis, costs, accuracy, **line)
    for _, chosen in found:
        if chosen is not None:
            axis.plot(*chosen, marker="x", markersize=6, color=line["color"])
    text = "MACs (multiply-adds) per image, % of the backbone's\ncrosses: each run's threshold, from held-out images"
    axis.set(xlabel=text, ylabel="top-1 accuracy (%)")


KINDS = {
    "reliability": Kind(read_predictions, figures.reliability_diagram),
    "risk_coverage": Kind(read_predictions, figures.risk_coverage),
    "learning_curves": Kind(read_errors, learning_curves),
    "exits": Kind(read_accuracies, exits),
    "early_exit": Kind(read_early_exit, early_exit),
}


def draw_lines(Figure, name: str, groups: list[Group]):
    """A figure with a panel per network and data set, or None without any data; a group of which a run lacks something
    is left out, and printed."""
    kind, styles = KINDS[name], group_styles(groups)
    shown: dict[str, list] = {}  # panel -> group, and what its runs show
    left_out: dict[str, list[str]] = {}  # reason -> runs
    drawn = []
    for group in groups:
        try:
            found = [kind.read(run) for run in group.runs]
        except (*DAMAGED, EOFError, zipfile.BadZipFile) as error:  # the last two, np.load's
            left_out.setdefault(str(error), []).extend(run.source.name for run in group.runs)
            continue
        shown.setdefault(panel(group), []).append((group, found))
        drawn.append(group)
    for reason, names in left_out.items():
        print(printable(f"left out of {name}: {first_names(names)} ({reason})"))
    if not drawn:
        return None
    figure = Figure(figsize=(max(5, 3.4 * len(shown)), 3.6))
    (axes,) = figure.subplots(1, len(shown), squeeze=False)
    for axis, (title, in_panel) in zip(axes, shown.items(), strict=True):
        axis.set_title(textwrap.fill(title, 3 * CHARACTERS))
        for group, found in in_panel:
            kind.draw(axis, found, label=textwrap.fill(group.label, 3 * CHARACTERS), **styles[group.label])
    add_legend(figure)
    add_caption(figure, "Lines: means over seeds; bands: one standard deviation above and below.", drawn)
    return figure


def draw_differences(Figure, groups: list[Group]):
    """A row per network and data set, a panel per quantity, in it a row per setting; None without a baseline."""
    paired, alone = pair_runs(BASE, groups)
    if alone:
        print(printable(f"left out of differences: {first_names(alone)}"))
    if not paired:
        return None
    rows: dict[str, list] = {}
    for pairs in paired:
        rows.setdefault(panel(pairs.group), []).append(pairs)
    figure = Figure(figsize=(7.2, 0.3 * len(paired) + 0.6 * len(rows)))
    sizes = [len(in_row) + 1 for in_row in rows.values()]
    grid = figure.subplots(len(rows), len(DIFFERENCES), squeeze=False, sharey="row", height_ratios=sizes)
    for axes, (title, in_row) in zip(grid, rows.items(), strict=True):
        labels = [textwrap.fill(pairs.group.label, 2 * CHARACTERS) for pairs in in_row]
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].set_ylim(len(labels) - 0.5, -0.5)
        axes[0].set_ylabel(title if len(rows) > 1 else "")
        for axis, key in zip(axes, DIFFERENCES, strict=True):
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_title(COLUMNS[key].heading)
            cells, _ = difference_cells(in_row, COLUMNS[key])
            for y, cell in enumerate(cells):
                if cell is None:
                    continue
                is_decided = cell.half_width is not None and abs(cell.mean) > cell.half_width
                fill = "#332288" if is_decided else "white"
                axis.errorbar(cell.mean, y, xerr=cell.half_width, fmt="o", color="#332288", markerfacecolor=fill)
    text = "Difference from the baseline of the same seed, negative is better: mean and 95 % interval, filled where it"
    add_caption(figure, f"{text} excludes 0.", [pairs.group for pairs in paired])
    return figure


def panel(group: Group) -> str:
    return f"{group.runs[0].network}, {group.data}"


def add_caption(figure, text: str, groups: list[Group]) -> None:
    """Above the panels: what is drawn, number of runs, and the setting."""
    numbers = sorted({len(group.runs) for group in groups})
    settings = {}
    for group in groups:
        flags = sorted(change_text(change).replace(" ", SPACE) for change in group.common)
        settings["; ".join([panel(group), *flags])] = True
    counts = " to ".join(map(str, sorted({numbers[0], numbers[-1]})))
    text = f"{text} Runs per setting: {counts}. {'. '.join(settings)}."
    figure.suptitle(textwrap.fill(text, int(CHARACTERS * figure.get_figwidth())), fontsize="medium")
    figure.set_figheight(figure.get_figheight() + 0.13 * (1 + figure.get_suptitle().count("\n")))


def add_legend(figure) -> None:
    """Below the panels, in as many columns as fit."""
    handles = {}
    for axis in figure.axes:
        handles |= {handle.get_label(): handle for handle in axis.get_legend_handles_labels()[0]}
    for columns in range(min(4, len(handles)), 0, -1):
        legend = figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns)
        box = legend.get_window_extent().transformed(figure.dpi_scale_trans.inverted())  # in inches
        if box.width < figure.get_figwidth() or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height)


def group_styles(groups: list[Group]) -> dict[str, dict]:
    """Label -> matplotlib's keywords for its lines."""
    labels = dict.fromkeys(group.label for group in groups if group.label != BASE)
    styles = {BASE: {"color": "black", "linestyle": "-", "linewidth": 2.2}}
    for i, label in enumerate(labels):
        styles[label] = {"color": COLOURS[i % len(COLOURS)], "linestyle": (0, DASHES[i % len(DASHES)])}
    return styles


def plot(paths: list[Path], out: Path, only: list[str]) -> None:
    """Write every figure that the runs have data for; `only`: labels of the groups beside the baseline, or all.

    Raises:
        UserError: no finished run. ImportError: no matplotlib. OSError: a file cannot be written.
    """
    groups, skipped = load(paths, "last")
    for run in skipped:
        print(printable(f"left out: {run}"))
    labels = {group.label for group in groups}
    if unknown := set(only) - labels:
        raise UserError(f"--only {' '.join(sorted(unknown))}: give some of {'; '.join(sorted(labels))}")
    groups = [group for group in groups if not only or group.label in (*only, BASE)]
    if not groups:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}")
    out.mkdir(parents=True, exist_ok=True)
    with figures.drawing() as Figure:
        drawn = {"differences": draw_differences(Figure, groups)}
        for name in KINDS:
            shown = groups
            if name == "early_exit" and not only and EARLY_EXIT & labels:
                shown = [group for group in groups if group.label in (BASE, *EARLY_EXIT)]
            drawn[name] = draw_lines(Figure, name, shown)
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
    text = "these settings alone, beside the baseline, by the labels that summarize.py gives them (default: all)"
    parser.add_argument("--only", nargs="+", default=[], metavar="LABEL", help=text)
    args = parser.parse_args(argv)
    try:
        plot(args.runs, args.out, args.only)
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
