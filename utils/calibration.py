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
        if slope > 0:
            high = middle
        else:
            low = middle
    return 10 ** -((low + high) / 2)


def calibrate(heldout: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], trained_exits: list[bool]) -> dict:
    """One temperature per classifier, fitted on held-out images, and the test split's ECE and NLL after it.

    Args:
        heldout, test: logits (B, M, K), shallow to deep, the final classifier last; labels (M,).
        trained_exits: B - 1 flags: whether a loss trains that exit's classifier.

    Returns:
        `temperatures` (B); `calibrated`: `ece` and `nll` of the final classifier, `val`, and of each exit, `exits`.
        None stands for an untrained exit.
    """
    (heldout_logits, heldout_labels), (test_logits, test_labels) = heldout, test
    temperatures, calibrated = [None] * len(test_logits), [None] * len(test_logits)
    for i, is_trained in enumerate([*trained_exits, True]):
        if is_trained:
            temperatures[i] = fit_temperature(heldout_logits[i], heldout_labels)
            metrics = classification_metrics(test_logits[i].double() / temperatures[i], test_labels)
            calibrated[i] = {"ece": metrics["ece"], "nll": metrics["nll"]}
    return {"temperatures": temperatures, "calibrated": {"val": calibrated[-1], "exits": calibrated[:-1]}}


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
    curve, heldout_costs = [], []
    for threshold in (0.0, *held[0][:-1].flatten().quantile(quantiles).tolist(), 1.01):
        point = {"threshold": threshold}
        point["heldout_accuracy"], heldout_cost = measure(*held, threshold)
        point["accuracy"], point["multiply_adds"] = measure(*tested, threshold)
        curve.append(point)
        heldout_costs.append(heldout_cost)
    required = curve[-1]["heldout_accuracy"] - TOLERANCE
    qualified = [i for i, point in enumerate(curve) if point["heldout_accuracy"] >= required]
    chosen = curve[min(qualified, key=lambda i: heldout_costs[i])]
    return {
        "multiply_adds": multiply_adds,
        "backbone_multiply_adds": backbone_multiply_adds,
        "curve": curve,
        "chosen": chosen,
    }
