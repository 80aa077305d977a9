"""Early exit: images that stop at the first exit which is confident enough, and what that costs."""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.exits import MultiExitNetwork, classify
from utils.calibration import NEVER
from utils.records import classifier_names


@torch.no_grad()
def predict_early(
    model: MultiExitNetwork, images: Tensor, threshold: float, temperatures: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """Classify each image at the first exit that is confident enough, computing nothing beyond it.

    Args:
        model: in evaluation mode.
        images: (N, 3, S, S), normalised.
        threshold: the confidence from which on an exit decides. 0 stops every image at the first exit that may decide;
            from NEVER on no exit is computed, and the logits are the complete network's to the bit.
        temperatures: of each classifier that may decide, by name, as `load_run` gives them.

    Returns:
        logits (N, K) of each image's deciding classifier; its number (N,) int64, 1..B-1 for exits, B for the
        final classifier.
    """
    deciding = temperatures if threshold < NEVER else ["final"]
    logits = model.fc.weight.new_zeros(len(images), model.fc.out_features)
    remaining = torch.arange(len(images), device=images.device)
    decided_by = torch.zeros_like(remaining)
    x = model.stem(images)
    for i, name in enumerate(classifier_names(len(model.stages))):
        if not len(remaining):
            break
        x = model.stages[i](x)
        if name in deciding:
            found = _classify(model, i, x)
            stop = (confidence(found, temperatures[name]) >= threshold) | (name == "final")
            logits[remaining[stop]], decided_by[remaining[stop]] = found[stop], i + 1
            x, remaining = x[~stop], remaining[~stop]
    return logits, decided_by


def _classify(model: MultiExitNetwork, i: int, feature_map: Tensor) -> Tensor:
    """Logits (N, K) of the classifier on stage i, counted from 0."""
    is_exit = i < len(model.stages) - 1
    logits, _ = model.exits[i](feature_map) if is_exit else classify(model.fc, feature_map)
    return logits


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """The largest probability of softmax(logits / temperature), in float64 as in the metrics: (..., K) -> (...,)."""
    return (logits.double() / temperature).softmax(dim=-1).amax(dim=-1)


@torch.no_grad()
def multiply_adds(model: MultiExitNetwork, image_size: int, deciding: Collection[str]) -> tuple[dict[str, int], int]:
    """Multiply-adds of convolutions and linear layers per image of `image_size` pixels, counted while one runs.

    Args:
        model: in evaluation mode.
        deciding: the names of the classifiers that may decide.

    Returns:
        by name, those of stopping at each of these, the ones before it included, as predict_early runs; and those of
        the backbone with the final classifier alone.
    """
    image = model.fc.weight.new_zeros(1, 3, image_size, image_size)

    def count(names: Collection[str]) -> dict[str, int]:
        costs = {}
        with FlopCounterMode(display=False) as counter:
            x = model.stem(image)
            for i, name in enumerate(classifier_names(len(model.stages))):
                x = model.stages[i](x)
                if name in names:
                    _classify(model, i, x)
                    costs[name] = counter.get_total_flops() // 2
        return costs

    return count(deciding), count(["final"])["final"]
