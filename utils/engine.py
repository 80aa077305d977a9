"""The loops: one epoch of training, one pass of validation. They know no method."""

import contextlib
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils import distributed
from utils.metrics import classification_metrics


def learning_rate(lr: float, decay_rate: float, schedule: list[int], epoch: int) -> float:
    """`lr`, times `decay_rate` for each epoch of the schedule that has been reached."""
    return lr * decay_rate ** sum(epoch >= e for e in schedule)


def autocast(precision: str, device: torch.device):
    """The context in which the network computes. No cache of casts: it would outlive a captured step."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


class Meter:
    """Means over an epoch's images, kept on the device, so that a step waits for nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] | None = None
        self.sums: Tensor | None = None  # (parts + 1,) float64

    def reset(self) -> None:
        if self.sums is not None:
            self.sums.zero_()

    def update(self, parts: dict[str, Tensor], logits: Tensor, labels: Tensor, batch: int) -> None:
        """Add a step: the parts of its loss, this process's logits (N, K) and labels (N,), and the number of
        images in the batch over all processes."""
        if self.sums is None:
            self.names = list(parts)
            self.sums = torch.zeros(len(parts) + 1, dtype=torch.float64, device=self.device)
        wrong = (logits.argmax(dim=1) != labels).sum()
        # A part's mean over processes is the batch's (loss/objective.py); the wrong answers add up as they are.
        weight = batch / distributed.world_size()
        self.sums += torch.stack([*(weight * part.double() for part in parts.values()), wrong.double()])

    def means(self, num_images: int) -> dict[str, float]:
        """`loss`, each of its parts, and `top1_error` (%) over the epoch. Waits for the device and for the other
        processes."""
        return self._means(distributed.sum_(self.sums.clone()), num_images)

    def own_means(self, num_images: int) -> dict[str, float]:
        """What `means` will give, estimated after `num_images` images from this process's share alone."""
        return self._means(self.sums * distributed.world_size(), num_images)

    def _means(self, sums: Tensor, num_images: int) -> dict[str, float]:
        *parts, wrong = (sums / num_images).tolist()
        return {"loss": sum(parts), **dict(zip(self.names, parts, strict=True)), "top1_error": 100 * wrong}


def train_one_epoch(
    model: Callable,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader,
    autocast: Callable,
    meter: Meter,
    step: Callable,
    progress: Callable = lambda loader, meter: loader,
) -> dict:
    """Train on every image of the loader once.

    Args:
        model: the network, in training mode, as it is or wrapped (compiled, distributed).
        objective: `objective(outputs, labels, index) -> (loss, parts)`, in training mode, told its epoch.
        loader: gives (images, labels, index), told its epoch.
        autocast: makes the context in which the network computes.
        meter: where the step adds up its losses.
        step: what to do with a batch; `train_step`, or the same captured as a CUDA graph.
        progress: wraps the loader in a bar.

    Returns:
        `seconds`, `images_per_second`, and `train` with the means over the epoch.
    """
    meter.reset()
    start = time.perf_counter()
    left = loader.num_samples
    for images, labels, index in progress(loader, meter):
        batch = min(loader.batch_size, left)
        step(model, objective, optimizer, autocast, meter, images, labels, index, batch)
        left -= batch
    objective.end_epoch()
    train = meter.means(loader.num_samples)  # waits for the device, so the clock is read after it
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "images_per_second": loader.num_samples / seconds, "train": train}


def train_step(model, objective, optimizer, autocast, meter, images, labels, index, batch) -> None:
    """Forward, loss, backward, update. `batch`: images in this step over all processes."""
    with autocast():
        outputs = model(images)
    loss, parts = objective(outputs, labels, index)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    meter.update(parts, outputs.logits, labels, batch)


@torch.no_grad()
def predict(model: Callable, loader, autocast: Callable) -> tuple[Tensor, Tensor]:
    """Logits of every classifier for the whole split, shallow to deep, the final one last: (B, M, K) float32,
    and labels (M,). Every process has all of them."""
    share = distributed.share(loader.num_samples)
    logits, all_labels = None, None
    start = share.start
    for images, labels, _ in loader:
        with autocast():
            outputs = model(images)
        batch = torch.stack([*outputs.exit_logits, outputs.logits])
        if logits is None:
            logits = batch.new_zeros(len(batch), loader.num_samples, batch.shape[2])
            all_labels = labels.new_zeros(loader.num_samples)
        stop = start + len(labels)
        logits[:, start:stop], all_labels[start:stop] = batch, labels
        start = stop
    # Each process filled its own rows and left zeros elsewhere: their sum is the whole.
    return distributed.sum_(logits), distributed.sum_(all_labels)


def evaluate(logits: Tensor, labels: Tensor, trained_exits: list[bool]) -> dict:
    """Metrics of every classifier and of their ensemble.

    Args:
        logits: (B, M, K), shallow to deep, the final classifier last, as `predict` returns them.
        labels: (M,).
        trained_exits: B - 1 flags: whether a loss trains that exit's classifier.

    Returns:
        `val`: the final classifier's metrics; `exits`: each exit's, None for an untrained one; `ensemble`: those
        of the mean of all trained classifiers' probabilities, None with one classifier.

    Raises:
        ValueError: logits that are not finite.
    """
    *exits, final = logits
    metrics = [classification_metrics(e, labels) if ok else None for e, ok in zip(exits, trained_exits, strict=True)]
    ensemble = None
    if any(trained_exits):
        members = torch.stack([e for e, ok in zip(exits, trained_exits, strict=True) if ok] + [final])
        # log of the sum of probabilities, which the softmax of the metrics normalises; in logs, so that nothing
        # underflows to an infinite NLL
        ensemble = classification_metrics(members.double().log_softmax(dim=2).logsumexp(dim=0), labels)
    return {"val": classification_metrics(final, labels), "exits": metrics, "ensemble": ensemble}


def find_not_finite(model: nn.Module, means: dict[str, float]) -> str | None:
    """What has left the real numbers after an epoch: loss terms, by name, or else the first parameter or buffer.

    Called once an epoch, so that no step waits for it.
    """
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        return ", ".join(name for name in bad if name != "loss") or "loss"
    tensors = model.state_dict()
    finite = torch.stack([t.isfinite().all() for t in tensors.values()]).tolist()
    return next((name for name, ok in zip(tensors, finite, strict=True) if not ok), None)
