"""PS-KD (Kim et al., ICCV 2021): last epoch's own predictions soften this epoch's labels."""

import torch
from torch import Tensor, nn

from utils import distributed


class ProgressiveTargets(nn.Module):
    """y_soft = (1 - alpha_t) y + alpha_t p_prev, with alpha_t = alpha_T (t + 1) / T in epoch t = 0..T-1.

    p_prev is what the network said of this very image (softmax of its final logits, in training mode, of the
    augmented view, before that step's update) in the epoch before; y itself in the first epoch, and for an
    image that it has not seen yet.

    The memory is one buffer, (M, K) in the split's order, 4 M K bytes on the training device: 20 MB for
    CIFAR-100, 80 MB for Tiny-ImageNet, 5.1 GB for ImageNet. One is enough, because an image is seen once an
    epoch, and its row is read before it is written. A row of zeros has not been written.

    In several processes each holds the whole memory and writes the rows of its own images; at the end of an
    epoch one all-reduce makes it whole everywhere. In a ring of W each process sends 8 M K (W - 1) / W bytes, once
    an epoch: nothing for one process; at W = 8, 35 MB for CIFAR-100, 140 MB for Tiny-ImageNet and 9.0 GB for
    ImageNet. An all-gather of N K numbers in every step would send half of that in M / N messages: for CIFAR-100's
    391, between two processes over gloo on one (busy) AMD EPYC machine, 1.2 s an epoch against 0.04 s.

    Args:
        num_samples: M.
        num_classes: K.
        alpha_T: weight of the past in the last epoch.
        num_epochs: T.
    """

    def __init__(self, num_samples: int, num_classes: int, alpha_T: float, num_epochs: int):
        super().__init__()
        self.alpha_T = alpha_T
        self.num_epochs = num_epochs
        self.register_buffer("memory", torch.zeros(num_samples, num_classes))
        # float64, so that a network in double precision gets all its digits; a tensor, so that a compiled or
        # captured step reads the epoch's value instead of the one that it was made with.
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.bool), persistent=False)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.alpha_t = self.alpha_T * (epoch + 1) / self.num_epochs
        self.weight.fill_(self.alpha_t if epoch > 0 else 0.0)  # in the first epoch y_soft is y, to the bit

    def forward(self, labels: Tensor, index: Tensor) -> Tensor:
        """labels (N,), index (N,) -> y_soft (N, K)."""
        past = self.memory[index]
        y = torch.zeros_like(past).scatter_(1, labels[:, None], 1.0)
        past = torch.where(past.sum(dim=1, keepdim=True) > 0, past, y)
        return torch.lerp(y, past, self.weight.to(past.dtype))

    @torch.no_grad()
    def record(self, logits: Tensor, index: Tensor) -> None:
        """Remember softmax(logits), (N, K), as the past of the images `index`, (N,)."""
        self.memory.index_copy_(0, index, logits.softmax(dim=1).to(self.memory.dtype))
        self.seen.index_fill_(0, index, True)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring together the rows that the processes wrote in this epoch. Every process must call it."""
        if distributed.world_size() > 1:
            self.memory[~self.seen] = 0.0
            distributed.sum_(self.memory)
        self.seen.zero_()
