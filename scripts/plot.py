#!/usr/bin/env python
"""Figures of runs for print: means over seeds with one standard deviation, as PNG and PDF.

  reliability      accuracy against confidence (needs --save_predictions)
  risk_coverage    error among the most confident images against their share of all images (needs --save_predictions)
  learning_curves  validation top-1 error per epoch
  exits            top-1 accuracy of each exit, of the final classifier and of the ensemble
  early_exit       top-1 accuracy against multiply-adds in % of the backbone's (needs trained exits and --val_split)

All but the learning curves are of the last epoch. The first three are of the validation split, which without
--val_split is the test split; the others are of the test split. Runs that differ only in the seed are one group, and
have the label that summarize.py gives them; each network has a panel.
"""

import argparse
import json
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import torch
from summarize import ROOT, Run, find_runs, group_runs

from utils import figures
from utils.metrics import confidence_and_error

# Okabe and Ito's colours, distinguishable by the colour-blind; grey replaces their yellow, too pale on paper.
COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#777777")
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"  # for print in grey; 7 markers, so that 56 groups differ


def reliability(axis, runs: list[Run], **line) -> None:
    figures.reliability_diagram(axis, [read_predictions(run) for run in runs], **line)


def risk_coverage(axis, runs: list[Run], **line) -> None:
    figures.risk_coverage(axis, [read_predictions(run) for run in runs], **line)


def read_predictions(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence of each validation image's prediction, and 1 where it is wrong: (M,) each."""
    path = Path(run.name, "predictions.npz")
    if not path.exists():
        raise ValueError("needs --save_predictions")
    with np.load(path) as file:
        return confidence_and_error(torch.from_numpy(file["logits"]), torch.from_numpy(file["labels"]))


def learning_curves(axis, runs: list[Run], **line) -> None:
    errors = []
    for run in runs:
        lines = Path(run.name, "metrics.jsonl").read_text().splitlines()
        errors.append([json.loads(line)["val"]["top1_error"] for line in lines])
    figures.mean_band(axis, range(1, len(errors[0]) + 1), np.array(errors), **line)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel="validation top-1 error (%)")


def accuracies(runs: list[Run]) -> np.ndarray:
    """Top-1 accuracy in %, (runs, B + 1): exits 1..B-1, final classifier, ensemble; NaN where there is none."""
    blocks = runs[0].flags["num_resnet_blocks"]
    names = [*(f"{i}/{blocks}" for i in range(1, blocks + 1)), "ensemble"]
    return np.array([[run.values.get(name, np.nan) for name in names] for run in runs])


def exits(axis, runs: list[Run], **line) -> None:
    mean, sd = figures.mean_sd(accuracies(runs))
    depth = np.arange(1, len(mean)) / (len(mean) - 1)
    shift = 0.005 * len(axis.containers)  # so that the groups' error bars stand side by side
    axis.errorbar(depth + shift, mean[:-1], sd[:-1], **line)
    axis.errorbar(1.25 + shift, mean[-1], sd[-1], **line)
    axis.set_xticks([0.25, 0.5, 0.75, 1, 1.25], ["1/4", "1/2", "3/4", "final", "ensemble"])
    axis.set(xlabel="classifier after this part of the backbone", ylabel="top-1 accuracy (%)")


def early_exit(axis, runs: list[Run], **line) -> None:
    results = [run.results.get("test", {}).get("last", {}).get("early_exit") for run in runs]
    if None in results:
        raise ValueError("no trained exits, or no --val_split")
    backbone = results[0]["backbone_multiply_adds"]
    curves = [sorted((point["multiply_adds"], point["accuracy"]) for point in result["curve"]) for result in results]
    curves = [np.transpose(curve) for curve in curves]  # (2, thresholds)
    cost = np.unique(np.concatenate(curves, axis=1)[0])
    accuracy = np.array([np.interp(cost, *curve) for curve in curves])
    figures.mean_band(axis, 100 * cost / backbone, accuracy, markevery=[], **line)

    *at_exits, full = results[0]["multiply_adds"]
    cost = 100 * np.array([*at_exits, backbone, full]) / backbone
    axis.plot(cost, accuracies(runs).mean(axis=0), color=line["color"], marker=line["marker"], linestyle="")
    text = "multiply-adds per image (% of the backbone)\nmarkers: exits, final, ensemble (no early exit)"
    axis.set(xlabel=text, ylabel="top-1 accuracy (%)")


def draw(Figure, draw_group, groups: list[list[Run]]):
    """A figure with a panel per network, or None without any data; a group of which a run lacks something is printed.

    draw_group: one of the functions above.
    """
    networks = list(dict.fromkeys(runs[0].flags["classifier_type"] for runs in groups))
    labels = list(dict.fromkeys(runs[0].label for runs in groups))
    figure = Figure(figsize=(max(4.5, 3.2 * len(networks)), 3.3 + 0.17 * len(labels) / len(networks)))
    axes = figure.subplots(1, len(networks), squeeze=False)[0]
    for runs in groups:
        network, i = runs[0].flags["classifier_type"], labels.index(runs[0].label)
        axis = axes[networks.index(network)]
        axis.set_title(network)
        style = {"color": COLOURS[i % 8], "linestyle": LINES[i % 4], "marker": MARKERS[i % 7]}
        try:
            draw_group(axis, runs, label=textwrap.fill(labels[i], 40), **style)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            print(f"left out of {draw_group.__name__}: {', '.join(run.name for run in runs)} ({error})")
    handles = {}
    for axis in axes:
        handles |= {handle.get_label(): handle for handle in axis.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(networks))
    return figure if handles else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "run directories, directories that hold some, or study files (default: the repository's experiments)"
    parser.add_argument("runs", nargs="*", type=Path, default=[ROOT / "experiments"], metavar="RUNS", help=text)
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        groups, left_out = group_runs(find_runs(args.runs), "last")
        for line in left_out:
            print(f"left out: {line}")
        if not groups:
            sys.exit(f"error: no finished run in {', '.join(map(str, args.runs))}")
        args.out.mkdir(parents=True, exist_ok=True)
        with figures.drawing() as Figure:
            for draw_group in (reliability, risk_coverage, learning_curves, exits, early_exit):
                if figure := draw(Figure, draw_group, groups):
                    for kind in ("png", "pdf"):
                        path = args.out / f"{draw_group.__name__}.{kind}"
                        figure.savefig(path, metadata={"CreationDate": None})  # the same runs give the same file
                        print(f"written: {path}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except ImportError:
        sys.exit("error: matplotlib is missing: pip install -r scripts/requirements.txt")


if __name__ == "__main__":
    main()
