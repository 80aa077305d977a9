"""The reported metrics of a classifier, from its logits: in float64, in chunks of rows, in O(M (K + log M))."""

import torch
from torch import Tensor

from utils.errors import NonFiniteError
from utils.records import shown_metrics

NUM_BINS = 10  # of ECE, as the paper
NUM_ADAPTIVE_BINS = 15  # of adaptive ECE
CHUNK = 2**18  # logits that are in memory as float64 at a time: 2 MB, about a processor's cache


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics that are shown by default, as `all_metrics` computes them, of logits (M, K) and labels (M,)."""
    return shown_metrics(all_metrics(per_sample(logits, labels).cpu()))


def all_metrics(samples: Tensor) -> dict[str, float | None]:
    """Every metric in METRICS of M predictions over K classes.

    Args:
        samples: (4, M), what `per_sample` returns, on the CPU: sorting on a GPU would wait for it many times.

    Returns:
        `top1_error`, `top5_error`, `ece` and `adaptive_ece` in percent, `nll` in nats; `aurc`, `eaurc` and `augrc`
        times 1000; `auroc_failure` in percent, None where no prediction or every prediction is wrong; `brier`: mean
        over samples of sum_k (p_k - y_k)^2, in 0..2 (Brier, 1950). Where logits tie, the lower class comes first; with
        fewer than 6 classes top-5 error is 0. None of the values depends on the order of the samples.

    Raises:
        NonFiniteError: NaN or +inf among the logits.
    """
    confidence, rank, nll, brier = samples
    if not confidence.isfinite().all():  # a NaN or +inf in a row makes it NaN
        raise NonFiniteError("logits are not finite")
    error = (rank > 0).double()
    aurc = risk_coverage_curve(confidence, error).mean()
    # The best ordering has every error last, which is what ordering by -error gives.
    best_aurc = risk_coverage_curve(-error, error).mean()
    auroc = auroc_failure(confidence, error)
    return {
        "top1_error": 100 * error.mean().item(),
        "top5_error": 100 * (rank >= 5).double().mean().item(),
        "nll": nll.mean().item(),
        "ece": 100 * expected_calibration_error(confidence, error).item(),
        "aurc": 1000 * aurc.item(),
        "eaurc": 1000 * (aurc - best_aurc).item(),
        "augrc": 1000 * augrc(confidence, error).item(),
        "auroc_failure": None if auroc is None else 100 * auroc.item(),
        "brier": brier.mean().item(),
        "adaptive_ece": 100 * adaptive_calibration_error(confidence, error).item(),
    }


def rows_per_chunk(num_classes: int) -> int:
    """Rows of logits that are computed on at a time."""
    return max(1, CHUNK // num_classes)


def per_sample(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """What the metrics are computed from, after the logits (M, K) were divided by the temperature.

    Returns:
        (4, M) float64, on the logits' device: largest probability, number of classes that come before the label, NLL,
        Brier score.

    Raises:
        ValueError: no samples, shapes that do not fit, labels out of range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"need logits (M, K) and labels (M,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    num_classes = logits.shape[1]
    if ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(f"labels must lie in 0..{num_classes - 1}")
    rows = rows_per_chunk(num_classes)
    chunks = zip(logits.detach().split(rows), labels.split(rows), strict=True)
    return torch.cat([_per_sample(z.double() / temperature, label) for z, label in chunks], dim=1)


def _per_sample(logits: Tensor, labels: Tensor) -> Tensor:
    """`per_sample` of one chunk in float64."""
    label = labels[:, None]
    probabilities = logits.softmax(dim=1)
    confidence = probabilities.amax(dim=1)
    nll = -logits.log_softmax(dim=1).gather(1, label)  # exact also where logits are huge and tie
    of_label = logits.gather(1, label)
    before = torch.arange(logits.shape[1], device=logits.device) < label
    rank = ((logits > of_label) | ((logits == of_label) & before)).sum(dim=1)
    # probability minus 1 at the label, minus 0 elsewhere
    difference = probabilities.scatter_add_(1, label, -torch.ones_like(of_label))
    brier = difference.square_().sum(dim=1)
    return torch.stack([confidence, rank.double(), nll[:, 0], brier])


