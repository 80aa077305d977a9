"""Figures drawn with matplotlib, shared by TensorBoard (utils/logger.py) and scripts/plot.py."""

import contextlib
import warnings

import numpy as np
import torch
from torch import Tensor

from utils.metrics import confidence_and_wrong, reliability, risk_coverage_curve

# Okabe and Ito's colours, distinguishable by the colour-blind; grey replaces their yellow, too pale on paper.
COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#777777")
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True,
    "figure.constrained_layout.use": True, "savefig.dpi": 200, "pdf.fonttype": 42,  # TrueType, for publishers
}  # fmt: skip


@contextlib.contextmanager
def drawing():
    """A context for making and saving figures, in one style whatever the user's settings; yields the class Figure."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure in memory

    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # class names in a script that the font lacks
        yield Figure


def mean_sd(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis, the runs; for a single run, 0."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]


def mean_band(axis, x, curves: np.ndarray, **line) -> None:
    """The mean of curves (n, len(x)) in a band of one standard deviation, any marker at its end only."""
    mean, sd = mean_sd(curves)
    axis.plot(x, mean, markevery=[-1], **line)
    axis.fill_between(x, mean - sd, mean + sd, color=line["color"], alpha=0.18, linewidth=0)


def reliability_diagram(axis, sums: np.ndarray) -> None:
    """Per bin of confidence: accuracy, its gap to the mean confidence, and the share of images.

    sums: (3, bins), samples, confidence and correct predictions, as `utils.metrics.reliability` returns them.
    """
    samples, confidence, correct = sums
    left = 100 * np.arange(len(samples)) / len(samples)
    accuracy, mean_confidence = 100 * correct / samples.clip(1), 100 * confidence / samples.clip(1)
    bars = {"width": left[1], "align": "edge", "edgecolor": "black", "linewidth": 0.5}
    axis.bar(left, accuracy, color=COLOURS[5], label="accuracy", **bars)
    hatched = {**bars, "facecolor": "none", "edgecolor": COLOURS[4], "hatch": "/////"}
    axis.bar(left, mean_confidence - accuracy, bottom=accuracy, label="gap to the mean confidence", **hatched)
    axis.plot([0, 100], [0, 100], "k--", linewidth=0.8, label="perfect calibration")
    axis.plot(left + left[1] / 2, 100 * samples / samples.sum(), "k.-", linewidth=1, label="share of images")
    axis.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence (%)", ylabel="accuracy and share of images (%)")


def risk_coverage(axis, curves: np.ndarray, **line) -> None:
    """Error among the most confident images, mean of curves (n, M) of `utils.metrics.risk_coverage_curve`."""
    num_images = curves.shape[1]
    shown = np.unique(np.linspace(num_images // 100, num_images - 1, 400).astype(int))  # below 1 % it is noise
    mean_band(axis, 100 * (shown + 1) / num_images, 100 * curves[:, shown], **line)
    axis.set(xlim=(0, 100), xlabel="coverage (%), most confident images first", ylabel="error among them (%)")


def accuracies(records: list[dict]) -> np.ndarray:
    """Top-1 accuracy in %, (len(records), B + 1): exits, final classifier, ensemble; NaN where there is none."""
    classifiers = [[*record["exits"], record["val"], record["ensemble"]] for record in records]
    return np.array([[100 - metrics["top1_error"] if metrics else np.nan for metrics in row] for row in classifiers])


def early_exit(axis, tests: list[dict], **line) -> None:
    """Accuracy against multiply-adds: the early-exit curve, each exit, the final classifier, the ensemble.

    tests: entries of results.json's `test` block, of runs that differ in the seed; their means are drawn.
    """
    backbone = tests[0]["early_exit"]["backbone_multiply_adds"]
    curves = [sorted((p["multiply_adds"], p["accuracy"]) for p in test["early_exit"]["curve"]) for test in tests]
    cost = np.unique([multiply_adds for curve in curves for multiply_adds, _ in curve])
    accuracy = np.stack([np.interp(cost, *zip(*curve, strict=True)) for curve in curves])
    mean_band(axis, 100 * cost / backbone, accuracy, **line)

    *exits, full = tests[0]["early_exit"]["multiply_adds"]
    cost = 100 * np.array([*exits, backbone, full]) / backbone
    accuracy = accuracies(tests).mean(axis=0)
    for marker, which in (("o", slice(-2)), ("s", -2), ("D", -1)):
        axis.plot(cost[which], accuracy[which], marker, color=line["color"], markerfacecolor="white")
    markers = "without early exit: ○ exits, □ final classifier, ◇ ensemble"
    axis.set(xlabel=f"multiply-adds per image (% of the backbone)\n{markers}", ylabel="top-1 accuracy (%)")


def legend(figure) -> None:
    """One for all axes, below them, with an entry per label."""
    entries = {}
    for axis in figure.axes:
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.06 * max(map(len, entries)))))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def image_sheet(figure, images: Tensor, captions: list[list[str]], title: str) -> None:
    """Images (n, 3, S, S) uint8, eight to a row, each under the first 24 characters of its lines of caption."""
    rows = -(-len(images) // 8)
    figure.set_size_inches(9, (1.15 + 0.1 * len(captions[0])) * rows + 0.3)
    figure.suptitle(title)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
        axis = figure.add_subplot(rows, 8, i)
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.axis("off")
        axis.set_title("\n".join(f"{line:.24}" for line in caption), fontsize=6, parse_math=False)


def training_images(loader, limit: int = 64):
    """Yield (name, figure): the first images of the loader's current epoch, augmented, with their classes."""
    images, labels, _ = next(iter(loader))
    captions = [[loader.class_names[label]] for label in labels[:limit].tolist()]
    with drawing() as Figure:
        figure = Figure()
        image_sheet(
            figure, loader.denormalise(images[:limit]), captions, f"Training images of epoch {loader.epoch + 1}"
        )
        yield "training_images", figure


def predictions(logits: Tensor, labels: Tensor, loader, limit: int = 32):
    """Yield (name, figure): curves of predictions (M, K) with labels (M,), and the loader's images of mistakes."""
    confidence, wrong = confidence_and_wrong(logits, labels)
    with drawing() as Figure:
        figure = Figure(figsize=(9, 4.5))
        left, right = figure.subplots(1, 2)
        reliability_diagram(left, torch.stack(reliability(confidence, wrong)).numpy())
        risk_coverage(right, risk_coverage_curve(confidence, wrong)[None].numpy(), color=COLOURS[1])
        legend(figure)
        yield "predictions", figure

        mistakes = wrong.nonzero()[:, 0]
        mistakes = mistakes[confidence[mistakes].argsort(descending=True)][:limit]
        if len(mistakes):
            true, predicted = labels[mistakes].tolist(), logits[mistakes].argmax(dim=1).tolist()
            rows = zip(true, predicted, confidence[mistakes].tolist(), strict=True)
            captions = [[loader.class_names[a], loader.class_names[b], f"{100 * p:.1f} %"] for a, b, p in rows]
            figure, title = Figure(), "Most confident mistakes: true class, predicted class and its probability"
            image_sheet(figure, loader.pictures(mistakes), captions, title)
            yield "mistakes", figure
