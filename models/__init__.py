"""The architectures: one row each, the flags that choose one, and the functions that build or load a network."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from models.exits import AttentionExit, Backbone, BottleneckExit, MultiExitNetwork, Outputs
from models.load import load_run, load_weights, read_weights
from models.resnet import resnet
from utils.errors import UserError
from utils.parser import add_flag, add_number, add_path

__all__ = ["ALIASES", "MODELS", "Outputs", "add_flags", "build_model", "check_flags", "load_run", "load_weights"]


class Architecture(NamedTuple):
    """What distinguishes the networks; the numbers are those of torchvision's models of the same names."""

    backbone: Callable[..., Backbone]  # of `num_stages` and `width`
    exit: type[nn.Module] = AttentionExit  # as the published script: ResNet-18 and -50 differ
    narrowest: int = 1  # the --width that leaves every layer a channel


def resnet_row(block: str, *depths: int, exit_type: type[nn.Module] = AttentionExit, **groups) -> Architecture:
    narrowest = 64 // groups.get("width_per_group", 64)  # a group has width * width_per_group / 64
    return Architecture(functools.partial(resnet, block, depths, **groups), exit_type, narrowest)


MODELS = {
    "resnet18": resnet_row("BasicBlock", 2, 2, 2, 2, exit_type=BottleneckExit),
    "resnet34": resnet_row("BasicBlock", 3, 4, 6, 3),
    "resnet50": resnet_row("Bottleneck", 3, 4, 6, 3, exit_type=BottleneckExit),
    "resnet101": resnet_row("Bottleneck", 3, 4, 23, 3),
    "resnet152": resnet_row("Bottleneck", 3, 8, 36, 3),
    "wideresnet50": resnet_row("Bottleneck", 3, 4, 6, 3, width_per_group=128),
    "wideresnet101": resnet_row("Bottleneck", 3, 4, 23, 3, width_per_group=128),
    "resnext50_32x4d": resnet_row("Bottleneck", 3, 4, 6, 3, groups=32, width_per_group=4),
    "resnext101_32x8d": resnet_row("Bottleneck", 3, 4, 23, 3, groups=32, width_per_group=8),
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
    text = "start from the weights in this run directory, checkpoint or state_dict, of the same names and shapes"
    add_path(group, "--weights", "machine", f"{text} (default: none)", metavar="PATH", also="pretrained init")
    parser.set_defaults(weights_digest=None)
    number("--width", int, 64, 1, 1024, "channels of the first stage; small values make quick tests", "paper")


def check_flags(args, fail) -> None:
    """Check that every layer has a channel, and read what the weights to start from are; `fail(message)` reports an
    error and does not return."""
    narrowest = MODELS[args.classifier_type].narrowest
    if args.width < narrowest:
        fail(
            f"argument --width: {args.width} gives a layer 0 channels; {args.classifier_type} needs "
            f"at least {narrowest}"
        )
    if args.weights is not None:
        try:
            args.weights_digest, _ = read_weights(args.weights)
        except UserError as e:
            fail(f"argument --weights: {e}")


def build_model(args, num_classes: int) -> MultiExitNetwork:
    """The network with its B - 1 exits if a loss uses them (`args.exits`), else with none: nothing is computed that no
    loss reads.

    Initial weights depend on `args.seed` and the architecture alone, the backbone's not even on whether there are
    exits. The global random state is left as it was.
    """
    arch = MODELS[args.classifier_type]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        backbone = arch.backbone(num_stages=args.num_resnet_blocks, width=args.width)
        return MultiExitNetwork(backbone, num_classes, arch.exit if args.exits else None)
