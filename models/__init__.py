"""The architectures: one row each, the flags that choose one, and the functions that build or load a network."""

import functools
from typing import NamedTuple

import torch
from torch import nn

from models.exits import AttentionExit, BottleneckExit, MultiExitResNet, Outputs
from models.load import load_run
from utils.parser import add_flag, add_number

__all__ = ["ALIASES", "MODELS", "Outputs", "add_flags", "build_model", "check_flags", "load_run", "num_exits"]


class Architecture(NamedTuple):
    """What distinguishes the networks; the numbers are those of torchvision's models of the same names."""

    block: str  # torchvision's class of that name
    depths: tuple[int, int, int, int]  # residual blocks per stage
    exit: type[nn.Module] = AttentionExit  # as the published script: ResNet-18 and -50 differ
    groups: int = 1
    width_per_group: int = 64


MODELS = {
    "resnet18": Architecture("BasicBlock", (2, 2, 2, 2), BottleneckExit),
    "resnet34": Architecture("BasicBlock", (3, 4, 6, 3)),
    "resnet50": Architecture("Bottleneck", (3, 4, 6, 3), BottleneckExit),
    "resnet101": Architecture("Bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("Bottleneck", (3, 8, 36, 3)),
    "wideresnet50": Architecture("Bottleneck", (3, 4, 6, 3), width_per_group=128),
    "wideresnet101": Architecture("Bottleneck", (3, 4, 23, 3), width_per_group=128),
    "resnext50_32x4d": Architecture("Bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Architecture("Bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
}
# The published script's names of two of them.
ALIASES = {"ResNetBeMyOwnTeacher18": "resnet18", "ResNetBeMyOwnTeacher50": "resnet50"}


def add_flags(parser) -> None:
    group = parser.add_argument_group("model")
    number = functools.partial(add_number, group)
    text = f"one of {', '.join([*MODELS, *ALIASES])} (default: %(default)s, the paper's first; the last two are the"
    text += " published script's names)"
    names = {"type": lambda name: ALIASES.get(name, name), "choices": MODELS, "default": "resnet18"}
    add_flag(group, "--classifier_type", **names, metavar="NAME", help=text, also="model arch network")
    number("--num_resnet_blocks", int, 4, 1, 4, "number of backbone stages; each but the last has an exit", "paper")
    number("--width", int, 64, 1, 1024, "channels of the first stage; small values make quick tests", "paper")


def check_flags(args, fail) -> None:
    """Check that every layer has a channel; `fail(message)` reports an error and does not return."""
    narrowest = 64 // MODELS[args.classifier_type].width_per_group  # a group has width * width_per_group / 64
    if args.width < narrowest:
        fail(
            f"argument --width: {args.width} gives a layer 0 channels; {args.classifier_type} needs "
            f"at least {narrowest}"
        )


def num_exits(args) -> int:
    """B - 1 with a method that uses exits, else 0: nothing is computed that no loss reads."""
    return args.num_resnet_blocks - 1 if args.BYOT or args.DML else 0


def build_model(args, num_classes: int) -> MultiExitResNet:
    """Build the network that the flags ask for.

    With BYOT or DML it has its B - 1 exits, with neither none. Initial weights depend on `args.seed` and the
    architecture alone; the complete backbone is initialised before any exit, so that it starts from the same
    weights with and without exits. The global random state is left as it was.
    """
    # here, because importing torchvision takes as long as PyTorch, and --help does not need it
    from torchvision.models import resnet

    arch = MODELS[args.classifier_type]
    backbone = {
        "block": getattr(resnet, arch.block),
        "depths": arch.depths[: args.num_resnet_blocks],
        "width": args.width,
        "groups": arch.groups,
        "width_per_group": arch.width_per_group,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        return MultiExitResNet(backbone, num_classes, arch.exit if num_exits(args) else None)
