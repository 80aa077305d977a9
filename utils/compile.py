"""torch.compile for the network and the objective, in one process or in several."""

import torch
from torch import nn


class FirstShape:
    """Whether a batch has the first one's shape. Others, such as the last of an epoch, are too rare to pay for a second
    compilation or capture."""

    def __init__(self):
        self.shape = None

    def __call__(self, shape) -> bool:
        self.shape = self.shape or shape
        return shape == self.shape


class Compiled(nn.Module):
    """A module through torch.compile, for batches of the first one's shape: that of its last input, a tensor or the
    batch size itself.

    A network is compiled inside DistributedDataParallel, whose own forward torch.compile cannot follow.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.compiled = torch.compile(module.forward, dynamic=False)
        self.has_first_shape = FirstShape()

    def forward(self, *inputs):
        shape = getattr(inputs[-1], "shape", inputs[-1])
        return self.compiled(*inputs) if self.has_first_shape(shape) else self.module(*inputs)
