"""The reported metrics: top-1 and top-5 error, NLL, ECE, AURC and E-AURC, in float64, in O(M (K + log M))."""

from typing import NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """How a metric is printed."""

    heading: str
    unit: str
    decimals: int


METRICS = {
    "top1_error": Metric("top-1 err", "%", 2),
    "top5_error": Metric("top-5 err", "%", 2),
    "nll": Metric("NLL", "nats", 4),
    "ece": Metric("ECE", "%", 2),
    "aurc": Metric("AURC", "x 1000", 2),
    "eaurc": Metric("E-AURC", "x 1000", 2),
}
NUM_BINS = 10  # of ECE, as the paper


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of M predictions over K classes.

    Args:
        logits: (M, K), any floating type; probabilities are their softmax in float64.
        labels: (M,) int64.

    Returns:
        `top1_error`, `top5_error` and `ece` in percent, `nll` in nats, `aurc` and `eaurc` times 1000.

    Where logits tie, the lower class comes first; with fewer than 6 classes top-5 error is 0. None of the
    values depends on the order of the samples.

    Raises:
        ValueError: no samples, shapes that do not fit, labels out of range, NaN or +inf among the logits.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"need logits (M, K) and labels (M,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must lie in 0..{logits.shape[1] - 1}")
    confidence, rank, nll = _per_sample(logits, labels)
    if not confidence.isfinite().all():  # a NaN or +inf in a row makes it NaN
        raise ValueError("logits are not finite")
    wrong = (rank > 0).double()
    curve = risk_coverage_curve(confidence, wrong)
    values = {
        "top1_error": 100 * wrong.mean(),
        "top5_error": 100 * (rank >= 5).double().mean(),
        "nll": nll.mean(),
        "ece": 100 * expected_calibration_error(confidence, wrong),
        "aurc": 1000 * curve.mean(),
        # The best ordering has every wrong sample last, which is what ordering by -wrong gives.
        "eaurc": 1000 * (curve.mean() - risk_coverage_curve(-wrong, wrong).mean()),
    }
    return {name: value.item() for name, value in values.items()}


def _per_sample(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest probability, number of classes that come before the label, and NLL: (M,) each."""
    logits = logits.detach().double()
    log_norm = logits.logsumexp(dim=1)
    of_label = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > of_label) | ((logits == of_label) & before)).sum(dim=1)
    return (logits.max(dim=1).values - log_norm).exp(), rank, log_norm - of_label[:, 0]


def confidence_and_wrong(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability, and 1 where the prediction is wrong, else 0: (M,) float64 each, of logits (M, K) and
    labels (M,)."""
    confidence, rank, _ = _per_sample(logits, labels)
    return confidence, (rank > 0).double()


def reliability(confidence: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums by bin of confidence, (NUM_BINS,) each: samples, confidence, right answers.

    Bins are equally wide, open below and closed above (Guo et al., ICML 2017). confidence (M,) float64 in
    (0, 1], wrong (M,) of 0 and 1.
    """
    borders = confidence.new_tensor([i / NUM_BINS for i in range(1, NUM_BINS)])
    which = torch.bucketize(confidence, borders)
    sums = confidence.new_zeros(3, NUM_BINS)
    sums.index_add_(1, which, torch.stack([torch.ones_like(confidence), confidence, 1 - wrong]))
    return sums.unbind()


def expected_calibration_error(confidence: Tensor, wrong: Tensor) -> Tensor:
    """sum over bins of |accuracy - mean confidence| x fraction of the samples, in 0..1 (Guo et al.)."""
    _, confident, right = reliability(confidence, wrong)
    return (right - confident).abs().sum() / len(confidence)


def risk_coverage_curve(confidence: Tensor, wrong: Tensor) -> Tensor:
    """Error among the k most confident samples, for k = 1..M: (M,) (Geifman et al., ICLR 2019).

    Where confidences tie, the mean over all orders of the tied samples: their errors, spread evenly over their
    ranks. confidence (M,), wrong (M,) float64 of 0 and 1.
    """
    order = confidence.argsort(descending=True)
    _, group, size = confidence[order].unique_consecutive(return_inverse=True, return_counts=True)
    errors = wrong.new_zeros(len(size)).index_add_(0, group, wrong[order])
    rank = torch.arange(1, len(wrong) + 1, device=wrong.device)
    return (errors / size)[group].cumsum(0) / rank
