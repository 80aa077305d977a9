"""Temperatures fitted on held-out images, and what early exit saves with them, from logits alone."""

import torch
from torch import Tensor

from utils.metrics import classification_metrics, confidence_and_wrong

TOLERANCE = 0.5  # points of accuracy that early exit may lose at the chosen threshold
NUM_THRESHOLDS = 25


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in 0.01..100 that minimises the NLL of softmax(logits / T) (Guo et al., ICML 2017).

    The NLL is convex in s = 1 / T; its derivative, the mean over images of sum_k p_k z_k - z_label, is bisected.

    Args:
        logits: (M, K). labels: (M,).
    """
    z = logits.double()
    z_label = z.gather(1, labels[:, None])[:, 0].mean()
    low, high = -2.0, 2.0  # of log10 s
    for _ in range(50):
        middle = (low + high) / 2
        slope = ((z * 10**middle).softmax(dim=1) * z).sum(dim=1).mean() - z_label
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 10 ** -((low + high) / 2)


def calibrate(heldout: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], trained_exits: list[bool]) -> dict:
    """One temperature per classifier, fitted on held-out images, and the test split's ECE and NLL after it.

    Args:
        heldout, test: logits (B, M, K), shallow to deep, the final classifier last; labels (M,).
        trained_exits: B - 1 flags: whether a loss trains that exit's classifier.

    Returns:
        `temperatures` (B; None for untrained exits) and `calibrated`: `val`, the final classifier's `ece` and `nll`,
        and `exits`, each exit's, None for an untrained one.
    """
    temperatures, calibrated = [], []
    for i, is_trained in enumerate([*trained_exits, True]):
        temperatures.append(fit_temperature(heldout[0][i], heldout[1]) if is_trained else None)
        metrics = classification_metrics(test[0][i].double() / temperatures[i], test[1]) if is_trained else None
        calibrated.append(metrics and {name: metrics[name] for name in ("ece", "nll")})
    return {"temperatures": temperatures, "calibrated": {"val": calibrated[-1], "exits": calibrated[:-1]}}


def early_exit_curve(
    heldout, test, temperatures: list[float | None], multiply_adds: list[int], backbone_multiply_adds: int
) -> dict:
    """Accuracy and cost on the test split when an image stops at the first exit whose confidence, after its
    temperature, reaches a threshold; thresholds come from the held-out images alone.

    Args:
        heldout, test: logits (B, M, K) and labels (M,), as for `calibrate`.
        temperatures: (B,), None for exits that never decide.
        multiply_adds: (B,) per image, of stopping at exit 1..B-1 and of going to the end.
        backbone_multiply_adds: of the network without exits, which is what runs where no exit may decide.

    Returns:
        `multiply_adds` and `backbone_multiply_adds` as given; `curve`, a list of {threshold, heldout_accuracy (%),
        accuracy (%), multiply_adds (mean per image)}, the first stopping at the first exit, the last never; and
        `chosen`, the entry that costs least on the held-out images among those whose held-out accuracy is at least
        the final classifier's less TOLERANCE.
    """
    usable = [i for i, t in enumerate(temperatures) if t is not None]
    costs = torch.tensor([multiply_adds[i] for i in usable], dtype=torch.float64)

    def read(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence and correctness, (usable, M) each; the final classifier always decides."""
        pairs = [confidence_and_wrong(logits[i].double() / temperatures[i], labels) for i in usable]
        confidence, wrong = (torch.stack(values).cpu() for values in zip(*pairs, strict=True))
        confidence[-1] = float("inf")
        return confidence, 1 - wrong

    def measure(confidence: Tensor, correct: Tensor, threshold: float) -> tuple[float, float]:
        """(accuracy in %, mean multiply-adds)."""
        first = (confidence >= threshold).byte().argmax(dim=0)
        cost = costs[first].mean().item() if threshold <= 1 else float(backbone_multiply_adds)
        return 100 * correct.gather(0, first[None]).mean().item(), cost

    held, tested = read(*heldout), read(*test)
    quantiles = torch.linspace(0, 1, NUM_THRESHOLDS, dtype=torch.float64)[1:-1]
    thresholds = [0.0, *held[0][:-1].flatten().quantile(quantiles).tolist(), 1.01]
    curve, heldout_costs = [], []
    for threshold in thresholds:
        heldout_accuracy, heldout_cost = measure(*held, threshold)
        accuracy, cost = measure(*tested, threshold)
        keys = ("threshold", "heldout_accuracy", "accuracy", "multiply_adds")
        curve.append(dict(zip(keys, (threshold, heldout_accuracy, accuracy, cost), strict=True)))
        heldout_costs.append(heldout_cost)
    required = curve[-1]["heldout_accuracy"] - TOLERANCE
    qualified = [i for i, point in enumerate(curve) if point["heldout_accuracy"] >= required]
    return {
        "multiply_adds": multiply_adds,
        "backbone_multiply_adds": backbone_multiply_adds,
        "curve": curve,
        "chosen": curve[min(qualified, key=heldout_costs.__getitem__)],
    }
