#!/usr/bin/env python
"""Figures of runs for print: means over seeds with one standard deviation, as PNG and PDF.

usage: scripts/plot.py [RUNS...] [--out DIR]

  reliability      accuracy against confidence
  risk_coverage    error among the most confident images against their share of all images
  learning_curves  validation top-1 error per epoch
  exits            top-1 accuracy of each exit, of the final classifier and of the ensemble
  early_exit       top-1 accuracy against multiply-adds in % of the backbone's
  error_time       top-1 error against training time per epoch

All but the learning curves are of the last epoch. The first three are of the validation split, which without
--val_split is the test split; the others are of the test split. Runs that differ only in the seed are one group.
"""

import argparse
import itertools
import json
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import torch
from summarize import Run, find_runs, group_runs, listing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import loss  # noqa: E402
from utils import figures  # noqa: E402
from utils.metrics import confidence_and_wrong, reliability, risk_coverage_curve  # noqa: E402

COMBINATIONS = ["+".join(c) or "baseline" for n in range(4) for c in itertools.combinations(loss.METHODS, n)]
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (8, 3)))
MARKERS = "os^DvPX*"


def name_groups(found: list[list[Run]]) -> list[tuple[str, str, list[Run]]]:
    """(panel, label, runs) of each group, in the order of COMBINATIONS. The label names the methods and their options,
    the panel the network and all other settings, as far as groups differ in them."""
    parser = argparse.ArgumentParser()
    loss.add_flags(parser)
    flags = [runs[0].flags for runs in found]
    differing = {key for own in flags for key in own if any(other.get(key) != own[key] for other in flags)}
    differing -= {"classifier_type", *loss.METHODS}
    defaults = {"num_resnet_blocks": 4, **vars(parser.parse_args([]))}
    options = differing & defaults.keys()
    groups = []
    for runs, own in zip(found, flags, strict=True):
        panel = "\n".join(textwrap.wrap(f"{own['classifier_type']} {listing(own, differing - options)}", 40))
        methods = "+".join(method for method in loss.METHODS if own.get(method)) or "baseline"
        more = listing(own, {key for key in options if own[key] != defaults[key]})
        groups.append((panel, f"{methods} ({more})" if more else methods, runs))
    return sorted(groups, key=lambda group: (COMBINATIONS.index(group[1].split()[0]), *group[:2]))


def read_predictions(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence of each validation image's prediction, and 1 where it is wrong: (M,) each."""
    with np.load(Path(run.name, "predictions.npz")) as file:
        return confidence_and_wrong(torch.from_numpy(file["logits"]), torch.from_numpy(file["labels"]))


def read_history(run: Run) -> list[float]:
    """Validation top-1 error per epoch."""
    lines = Path(run.name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["val"]["top1_error"] for line in lines]


def read_last(run: Run) -> dict:
    """The last epoch's results on the test split, and the training time per epoch."""
    return run.results.get("test", run.results)["last"] | {"seconds_per_epoch": run.results["seconds_per_epoch"]}


def read_early_exit(run: Run) -> dict:
    """The same; raises KeyError where early exit was not measured."""
    record = read_last(run)
    if not record.get("early_exit"):
        raise KeyError("early_exit")
    return record


def draw_reliability(axis, predictions: list, **_) -> None:
    """Of the predictions of all seeds together; the ECE is the mean over seeds."""
    sums = np.stack([torch.stack(reliability(*prediction)).numpy() for prediction in predictions])
    figures.reliability_diagram(axis, sums.sum(axis=0))
    mean, sd = figures.mean_sd(100 * np.abs(sums[:, 2] - sums[:, 1]).sum(axis=1) / sums[:, 0].sum(axis=1))
    spread = f" ± {sd:.2f}" if len(sums) > 1 else ""
    axis.set_title(f"{axis.get_title()}\nECE {mean:.2f}{spread} %")


def draw_risk_coverage(axis, predictions: list, **line) -> None:
    figures.risk_coverage(axis, np.stack([risk_coverage_curve(*prediction) for prediction in predictions]), **line)


def draw_learning_curves(axis, histories: list, **line) -> None:
    figures.mean_band(axis, range(1, len(histories[0]) + 1), np.array(histories), **line)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel="validation top-1 error (%)")


