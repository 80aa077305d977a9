"""What is fitted on held-out images, from logits alone: temperatures, the confidence's norm, early exit's threshold."""

import torch
from torch import Tensor

from utils.errors import NonFiniteError
from utils.metrics import all_metrics, augrc, confidence_and_error, per_sample, rows_per_chunk

TOLERANCE = 0.5  # points of accuracy that early exit may lose at the chosen threshold
NUM_THRESHOLDS = 25
MAX_NORM = 8  # of MaxLogit-pNorm, as in its paper's search
AFTER_TEMPERATURE = ("ece", "nll", "adaptive_ece", "brier")  # of the metrics, those that a temperature is fitted for


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in 0.01..100 that minimises the NLL of softmax(logits / T) (Guo et al., ICML 2017).

    The NLL is convex in s = 1 / T; its derivative, the mean over images of sum_k p_k z_k - z_label, is bisected.

    Args:
        logits: (M, K). labels: (M,).
    """
    chunks = logits.split(rows_per_chunk(logits.shape[1]))
    z_label = logits.gather(1, labels[:, None]).double().sum()
    # All on the logits' device, so that only the result is waited for.
    low, high = z_label.new_tensor(-2.0), z_label.new_tensor(2.0)  # of log10 s
    for _ in range(50):
        middle = (low + high) / 2
        expected = sum(_expected_logits(z.double(), 10**middle) for z in chunks)
        is_beyond = expected > z_label
        low = torch.where(is_beyond, low, middle)
        high = torch.where(is_beyond, middle, high)
    return 10 ** -((low + high) / 2).item()


def _expected_logits(z: Tensor, s: Tensor) -> Tensor:
    """Sum over images of sum_k p_k z_k, where p is the softmax of s z."""
    return (z * s).softmax(dim=1).mul_(z).sum()


def pnorm_confidences(logits: Tensor) -> Tensor:
    """MaxLogit-pNorm, max_k (z_k - mean z) / ||z - mean z||_p (Cattelan and Silva, UAI 2024), by p = 0..MAX_NORM.

    Args:
        logits: (M, K).

    Returns:
        (MAX_NORM + 1, M) float64, on the CPU. Row 0 is the largest probability, without a norm, as in the paper;
        the others do not depend on the logits' scale, and are 0 where all of an image's logits are equal.

    Raises:
        NonFiniteError: a logit is not finite.
    """
    chunks = logits.split(rows_per_chunk(logits.shape[1]))
    confidences = torch.cat([_pnorm_confidences(z.double()) for z in chunks], dim=1).cpu()
    if not confidences.isfinite().all():
        raise NonFiniteError("logits are not finite")
    return confidences


def _pnorm_confidences(z: Tensor) -> Tensor:
    """`pnorm_confidences` of one chunk in float64."""
    largest_probability = (z.amax(dim=1) - z.logsumexp(dim=1)).exp()
    z = z - z.mean(dim=1, keepdim=True)
    largest = z.amax(dim=1)
    absolute = z.abs_()
    confidences = [largest_probability]
    power = torch.ones_like(absolute)
    for p in range(1, MAX_NORM + 1):
        power *= absolute
        norm = power.sum(dim=1) ** (1 / p)
        confidences.append(torch.where(norm > 0, largest / norm, norm))
    return torch.stack(confidences)


def calibrate(heldout: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], trained_exits: list[bool]) -> dict:
    """One temperature and one norm per classifier, fitted on held-out images, and the test split's metrics with them.

    Args:
        heldout, test: logits (B, M, K), shallow to deep, the final classifier last; labels (M,).
        trained_exits: B - 1 flags: whether a loss trains that exit's classifier.

    Returns:
        `temperatures` (B); `calibrated`: of the final classifier, `val`, and of each exit, `exits`, the metrics
        AFTER_TEMPERATURE of the logits divided by the temperature, `augrc_pnorm`, the AUGRC (x 1000) of the logits'
        MaxLogit-pNorm confidence, and `pnorm_p`, its p, of least AUGRC on the held-out images, the smallest of several.
        None stands for an untrained exit.

    Raises:
        NonFiniteError: a trained classifier's logit is not finite.
    """
    (heldout_logits, heldout_labels), (test_logits, test_labels) = heldout, test
    temperatures, calibrated = [], []
    for is_trained, held, tested in zip([*trained_exits, True], heldout_logits, test_logits, strict=True):
        if not is_trained:
            temperatures.append(None)
            calibrated.append(None)
            continue
        temperature = fit_temperature(held, heldout_labels)
        metrics = all_metrics(per_sample(tested, test_labels, temperature).cpu())
        record = {name: metrics[name] for name in AFTER_TEMPERATURE}
        heldout_augrc = pnorm_augrc(held, heldout_labels)
        p = heldout_augrc.index(min(heldout_augrc))
        record["augrc_pnorm"] = pnorm_augrc(tested, test_labels)[p]
        record["pnorm_p"] = p
        temperatures.append(temperature)
        calibrated.append(record)
    return {"temperatures": temperatures, "calibrated": {"val": calibrated[-1], "exits": calibrated[:-1]}}


def pnorm_augrc(logits: Tensor, labels: Tensor) -> list[float]:
    """AUGRC (x 1000) of the MaxLogit-pNorm confidence of logits (M, K) with labels (M,), by p = 0..MAX_NORM."""
    _, error = confidence_and_error(logits, labels)
    return [1000 * augrc(confidence, error).item() for confidence in pnorm_confidences(logits)]


def early_exit_curve(
    heldout, test, temperatures: list[float | None], multiply_adds: list[int], backbone_multiply_adds: int
) -> dict:
    """Accuracy and cost when an image stops at the first exit whose confidence reaches a threshold.

    Args:
        heldout, test: logits (B, M, K) and labels (M,), as for `calibrate`; thresholds come from `heldout` alone.
        temperatures: (B,), by which logits are divided first; None for exits that never decide.
        multiply_adds: (B,) per image, of stopping at exit 1..B-1 and of going to the end.
        backbone_multiply_adds: of the network without exits, which is what runs where no exit may decide.

    Returns:
        `multiply_adds` and `backbone_multiply_adds` as given; `curve`, a list of {threshold, heldout_accuracy (%),
        accuracy (%), multiply_adds (mean per image)}, the latter two of `test`, from always stopping at the first exit
        to never stopping; and `chosen`, its entry that costs least on `heldout` among those whose held-out accuracy is
        at least the final classifier's less TOLERANCE.
    """
    costs = torch.tensor([c for c, t in zip(multiply_adds, temperatures, strict=True) if t is not None]).double()
    heldout_confidence, heldout_error = _deciding_classifiers(*heldout, temperatures)
    test_confidence, test_error = _deciding_classifiers(*test, temperatures)

    # from every image at the first exit, over quantiles of the exits' confidences, to none at an exit
    quantiles = torch.linspace(0, 1, NUM_THRESHOLDS, dtype=torch.float64)[1:-1]
    exit_confidence = heldout_confidence[:-1].flatten()
    thresholds = [0.0, *exit_confidence.quantile(quantiles).tolist(), 1.01]

    curve = []
    heldout_costs = []
    for threshold in thresholds:
        heldout_accuracy, heldout_cost = _stop(heldout_confidence, heldout_error, costs, threshold)
        accuracy, cost = _stop(test_confidence, test_error, costs, threshold)
        if threshold > 1:  # then no exit is computed
            heldout_cost = cost = float(backbone_multiply_adds)
        point = {"threshold": threshold, "heldout_accuracy": heldout_accuracy}
        curve.append({**point, "accuracy": accuracy, "multiply_adds": cost})
        heldout_costs.append(heldout_cost)

    chosen = len(curve) - 1
    required = curve[-1]["heldout_accuracy"] - TOLERANCE
    for i in reversed(range(len(curve))):  # of equal costs, the lowest threshold
        if curve[i]["heldout_accuracy"] >= required and heldout_costs[i] <= heldout_costs[chosen]:
            chosen = i
    return {
        "multiply_adds": multiply_adds,
        "backbone_multiply_adds": backbone_multiply_adds,
        "curve": curve,
        "chosen": curve[chosen],
    }


def _deciding_classifiers(logits: Tensor, labels: Tensor, temperatures) -> tuple[Tensor, Tensor]:
    """Confidence and error of the classifiers that have a temperature: (classifiers, M) each."""
    confidences, errors = [], []
    for classifier_logits, temperature in zip(logits, temperatures, strict=True):
        if temperature is not None:
            confidence, error = confidence_and_error(classifier_logits, labels, temperature)
            confidences.append(confidence)
            errors.append(error)
    confidences[-1] = torch.full_like(confidences[-1], float("inf"))  # the final classifier always decides
    return torch.stack(confidences), torch.stack(errors)


def _stop(confidence: Tensor, error: Tensor, costs: Tensor, threshold: float) -> tuple[float, float]:
    """Accuracy in % and mean cost where each image stops at the first classifier that is confident enough.

    confidence, error: (classifiers, M); costs: (classifiers,).
    """
    first = (confidence >= threshold).byte().argmax(dim=0)
    correct = 1 - error.gather(0, first[None])
    return 100 * correct.mean().item(), costs[first].mean().item()
