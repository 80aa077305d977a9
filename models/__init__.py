"""The architectures: one row each, and the function that builds them."""

from typing import NamedTuple

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.exits import AttentionExit, BottleneckExit, MultiExitResNet, Outputs

__all__ = ["ALIASES", "MODELS", "Architecture", "Outputs", "build_model", "min_width"]


class Architecture(NamedTuple):
    """What tells one network from another; the numbers are those of torchvision's models of the same names."""

    block: type[nn.Module]
    depths: tuple[int, int, int, int]  # residual blocks a stage
    exit: type[nn.Module] = AttentionExit  # the published script's choice, FIDELITY: ResNet-18 and -50 differ
    groups: int = 1
    width_per_group: int = 64


MODELS = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2), BottleneckExit),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3), BottleneckExit),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3)),
    "wideresnet50": Architecture(Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "wideresnet101": Architecture(Bottleneck, (3, 4, 23, 3), width_per_group=128),
    "resnext50_32x4d": Architecture(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Architecture(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8),
}
# The published script's names of two of them.
ALIASES = {"ResNetBeMyOwnTeacher18": "resnet18", "ResNetBeMyOwnTeacher50": "resnet50"}


def min_width(name: str, num_blocks: int, has_exits: bool) -> int:
    """Smallest `--width` that leaves every layer of the network at least one channel."""
    arch = MODELS[name]
    width = -(-64 // arch.width_per_group)  # a bottleneck has width * width_per_group / 64 channels a group
    if arch.block is BasicBlock:
        width = 1
    if has_exits and arch.exit is BottleneckExit:  # squeezes the feature to a quarter
        width = max(width, -(-4 // (2 ** (num_blocks - 1) * arch.block.expansion)))
    return width


def build_model(args, num_classes: int) -> MultiExitResNet:
    """Build the network that the flags ask for.

    With BYOT or DML it has its B - 1 exits, with neither none. Initial weights depend on `args.seed` and the
    architecture alone; the backbone is initialised whole before any exit, so that it starts from the same
    weights with and without exits. The global random state is left as it was.
    """
    arch = MODELS[ALIASES.get(args.classifier_type, args.classifier_type)]
    backbone = {
        "block": arch.block,
        "depths": arch.depths[: args.num_resnet_blocks],
        "width": args.width,
        "groups": arch.groups,
        "width_per_group": arch.width_per_group,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        return MultiExitResNet(backbone, num_classes, arch.exit if args.BYOT or args.DML else None)
