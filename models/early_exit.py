"""Early exit: images that stop at the first exit which is confident enough, and what that costs."""

from collections import Counter
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
    deciding = temperatures if threshold < NEVER else {}
    logits = images.new_zeros(len(images), model.fc.out_features, dtype=model.fc.weight.dtype)
    decided_by = torch.full((len(images),), len(model.stages), device=images.device)
    remaining = torch.arange(len(images), device=images.device)
    x = model.stem(images)
    for i, stage in enumerate(model.stages, start=1):
        x = stage(x)
        name = f"exit {i}"
        if name in deciding:
            exit_logits, _ = model.exits[i - 1](x)
            stop = confidence(exit_logits, deciding[name]) >= threshold
            logits[remaining[stop]], decided_by[remaining[stop]] = exit_logits[stop], i
            if stop.all():
                return logits, decided_by
            if stop.any():
                x, remaining = x[~stop], remaining[~stop]
    logits[remaining], _ = classify(model.fc, x)
    return logits, decided_by


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """The largest probability of softmax(logits / temperature), in float64 as in the metrics: (..., K) -> (...,)."""
    return (logits.double() / temperature).log_softmax(dim=-1).amax(dim=-1).exp()


@torch.no_grad()
def multiply_adds(model: MultiExitNetwork, image_size: int, deciding: Collection[str]) -> tuple[dict[str, int], int]:
    """Multiply-adds of convolutions and linear layers per image of `image_size` pixels, counted while one runs.

    Args:
        deciding: the names of the classifiers that may decide.

    Returns:
        by name, those of stopping at each of these, the ones before it included, as predict_early runs; and those of
        the backbone with the final classifier alone.
    """
    image = torch.zeros(1, 3, image_size, image_size, device=model.fc.weight.device, dtype=model.fc.weight.dtype)
    was_training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(was_training)
    counts = Counter()  # by a module's name, "" being the network's
    for path, by_operation in counter.get_flop_counts().items():
        counts[path.partition(".")[2]] = sum(by_operation.values()) // 2
    exits = [f"exits.{i}" for i in range(len(model.stages) - 1)]  # 0 where the network has none

    backbone = counts[""] - sum(counts[path] for path in exits)
    done = backbone - sum(counts[path] for path in (*model.stage_names, "fc"))  # by the stem
    totals = {}
    classifiers = zip(model.stage_names, [*exits, "fc"], classifier_names(len(model.stages)), strict=True)
    for stage, classifier, name in classifiers:
        done += counts[stage]
        if name in deciding:
            done += counts[classifier]
            totals[name] = done
    return totals, backbone
