"""PS-KD (Kim et al., ICCV 2021): the previous epoch's predictions soften this epoch's labels."""

import torch
from torch import Tensor

from loss.objective import SoftLabels, one_hot
from models.exits import Outputs
from utils import distributed, launch


class ProgressiveTargets(SoftLabels):
    """y_soft = (1 - alpha_t) y + alpha_t p_prev, with alpha_t = alpha_T (t + 1) / T in epoch t = 0..T-1.

    p_prev is the network's prediction for the same image in the previous epoch: softmax of its final logits, in
    training mode, of the augmented view, before that step's update. It is y itself in the first epoch, and for an
    image that the network has not seen yet. y may be soft itself.

    Where batches are mixed (MixUp, CutMix), the memory holds the prediction for the mixed view, in the row of the
    batch's own image: what the published script would record, and what is recorded of any other augmented view.
    Predictions for unmixed views would cost a second forward. A step that fp16 skips is recorded like any other.

    The memory is one buffer, (M, K) in the split's order, 4 M K bytes on the training device: 20 MB for CIFAR-100,
    80 MB for Tiny-ImageNet, 5.1 GB for ImageNet. One suffices, because an image is seen once per epoch and its row is
    read before it is written. A row of zeros has not been written.

    With several processes each holds the complete memory and writes the rows of its own images; one all-reduce at the
    end of an epoch brings them together, 8 M K (W - 1) / W bytes per process in a ring of W.

    Args:
        num_samples: M.
        num_classes: K.
        alpha_T: weight of the previous prediction in the last epoch.
        num_epochs: T.
    """

    def __init__(self, num_samples: int, num_classes: int, alpha_T: float, num_epochs: int):
        super().__init__()
        self.alpha_T = alpha_T
        self.num_epochs = num_epochs
        self.register_buffer("memory", torch.zeros(num_samples, num_classes))
        # float64, so that a network in double precision gets all its digits; a tensor, so that a compiled or captured
        # step reads the epoch's value instead of the one that it was made with.
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.bool), persistent=False)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.alpha_t = self.alpha_T * (epoch + 1) / self.num_epochs
        self.weight.fill_(self.alpha_t if epoch > 0 else 0.0)  # in the first epoch y_soft is y, to the bit

    def forward(self, outputs: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        """labels (N,) or (N, K), index (N,) -> y_soft (N, K); in training mode, records softmax(outputs.logits) (N, K)
        for the next epoch."""
        previous = self.memory[index]
        y = one_hot(labels, previous)
        previous = torch.where(previous.sum(dim=1, keepdim=True) > 0, previous, y)
        if self.training:
            probabilities = outputs.logits.detach().softmax(dim=1).to(self.memory.dtype)
            self.memory.index_copy_(0, index, probabilities)
            self.seen.index_fill_(0, index, True)
        return torch.lerp(y, previous, self.weight.to(previous.dtype))

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Bring together the rows that the processes wrote in this epoch."""
        if launch.WORLD.size > 1:
            self.memory[~self.seen] = 0.0
            distributed.all_reduce_sum_(self.memory)
        self.seen.zero_()