def draw_exits(axis, records: list, **line) -> None:
    mean, sd = figures.mean_sd(figures.accuracies(records))
    depth = np.arange(1, len(mean)) / (len(mean) - 1)
    axis.errorbar(depth, mean[:-1], sd[:-1], **line)
    axis.errorbar(1.25, mean[-1], sd[-1], marker=line["marker"], color=line["color"])
    axis.set_xticks([0.25, 0.5, 0.75, 1, 1.25], ["1/4", "1/2", "3/4", "final", "ensemble"])
    axis.set(xlim=(0.2, 1.35), xlabel="classifier after this part of the backbone", ylabel="top-1 accuracy (%)")


def draw_error_time(axis, records: list, **line) -> None:
    points = np.array([[record["seconds_per_epoch"], record["val"]["top1_error"]] for record in records])
    (seconds, error), (seconds_sd, error_sd) = figures.mean_sd(points)
    axis.errorbar(seconds, error, error_sd, seconds_sd, **line)
    axis.set(xlabel="training time (s per epoch)", ylabel="top-1 error (%)")


# name: (what a run contributes, what it needs for that, how a group of runs is drawn)
FIGURES = {
    "reliability": (read_predictions, "predictions.npz (--save_predictions)", draw_reliability),
    "risk_coverage": (read_predictions, "predictions.npz (--save_predictions)", draw_risk_coverage),
    "learning_curves": (read_history, "metrics.jsonl", draw_learning_curves),
    "exits": (read_last, "results.json", draw_exits),
    "early_exit": (read_early_exit, "trained exits and --val_split", figures.early_exit),
    "error_time": (read_last, "results.json", draw_error_time),
}


def draw(Figure, name: str, groups: list[tuple[str, str, list[Run]]]):
    """The named figure, or None if no run has what it needs; runs that lack it are printed."""
    read, needed, draw_group = FIGURES[name]
    labels = list(dict.fromkeys(label for _, label, _ in groups))
    labels = COMBINATIONS if set(labels) <= set(COMBINATIONS) else labels  # then a colour means the same everywhere
    panels, lacking = {}, []  # title of a panel: the labels and data of its groups
    for panel, label, runs in groups:
        data = []
        for run in runs:
            try:
                data.append(read(run))
            except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
                lacking.append(Path(run.name).name)
        hardware = "; ".join(dict.fromkeys(run.config["device_name"] for run in runs))
        subtitle = {"reliability": label, "error_time": hardware}.get(name, "")
        if data:
            panels.setdefault(f"{panel}\n{subtitle}".strip(), []).append((label, data))
    if lacking:
        names = textwrap.shorten(", ".join(lacking), 120, placeholder=" ...")
        print(f"left out of {name}, which needs {needed}: {names} ({len(lacking)} in all)")
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.5, 3.2 * columns), 3 * rows + 0.6))
    for i, (title, contents) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, i, title=title)
        for label, data in contents:
            turn, k = divmod(labels.index(label), 8)
            line = {"color": figures.COLOURS[k], "linestyle": DASHES[(k + turn) % 8], "marker": MARKERS[turn % 8]}
            draw_group(axis, data, label=label, **line)
    figures.legend(figure)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n")[3])
    runs = parser.add_argument("runs", nargs="*", type=Path, default=[ROOT / "experiments"], metavar="RUNS")
    runs.help = "run directories, directories that hold some, or study files (default: the repository's experiments)"
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if missing := [path for path in args.runs if not path.exists()]:
        parser.error(f"{missing[0]}: no such file or directory")
    found, left_out = group_runs(find_runs(args.runs), "last")
    for line in left_out:
        print(f"left out: {line}")
    if not found:
        sys.exit(f"error: no finished run in {', '.join(map(str, args.runs))}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with figures.drawing() as Figure:
            for name in FIGURES:
                figure = draw(Figure, name, name_groups(found))
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
