"""L = L_CE + L_SelfKD + L_DMFL: the sum of whichever terms are on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.exits import Outputs
from utils import distributed


class CrossEntropy(nn.Module):
    """L_CE = CE(P_B, y_soft), mean over the batch (paper, eq. 1)."""

    def forward(self, outputs: Outputs, y_soft: Tensor, batch: Tensor | int) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(outputs.logits, y_soft, reduction="sum") / batch}


class Objective(nn.Module):
    """Adds up the terms' parts, on the labels or on PS-KD's progressive targets.

    A term is a module `term(outputs, y_soft, batch) -> {name: scalar}`. `y_soft` is what stands for the label:
    classes (N,) int64 or probabilities (N, K), both as F.cross_entropy takes them. `batch` is the number of
    images in the batch over all processes: a term returns its share of the whole batch's loss, a sum over its
    own images, divided by `batch` where the paper takes a mean.

    `objective(outputs, labels, index)` returns the loss and its parts (weighted, detached, adding up to the
    loss). In several processes, whatever their shares of the batch, the mean of their losses is the loss of the
    whole batch; so it must be, because DistributedDataParallel averages gradients.
    """

    def __init__(self, terms: list[nn.Module], targets: nn.Module | None = None):
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.targets = targets

    def set_epoch(self, epoch: int) -> None:
        """Tell the schedule that epoch `epoch`, counted from 0, begins."""
        if self.targets is not None:
            self.targets.set_epoch(epoch)

    def end_epoch(self) -> None:
        """Make the state whole on every process; called once every image of the epoch has been seen."""
        if self.targets is not None:
            self.targets.gather()

    @property
    def alpha_t(self) -> float | None:
        """PS-KD's weight of the past in this epoch, None without PS-KD."""
        return None if self.targets is None else self.targets.alpha_t

    def forward(self, outputs: Outputs, labels: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: the network's outputs; labels (N,) int64; index (N,) int64, the images' rows in the split."""
        y_soft = labels if self.targets is None else self.targets(labels, index)
        batch, scale = len(labels), distributed.world_size()
        if scale > 1:
            batch = distributed.sum_(torch.full((), float(batch), device=labels.device))
        parts = {}
        for term in self.terms:
            parts.update(term(outputs, y_soft, batch))
        if scale > 1:
            parts = {name: scale * part for name, part in parts.items()}
        loss = torch.stack(list(parts.values())).sum()
        if self.targets is not None and self.training:
            self.targets.record(outputs.logits, index)
        return loss, {name: part.detach() for name, part in parts.items()}