def confidence_and_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Largest probability, and 1 where the prediction is wrong, else 0: (M,) float64 each, on the CPU, of logits
    (M, K), which are divided by the temperature first, and labels (M,)."""
    confidence, rank, _, _ = per_sample(logits, labels, temperature).cpu()
    return confidence, (rank > 0).double()


def reliability(confidence: Tensor, error: Tensor) -> list[Tensor]:
    """Sums by bin of confidence, (NUM_BINS,) each: samples, confidence, right answers.

    Bins are equally wide, open below and closed above (Guo et al., ICML 2017). confidence (M,) float64 in
    (0, 1], error (M,) of 0 and 1.
    """
    borders = confidence.new_tensor([i / NUM_BINS for i in range(1, NUM_BINS)])
    bins = torch.bucketize(confidence, borders)
    summands = (torch.ones_like(confidence), confidence, 1 - error)
    return [torch.bincount(bins, values, NUM_BINS) for values in summands]


def expected_calibration_error(confidence: Tensor, error: Tensor) -> Tensor:
    """sum over bins of |accuracy - mean confidence| x fraction of the samples, in 0..1 (Guo et al.)."""
    _, confident, right = reliability(confidence, error)
    return (right - confident).abs().sum() / len(confidence)


def by_rank(confidence: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and error of the k-th most confident sample, for k = 1..M: (M,) each.

    Where confidences tie, the error's mean over all orders of the tied samples: their errors, spread evenly over
    their ranks. So nothing that is computed from both depends on the order of the data. confidence (M,), error (M,)
    float64 of 0 and 1.
    """
    falling, order = confidence.sort(descending=True)
    _, group, size = falling.unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.bincount(group, error[order])
    return falling, (errors / size)[group]


def risk_coverage_curve(confidence: Tensor, error: Tensor) -> Tensor:
    """Error among the k most confident samples, for k = 1..M: (M,) (Geifman et al., ICLR 2019); ties as `by_rank`."""
    _, error = by_rank(confidence, error)
    return error.cumsum(0) / torch.arange(1, len(error) + 1, device=error.device)


def augrc(confidence: Tensor, error: Tensor) -> Tensor:
    """Area under the generalised risk-coverage curve, in 0..0.5 (Traub et al., NeurIPS 2024).

    The curve is (errors among the k most confident samples) / M over k / M, from (0, 0), with straight lines between
    its points. Tied confidences are one point: their errors are spread evenly, on the straight line to it.
    """
    _, error = by_rank(confidence, error)
    return (error.cumsum(0) - error / 2).sum() / len(error) ** 2


def auroc_failure(confidence: Tensor, error: Tensor) -> Tensor | None:
    """P(a right answer's confidence > a wrong one's), a tie counting half, in 0..1; None where there is no right or
    no wrong answer, and so no such pair.

    With accuracy a, augrc = (1 - auroc_failure) a (1 - a) + (1 - a)^2 / 2 (Traub et al.); without a pair, the first
    term is 0.
    """
    _, error = by_rank(confidence, error)
    num_errors = error.sum().round()
    num_pairs = num_errors * (len(error) - num_errors)
    if num_pairs == 0:
        return None
    errors_after = num_errors - error.cumsum(0) + error / 2
    return ((1 - error) * errors_after).sum() / num_pairs


def adaptive_calibration_error(confidence: Tensor, error: Tensor) -> Tensor:
    """ECE with bins of equally many samples instead of equal width, in 0..1 (Nguyen and O'Connor, EMNLP 2015).

    Of M samples by falling confidence, the one with rank k = 1..M falls into bin floor((k - 1) NUM_ADAPTIVE_BINS / M),
    so that sizes differ by one at most. Samples tied over a border are divided among its bins in proportion, each with
    their mean error.
    """
    confidence, error = by_rank(confidence, error)
    bins = torch.arange(len(error), device=error.device) * NUM_ADAPTIVE_BINS // len(error)
    gaps = torch.bincount(bins, 1 - error - confidence)
    return gaps.abs().sum() / len(error)
