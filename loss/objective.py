"""L = L_CE + L_SelfKD + L_DMFL: the sum of the terms that are switched on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.exits import Outputs
from utils import launch
from utils.records import classifier_names


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Labels as probabilities (N, K) in the type of `like` (N, K): classes (N,) one-hot, probabilities (N, K) kept."""
    if labels.ndim == 2:
        return labels.to(like.dtype)
    return torch.zeros_like(like).scatter_(1, labels[:, None], 1.0)


class Component(nn.Module):
    """A Term or SoftLabels. State belongs in buffers, so that it travels in the checkpoint."""

    def set_epoch(self, epoch: int) -> None:
        """Called before epoch `epoch`, counted from 0."""

    def end_epoch(self) -> None:
        """Called on every process after an epoch's last batch."""


class Term(Component):
    """One term of the loss: `term(outputs, targets, index, batch_size) -> {name: scalar}`.

    `targets` are classes (N,) int64 or probabilities (N, K), both as F.cross_entropy takes them; `index` (N,) int64
    are the images' rows in the training split; `batch_size` is the number of images over all processes. A term
    returns means over the N images that it is given; what the paper sums over the batch is `batch_size` times a mean.
    """

    uses_exits = False  # whether the network needs its exits
    trains_from: int | None = None  # the first exit whose classifier it trains, and those after it, counted from 1


class SoftLabels(Component):
    """Labels that every term sees in place of the given ones: `soften(outputs, labels, index) -> y_soft (N, K)`.
    Labels are classes (N,) int64 or probabilities (N, K). This class leaves them as they are."""

    def forward(self, outputs: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        return labels


class CrossEntropy(Term):
    """L_CE = CE(P_B, y_soft), mean over the batch (paper, eq. 1)."""

    def forward(self, outputs: Outputs, targets: Tensor, index: Tensor, batch_size: int) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(outputs.logits, targets)}


class LabelSmoothing(SoftLabels):
    """y_soft = (1 - epsilon) y + epsilon / K (Szegedy et al., CVPR 2016, sec. 7); y may be soft already."""

    def __init__(self, epsilon: float):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, outputs: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        """labels (N,) or (N, K) -> y_soft (N, K)."""
        num_classes = outputs.logits.shape[1]
        y = one_hot(labels, outputs.logits)
        return (1 - self.epsilon) * y + self.epsilon / num_classes


class Objective(nn.Module):
    """Adds up the terms' parts.

    `objective(outputs, labels, index, batch_size)` returns the loss and its parts (weighted, detached, adding up to the
    loss).
    With several processes, however unequal their shards of the batch, the mean of their losses is the loss of the
    global batch: DistributedDataParallel averages gradients.
    """

    def __init__(self, terms: list[Term], soften: SoftLabels | None = None):
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.soften = soften or SoftLabels()

    def trained_classifiers(self, num_exits: int) -> list[str]:
        """The names of the classifiers that a term trains, shallow to deep."""
        first = min(term.trains_from or num_exits + 1 for term in self.terms)
        return classifier_names(num_exits + 1)[first - 1 :]

    def set_epoch(self, epoch: int) -> None:
        """Tell every term that epoch `epoch`, counted from 0, begins."""
        for component in (self.soften, *self.terms):
            component.set_epoch(epoch)

    def end_epoch(self) -> None:
        """Tell every term that all images of the epoch have been seen."""
        for component in (self.soften, *self.terms):
            component.end_epoch()

    def forward(
        self, outputs: Outputs, labels: Tensor, index: Tensor, batch_size: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """labels, classes (N,) int64 or probabilities (N, K); index (N,) int64, the images' rows in the training split;
        batch_size, the number of images over all processes (default: N times the number of processes)."""
        processes = launch.WORLD.size
        batch_size = batch_size or processes * len(labels)
        targets = self.soften(outputs, labels, index)
        parts = {}
        for term in self.terms:
            parts.update(term(outputs, targets, index, batch_size))
        weight = processes * len(labels) / batch_size  # of this process's means in the global batch; 1 in one process
        if weight != 1:
            parts = {name: weight * part for name, part in parts.items()}
        loss = torch.stack(list(parts.values())).sum()
        return loss, {name: part.detach() for name, part in parts.items()}
