#!/usr/bin/env python
"""Figures of runs for print: means over seeds with one standard deviation, as PNG and PDF.

usage: scripts/plot.py [RUNS...] [--out DIR]

  reliability      accuracy against confidence
  risk_coverage    error among the most confident images against their share of all images
  learning_curves  validation top-1 error per epoch
  exits            top-1 accuracy of each exit, of the final classifier and of the ensemble
  early_exit       top-1 accuracy against multiply-adds in % of the backbone's

All but the learning curves are of the last epoch. The first three are of the validation split, which without
--val_split is the test split; the others are of the test split. Runs that differ only in the seed are one group, and
have the label that summarize.py gives them; each network has a panel.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from summarize import ROOT, Run, find_runs, group_runs

from utils import figures
from utils.metrics import confidence_and_wrong, reliability, risk_coverage_curve


def read_predictions(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence of each validation image's prediction, and 1 where it is wrong: (M,) each."""
    with np.load(Path(run.name, "predictions.npz")) as file:
        return confidence_and_wrong(torch.from_numpy(file["logits"]), torch.from_numpy(file["labels"]))


def read_history(run: Run) -> list[float]:
    """Validation top-1 error per epoch."""
    lines = Path(run.name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["val"]["top1_error"] for line in lines]


def read_last(run: Run) -> dict:
    """The last epoch's results on the test split."""
    return run.results.get("test", run.results)["last"]


def read_early_exit(run: Run) -> dict:
    """The same; raises KeyError where early exit was not measured."""
    record = read_last(run)
    if not record.get("early_exit"):
        raise KeyError("early_exit")
    return record


def draw_reliability(axis, predictions: list, label: str, **_) -> None:
    """Of the predictions of all seeds together; the ECE is the mean over seeds."""
    sums = np.stack([torch.stack(reliability(*prediction)).numpy() for prediction in predictions])
    figures.reliability_diagram(axis, sums.sum(axis=0))
    mean, sd = figures.mean_sd(100 * np.abs(sums[:, 2] - sums[:, 1]).sum(axis=1) / sums[:, 0].sum(axis=1))
    axis.set_title(f"{axis.get_title()}\n{label}\nECE {mean:.2f} ± {sd:.2f} %")


def draw_risk_coverage(axis, predictions: list, **line) -> None:
    figures.risk_coverage(axis, np.stack([risk_coverage_curve(*prediction) for prediction in predictions]), **line)


def draw_learning_curves(axis, histories: list, **line) -> None:
    figures.mean_band(axis, range(1, len(histories[0]) + 1), np.array(histories), **line)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel="validation top-1 error (%)")


def draw_exits(axis, records: list, **line) -> None:
    mean, sd = figures.mean_sd(figures.accuracies(records))
    depth = np.arange(1, len(mean)) / (len(mean) - 1)
    axis.errorbar(depth, mean[:-1], sd[:-1], marker="o", **line)
    axis.errorbar(1.25, mean[-1], sd[-1], marker="o", color=line["color"])
    axis.set_xticks([0.25, 0.5, 0.75, 1, 1.25], ["1/4", "1/2", "3/4", "final", "ensemble"])
    axis.set(xlim=(0.2, 1.35), xlabel="classifier after this part of the backbone", ylabel="top-1 accuracy (%)")


# name: (what a run contributes, what it needs for that, how a group of runs is drawn)
FIGURES = {
    "reliability": (read_predictions, "predictions.npz (--save_predictions)", draw_reliability),
    "risk_coverage": (read_predictions, "predictions.npz (--save_predictions)", draw_risk_coverage),
    "learning_curves": (read_history, "metrics.jsonl", draw_learning_curves),
    "exits": (read_last, "results.json", draw_exits),
    "early_exit": (read_early_exit, "trained exits and --val_split", figures.early_exit),
}


def draw(Figure, name: str, groups: list[list[Run]]):
    """The named figure, or None if no run has what it needs; runs that lack it are printed."""
    read, needed, draw_group = FIGURES[name]
    labels = list(dict.fromkeys(runs[0].label for runs in groups))
    panels, lacking = {}, []  # title of a panel: the labels and data of its groups
    for runs in groups:
        data = []
        for run in runs:
            try:
                data.append(read(run))
            except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
                lacking.append(Path(run.name).name)
        network, label = runs[0].flags["classifier_type"], runs[0].label
        if data:  # a reliability diagram is of one group
            panels.setdefault((network, label if name == "reliability" else ""), []).append((label, data))
    if lacking:
        print(f"left out of {name}, which needs {needed}: {', '.join(lacking)}")
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.5, 3.2 * columns), 3 * rows + 0.6))
    for i, ((network, _), contents) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, i, title=network)
        for label, data in contents:
            turn, colour = divmod(labels.index(label), len(figures.COLOURS))
            draw_group(axis, data, label=label, color=figures.COLOURS[colour], linestyle=("-", "--", ":")[turn % 3])
    figures.legend(figure)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = parser.add_argument("runs", nargs="*", type=Path, default=[ROOT / "experiments"], metavar="RUNS")
    runs.help = "run directories, directories that hold some, or study files (default: the repository's experiments)"
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if missing := [path for path in args.runs if not path.exists()]:
        parser.error(f"{missing[0]}: no such file or directory")
    groups, left_out = group_runs(find_runs(args.runs), "last")
    for line in left_out:
        print(f"left out: {line}")
    if not groups:
        sys.exit(f"error: no finished run in {', '.join(map(str, args.runs))}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with figures.drawing() as Figure:
            for name in FIGURES:
                figure = draw(Figure, name, groups)
                for kind in ("png", "pdf") if figure else ():
                    path = args.out / f"{name}.{kind}"
                    figure.savefig(path, metadata={"CreationDate": None})  # the same runs give the same file
                    print(f"written: {path}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except ImportError:
        sys.exit("error: matplotlib is missing: pip install -r scripts/requirements.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
