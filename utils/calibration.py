"""What is chosen on held-out images, from logits alone: temperatures, and the threshold of early exit."""

import torch
from torch import Tensor

from utils.engine import by_classifier
from utils.metrics import all_metrics, confidence_and_error, per_sample, rows_per_chunk
from utils.records import AFTER_TEMPERATURE, Classifiers

TOLERANCE = 0.5  # points of accuracy that early exit may lose at the chosen threshold
NUM_THRESHOLDS = 25
NEVER = 1.01  # a threshold that no confidence reaches
LOG_BOUNDS = (-2.0, 2.0)  # of log10 T


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The T between 0.01 and 100 that minimises the NLL of softmax(logits / T) (Guo et al., ICML 2017); None where the
    minimum is not between them, as where every prediction is right and the NLL only falls with T.

    The NLL is convex in s = 1 / T; its derivative, the mean over images of sum_k p_k (z_k - z_label), is bisected.

    Args:
        logits: (M, K). labels: (M,).
    """
    rows = rows_per_chunk(logits.shape[1])

    def rises(log_s: Tensor) -> Tensor:
        """Whether the NLL rises with s at s = 10^log_s."""
        chunks = zip(logits.split(rows), labels.split(rows), strict=True)
        return sum(_slope(z.double(), label, 10**log_s) for z, label in chunks) > 0

    # All on the logits' device, so that only the result is waited for.
    low, high = torch.tensor(LOG_BOUNDS, dtype=torch.float64, device=logits.device)
    has_minimum = ~rises(low) & rises(high)
    for _ in range(50):
        middle = (low + high) / 2
        is_beyond = rises(middle)
        low = torch.where(is_beyond, low, middle)
        high = torch.where(is_beyond, middle, high)
    return 10 ** -((low + high) / 2).item() if has_minimum else None


def _slope(z: Tensor, labels: Tensor, s: Tensor) -> Tensor:
    """The derivative of the images' summed NLL by s, where their logits are s z."""
    above_label = z - z.gather(1, labels[:, None])
    return (z * s).softmax(dim=1).mul_(above_label).sum()


def fit_temperatures(logits: Tensor, labels: Tensor, trained: list[str]) -> dict[str, float | None]:
    """`fit_temperature` of each trained classifier, by name; logits (B, M, K), shallow to deep, labels (M,)."""
    return {name: fit_temperature(z, labels) for name, z in by_classifier(logits, trained).items()}


def scaled_metrics(logits: Tensor, labels: Tensor, temperatures: dict[str, float]) -> Classifiers:
    """The metrics AFTER_TEMPERATURE of each classifier's logits divided by its temperature.

    Raises:
        NonFiniteError: a logit is not finite.
    """
    found = {}
    for name, z in by_classifier(logits, temperatures).items():
        metrics = all_metrics(per_sample(z, labels, temperatures[name]).cpu())
        found[name] = {key: metrics[key] for key in AFTER_TEMPERATURE}
    return found


def early_exit_curve(
    heldout: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None,
    temperatures: dict[str, float],
    multiply_adds: dict[str, int],
    backbone_multiply_adds: int,
) -> dict:
    """Accuracy and cost when an image stops at the first exit whose confidence reaches a threshold.

    Args:
        heldout, test: logits (B, M, K), shallow to deep, and labels (M,); thresholds come from `heldout` alone.
        temperatures: of each classifier that may decide, which divides its logits first.
        multiply_adds: per image, of stopping at each of these classifiers.
        backbone_multiply_adds: of the network without exits, which is what runs where no exit may decide.

    Returns:
        `multiply_adds` and `backbone_multiply_adds` as given; `curve`, a list of {threshold, heldout_accuracy (%),
        heldout_multiply_adds (mean per image)} and, where there is a test split, its {accuracy, multiply_adds}, from
        always stopping at the first exit to never stopping; and `chosen`, its entry that costs least among those whose
        held-out accuracy is at least the final classifier's less TOLERANCE.
    """
    splits = {"heldout_": heldout, "": test} if test is not None else {"heldout_": heldout}
    deciding = {prefix: _deciding_classifiers(*split, temperatures) for prefix, split in splits.items()}
    costs = torch.tensor([multiply_adds[name] for name in temperatures], dtype=torch.float64)

    # from every image at the first exit, over quantiles of the exits' confidences, to none at an exit
    quantiles = torch.linspace(0, 1, NUM_THRESHOLDS, dtype=torch.float64)[1:-1]
    heldout_confidence, _ = deciding["heldout_"]
    exit_confidence = heldout_confidence[:-1].flatten()
    thresholds = [0.0, *exit_confidence.quantile(quantiles).tolist(), NEVER]

    curve = []
    for threshold in thresholds:
        point = {"threshold": threshold}
        for prefix, (confidence, error) in deciding.items():
            accuracy, cost = _stop(confidence, error, costs, threshold)
            point[f"{prefix}accuracy"] = accuracy
            # never stopping computes no exit
            point[f"{prefix}multiply_adds"] = float(backbone_multiply_adds) if threshold == NEVER else cost
        curve.append(point)

    required = curve[-1]["heldout_accuracy"] - TOLERANCE
    good = [point for point in curve if point["heldout_accuracy"] >= required]
    return {
        "multiply_adds": multiply_adds,
        "backbone_multiply_adds": backbone_multiply_adds,
        "curve": curve,
        "chosen": min(good, key=lambda point: point["heldout_multiply_adds"]),  # of equal costs, the lowest threshold
    }


def _deciding_classifiers(logits: Tensor, labels: Tensor, temperatures: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Confidence and error of the classifiers that have a temperature: (classifiers, M) each."""
    members = by_classifier(logits, temperatures)
    found = [confidence_and_error(z, labels, temperatures[name]) for name, z in members.items()]
    confidence, error = map(torch.stack, zip(*found, strict=True))
    confidence[-1] = float("inf")  # the final classifier always decides
    return confidence, error


def _stop(confidence: Tensor, error: Tensor, costs: Tensor, threshold: float) -> tuple[float, float]:
    """Accuracy in % and mean cost where each image stops at the first classifier that is confident enough.

    confidence, error: (classifiers, M); costs: (classifiers,).
    """
    first = (confidence >= threshold).byte().argmax(dim=0)
    correct = 1 - error.gather(0, first[None])
    return 100 * correct.mean().item(), costs[first].mean().item()
