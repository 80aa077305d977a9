"""torch.compile for the network, in one process or in several."""

import torch
from torch import Tensor, nn


class CompiledNetwork(nn.Module):
    """The network through torch.compile, for batches of the first one's size. Others, such as the last of an epoch, run
    uncompiled: they are too rare to pay for a second compilation.

    It goes inside DistributedDataParallel, whose own forward torch.compile cannot follow.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.compiled = torch.compile(network.forward, dynamic=False)
        self.shape = None  # of the first batch

    def forward(self, images: Tensor):
        self.shape = self.shape or images.shape
        return self.compiled(images) if images.shape == self.shape else self.network(images)
