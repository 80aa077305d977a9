"""How figures look, and curves of several runs drawn on matplotlib's axes."""

import contextlib
import os
import sys

import numpy as np
import torch
from paper import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT))

from utils.metrics import reliability, risk_coverage_curve

STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.color": "#dddddd", "lines.markersize": 4,
    "legend.handlelength": 3.5, "figure.constrained_layout.use": True, "savefig.dpi": 200,
    "pdf.fonttype": 42,  # embed TrueType, as publishers want
}  # fmt: skip


@contextlib.contextmanager
def drawing():
    """A context for making and saving figures, in one style whatever the user's settings; yields the class Figure."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own, which its programs inherit, works nowhere else
    import matplotlib.style  # here: it takes half a second, and may be missing
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure in memory

    with matplotlib.style.context(["default", STYLE]):
        yield Figure


def mean_band(axis, x, curves: np.ndarray, **line) -> None:
    """The mean of curves (n, len(x)), in %, in a band of one sample standard deviation; of a single one, 0."""
    mean, sd = curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(curves) - 1))
    low = (mean - sd).clip(min=0)
    high = (mean + sd).clip(max=100)
    axis.plot(x, mean, **line)
    axis.fill_between(x, low, high, color=line["color"], alpha=0.18, linewidth=0)


def reliability_diagram(axis, predictions: list[tuple[Tensor, Tensor]], **line) -> None:
    """Accuracy against mean confidence in each bin of confidence, means over the runs, without bins empty in a run.

    predictions: a run's confidence (M,) and error (M,), as `utils.metrics.confidence_and_error` returns them.
    """
    sums = []
    for confidence, error in predictions:
        sums.append(torch.stack(reliability(confidence, error)).numpy())
    count, confidence, correct = np.stack(sums, axis=1)  # sums over images, (runs, bins) each
    is_shown = (count > 0).all(axis=0)
    share = count[:, is_shown].sum(axis=0) / count.sum()
    mean_confidence = 100 * confidence[:, is_shown] / count[:, is_shown]
    accuracy = 100 * correct[:, is_shown] / count[:, is_shown]

    x = mean_confidence.mean(axis=0)
    axis.axline((0, 0), (100, 100), color="black", linewidth=0.8)
    mean_band(axis, x, accuracy, **line)
    axis.scatter(x, accuracy.mean(axis=0), 150 * share, color=line["color"])
    axis.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy (%)")
    axis.set_xlabel("confidence (%)\narea of a marker: share of images\nstraight line: perfect calibration")


def risk_coverage(axis, predictions: list[tuple[Tensor, Tensor]], **line) -> None:
    """Error among the most confident images, mean over the runs; predictions as for `reliability_diagram`."""
    curves = torch.stack([risk_coverage_curve(confidence, error) for confidence, error in predictions]).numpy()
    num_images = curves.shape[1]
    first = num_images // 100  # fewer than 1 % of the images are noise
    shown = np.unique(np.linspace(first, num_images - 1, 400).astype(int))
    coverage = 100 * (shown + 1) / num_images
    mean_band(axis, coverage, 100 * curves[:, shown], **line)
    axis.set(xlim=(0, 100), xlabel="coverage (%), most confident images first", ylabel="error among them (%)")
