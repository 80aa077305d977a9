"""Early exit: images that stop at the first exit which is confident enough, and what that costs."""

from collections.abc import Collection, Generator

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
    logits = model.fc.weight.new_zeros(len(images), model.fc.out_features)
    remaining = torch.arange(len(images), device=images.device)
    decided_by = torch.zeros_like(remaining)
    classifiers = _classifiers(model, images, temperatures if threshold < NEVER else ["final"])
    go_on = None
    while len(remaining):
        number, name, found = classifiers.send(go_on)
        stop = (confidence(found, temperatures[name]) >= threshold) | (name == "final")
        logits[remaining[stop]], decided_by[remaining[stop]] = found[stop], number
        go_on = ~stop
        remaining = remaining[go_on]
    return logits, decided_by


def _classifiers(model: MultiExitNetwork, images: Tensor, deciding: Collection[str]) -> Generator:
    """Gives number, name and logits of each classifier that may decide, shallow to deep, and computes nothing beyond it
    until it is asked for the next, with a mask (N,) of the images that go on, or None for all."""
    x = model.stem(images)
    for i, name in enumerate(classifier_names(len(model.stages))):
        x = model.stages[i](x)
        if name in deciding:
            logits, _ = classify(model.fc, x) if name == "final" else model.exits[i](x)
            go_on = yield i + 1, name, logits
            if go_on is not None:
                x = x[go_on]


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
        with FlopCounterMode(display=False) as counter:
            return {name: counter.get_total_flops() // 2 for _, name, _ in _classifiers(model, image, names)}

    return count(deciding), count(["final"])["final"]
