"""Figures drawn with matplotlib, shared by TensorBoard (utils/logger.py) and scripts/plot.py."""

import contextlib
import os
import warnings

import numpy as np
import torch
from torch import Tensor

from utils.errors import printable
from utils.metrics import confidence_and_error, reliability, risk_coverage_curve

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

    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # class names in a script that the font lacks
        yield Figure


def mean_sd(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis, the runs; for a single run, 0."""
    mean = values.mean(axis=0)
    if len(values) == 1:
        return mean, np.zeros_like(mean)
    return mean, values.std(axis=0, ddof=1)


def mean_band(axis, x, curves: np.ndarray, markevery=0.25, **line) -> None:
    """The mean of curves (n, len(x)), in %, in a band of one standard deviation."""
    mean, sd = mean_sd(curves)
    low = (mean - sd).clip(min=0)
    high = (mean + sd).clip(max=100)
    axis.plot(x, mean, markevery=markevery, **line)
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
    mean_band(axis, x, accuracy, markevery=[], **line)
    axis.scatter(x, accuracy.mean(axis=0), 150 * share, color=line["color"], marker=line.get("marker"))
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


def image_sheet(Figure, images: Tensor, captions: list[list[str]], title: str):
    """Images (n, 3, S, S) uint8, eight to a row, each under the first 24 characters of its lines of caption."""
    rows = -(-len(images) // 8)
    row_height = 1.15 + 0.1 * len(captions[0])
    figure = Figure(figsize=(9, row_height * rows + 0.3))
    figure.suptitle(title)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
        text = "\n".join(f"{printable(line):.24}" for line in caption)
        axis = figure.add_subplot(rows, 8, i)
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.axis("off")
        axis.set_title(text, fontsize=6, parse_math=False)
    return figure


def training_images(loader):
    """Yield (name, figure): the first 64 images of the loader's current epoch, augmented, with their classes."""
    images, labels, _ = next(iter(loader))
    captions = [[loader.record.class_names[label]] for label in labels[:64].tolist()]
    title = f"Training images of epoch {loader.epoch + 1}"
    with drawing() as Figure:
        yield "training_images", image_sheet(Figure, loader.denormalise(images[:64]), captions, title)


def predictions(logits: Tensor, labels: Tensor, loader):
    """Yield (name, figure): curves of logits (M, K) with labels (M,), and the loader's images of 32 mistakes."""
    confidence, error = confidence_and_error(logits, labels)
    with drawing() as Figure:
        figure = Figure(figsize=(9, 4.5))
        left, right = figure.subplots(1, 2)
        reliability_diagram(left, [(confidence, error)], color="#0072b2")
        risk_coverage(right, [(confidence, error)], color="#0072b2")
        yield "predictions", figure

        num_mistakes = int(error.sum())
        mistakes = (confidence * error).argsort(descending=True)[: min(32, num_mistakes)]
        captions = []
        for i in mistakes.tolist():
            true = loader.record.class_names[labels[i]]
            predicted = loader.record.class_names[logits[i].argmax()]
            captions.append([true, predicted, f"{100 * confidence[i]:.1f} %"])
        if captions:
            title = "Most confident mistakes: true class, predicted class and its probability"
            yield "mistakes", image_sheet(Figure, loader.raw_images(mistakes), captions, title)
