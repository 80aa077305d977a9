"""The command line: every flag with its default and its reason, and what is wrong with a combination of them."""

import argparse
import functools
import os
from pathlib import Path

import torch

from data import DATASETS
from models import ALIASES, MODELS, min_width
from utils import distributed
from utils.machine import has_bf16_instructions

METHODS = ("PSKD", "BYOT", "DML")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; `auto` comes back resolved.

    A bad value ends the process with status 2, argparse's usage line and one sentence.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def build_parser() -> argparse.ArgumentParser:
    """Every flag with its default and its reason."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="%(prog)s [--PSKD] [--BYOT] [--DML] [--data_type ...] [--classifier_type ...] [more, see --help]",
        description="Train an image classifier with any combination of three teacher-free losses and report top-1 "
        "and top-5 error, NLL, ECE and AURC. Files go to <experiments_dir>/<run_name>/. The same command given "
        "again goes on where it stopped.",
        epilog="example: python main.py --PSKD --BYOT --DML --data_type synthetic --end_epoch 2",
        allow_abbrev=False,
    )

    group = parser.add_argument_group("methods (all off: the baseline)")
    flag = functools.partial(group.add_argument, action="store_true")
    flag("--PSKD", help="soften labels with the last epoch's own predictions")
    flag("--BYOT", help="let the final classifier teach the exits (paper, eq. 2)")
    flag("--DML", help="let exits and final feature learn from each other (paper, eq. 3)")
    number = functools.partial(_add_number, group)
    number("--alpha_T", float, 0.8, 0, 1, "PS-KD: weight of the past in the last epoch", "PS-KD's own value")
    number("--alpha", float, 0.1, 0, 1, "BYOT: weight of the teacher against the label", "paper")
    number("--temperature", float, 3.0, 0.01, 1000, "BYOT: tau", "published script")
    number(
        "--beta",
        float,
        1e-6,
        0,
        1000,
        "BYOT: weight of the hint, a sum over the batch: its weight grows with --batch_size",
        "paper",
    )
    number("--BYOT_from_k_block", int, 1, 1, 3, "BYOT: shallowest exit that is taught", "paper, Table 3")
    flag("--DML_on_output", help="DML: compare logits in place of features")
    flag("--DML_as_published", help="DML: the published script's value, which has no gradient")

    group = parser.add_argument_group("data")
    number = functools.partial(_add_number, group)
    group.add_argument(
        "--data_type",
        choices=list(DATASETS),
        default="cifar100",
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)} (default: %(default)s, the paper's; synthetic needs no download)",
    )
    group.add_argument(
        "--data_path",
        default="./datasets",
        metavar="DIR",
        help="where data sets lie or are downloaded to (default: %(default)s)",
    )
    number(
        "--image_size",
        int,
        None,
        16,
        512,
        "pixels, a multiple of 8; images of another size are resized",
        "32 for every data set, as in the paper",
    )
    number("--workers", int, 8, 0, 1024, "processes that decode image files, once", "training needs none")
    number("--classes", int, None, 2, 10**6, "use only the first N classes", "all")
    number(
        "--limit_train",
        int,
        None,
        1,
        10**9,
        "use only N training images, the first of each class, after --val_split",
        "all",
    )
    number("--limit_val", int, None, 1, 10**9, "the same for the validation images and for the test split", "all")
    number(
        "--val_split",
        float,
        None,
        0.001,
        0.9,
        "hold out this part of the training images and select on it",
        "none: as in the paper, the test images are the validation images",
    )

    group = parser.add_argument_group("model")
    number = functools.partial(_add_number, group)
    group.add_argument(
        "--classifier_type",
        choices=[*MODELS, *ALIASES],
        default="resnet18",
        metavar="NAME",
        help=f"one of {', '.join([*MODELS, *ALIASES])} (default: %(default)s, the paper's first; "
        "the last two are the published script's names)",
    )
    number("--num_resnet_blocks", int, 4, 1, 4, "stages of the backbone, one exit on each but the last", "paper")
    number("--width", int, 64, 1, 1024, "channels of the first stage; small values make quick tests", "paper")

    group = parser.add_argument_group("optimisation (SGD, Nesterov momentum 0.9)")
    number = functools.partial(_add_number, group)
    number("--end_epoch", int, 300, 1, 100_000, "epochs T", "paper")
    number("--batch_size", int, 128, 1, 1_000_000, "images in a step, over all processes", "paper")
    number("--lr", float, 0.1, 1e-12, 1000, "learning rate", "paper")
    number("--lr_decay_rate", float, 0.1, 1e-12, 1, "factor at each epoch of the schedule", "paper")
    group.add_argument(
        "--lr_decay_schedule",
        type=number_type(int, 1, 10**9),
        nargs="*",
        default=[150, 225],
        metavar="EPOCH",
        help="epochs, ascending, at which the rate drops (default: 150 225, paper)",
    )
    number("--weight_decay", float, 5e-4, 0, 1, "on every parameter", "published script")
    number("--seed", int, 4, 0, 2**32 - 1, "of weights, order and augmentation", "published script")

    group = parser.add_argument_group("run")
    number = functools.partial(_add_number, group)
    group.add_argument(
        "--experiments_dir",
        default="experiments",
        metavar="DIR",
        help="where run directories go (default: %(default)s)",
    )
    group.add_argument("--run_name", metavar="NAME", help="(default: <data>_<model>_<methods>_seed<seed>)")
    group.add_argument(
        "--resume", metavar="PATH", help="go on from this checkpoint or run directory; its flags must be given again"
    )
    flag = functools.partial(group.add_argument, action="store_true")
    flag("--val_only", help="with --resume: evaluate the checkpoint, or every run under a directory, and stop")
    flag("--overwrite", help="start anew, in place of what the run directory holds")
    flag("--allow_end_epoch_change", help="let --end_epoch differ on resume, though PS-KD's alpha_t depends on it")
    flag("--save_predictions", help="keep the last epoch's validation logits in predictions.npz")
    number(
        "--saveckp_freq",
        int,
        0,
        0,
        10**9,
        "also keep a checkpoint every N epochs",
        "only last, previous and best are kept",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default: auto, a GPU if there is one)",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="auto is bf16 on a processor that has it, else fp32; losses, memory and metrics are "
        "float32 or better in all (default: %(default)s)",
    )
    flag("--compile", help="torch.compile the network and, on one GPU, capture the step as a CUDA graph (default: off)")
    flag("--sync_bn", help="BatchNorm over all processes' images (GPUs only)")

    if not distributed.is_first_here():  # what is wrong with flags or machine is wrong for all of its processes
        parser.error = lambda message: parser.exit(2, distributed.let_another_speak())
    return parser


def number_type(kind: type, low, high):
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            word = "whole number" if kind is int else "number"
            spec = "" if kind is int else "g"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {word} from {low:{spec}} to {high:{spec}}")
        return value

    return convert


def _add_number(group, flag: str, kind: type, default, low, high, what: str, why: str) -> None:
    """Add a flag for a number from `low` to `high`; `why` is the default's reason or source."""
    shown = "" if default is None else f"{default:g}, "
    metavar = "N" if kind is int else "X"
    text = f"{what} (default: {shown}{why})"
    group.add_argument(flag, type=number_type(kind, low, high), default=default, metavar=metavar, help=text)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The checks that concern several flags or this machine; resolves what is left to `auto`."""
    fail = parser.error
    args.classifier_type = ALIASES.get(args.classifier_type, args.classifier_type)
    if sorted(set(args.lr_decay_schedule)) != args.lr_decay_schedule:
        fail(f"argument --lr_decay_schedule: {args.lr_decay_schedule} must ascend")
    for off, on in (("DML_on_output", "DML"), ("DML_as_published", "DML"), ("val_only", "resume")):
        if getattr(args, off) and not getattr(args, on):
            fail(f"argument --{off}: has no effect without --{on}")
    for a, b in (("DML_on_output", "DML_as_published"), ("overwrite", "resume")):
        if getattr(args, a) and getattr(args, b):
            fail(f"argument --{a}: cannot be used with --{b}")

    exits = args.num_resnet_blocks - 1
    if args.BYOT or args.DML:
        if not exits:
            fail("argument --num_resnet_blocks: 1 block has no exit for --BYOT or --DML; give 2 to 4")
        if args.BYOT and args.BYOT_from_k_block > exits:
            fail(
                f"argument --BYOT_from_k_block: {args.BYOT_from_k_block} is beyond the last exit; "
                f"{args.num_resnet_blocks} blocks have exits 1 to {exits}"
            )
    narrowest = min_width(args.classifier_type, args.num_resnet_blocks, args.BYOT or args.DML)
    if args.width < narrowest:
        fail(
            f"argument --width: {args.width} leaves a layer without channels; {args.classifier_type} needs "
            f"at least {narrowest}"
        )

    dataset = DATASETS[args.data_type]
    args.image_size = args.image_size or dataset.image_size
    if args.image_size % 8:
        fail(f"argument --image_size: {args.image_size} is not a multiple of 8")
    if args.classes is not None and args.classes > dataset.num_classes:
        fail(f"argument --classes: {args.classes} is more than the {dataset.num_classes} of {args.data_type}")

    _check_machine(fail, args)
    _check_paths(fail, args)


def _check_machine(fail, args: argparse.Namespace) -> None:
    """Device, precision and number of processes."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(args.device)
        if device.type == "cuda" and 0 < torch.cuda.device_count() < distributed.num_local():
            fail(f"argument --device: {distributed.num_local()} processes for {torch.cuda.device_count()} GPUs")
        if device.type not in ("cpu", "cuda"):
            raise ValueError
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception as e:  # an unknown name, a missing driver, a number too high: each has its own exception
        why = " (its memory is full)" if "out of memory" in str(e) else ""
        fail(
            f"argument --device: {args.device!r} cannot be used here{why}; this machine has "
            + ("cpu" if not torch.cuda.is_available() else f"cpu and cuda:0 to cuda:{torch.cuda.device_count() - 1}")
        )
    on_gpu = device.type == "cuda"
    if on_gpu:
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = has_bf16_instructions()
    if args.precision == "auto":
        args.precision = "bf16" if bf16 else "fp32"
    if args.precision == "tf32" and not on_gpu:
        fail("argument --precision: tf32 needs an NVIDIA GPU; a CPU has fp32 and bf16")
    if args.precision == "bf16" and on_gpu and not bf16:
        fail("argument --precision: this GPU has no bf16; give fp32")
    if args.sync_bn and not on_gpu:
        fail("argument --sync_bn: needs GPUs; on a CPU BatchNorm is per process")
    processes = distributed.num_launched()
    if args.batch_size % processes:
        below = args.batch_size // processes * processes
        near = f"{below} or {below + processes}" if below else str(processes)
        fail(
            f"argument --batch_size: {args.batch_size} cannot be split evenly among {processes} processes; give {near}"
        )


def _check_paths(fail, args: argparse.Namespace) -> None:
    """Names and places of files."""
    if args.run_name is None:
        methods = "_".join(m for m in METHODS if getattr(args, m)) or "baseline"
        args.run_name = f"{args.data_type}_{args.classifier_type}_{methods}_seed{args.seed}"
    for name in ("run_name", "experiments_dir", "data_path", "resume"):
        value = getattr(args, name) or ""
        if not value.isprintable():  # control characters, or bytes that are no UTF-8, which TensorBoard cannot take
            fail(f"argument --{name}: {value!r} has characters that cannot be printed")
    parts = Path(args.run_name).parts
    if not parts or Path(args.run_name).is_absolute() or ".." in parts:
        fail(f"argument --run_name: {args.run_name!r} must be a name below --experiments_dir")
    if max(len(os.fsencode(part)) for part in parts) > 255:
        fail(f"argument --run_name: {args.run_name[:20]!r}... is longer than the 255 bytes that a name may have")
    for name in ("experiments_dir", "data_path"):
        value = getattr(args, name)
        place = Path(value).absolute()
        if not value or not os.path.isdir(next(filter(os.path.exists, (place, *place.parents)))):
            fail(f"argument --{name}: {value!r} is not a directory")
    if args.resume is not None and not os.path.exists(args.resume):
        fail(f"argument --resume: {args.resume!r} does not exist; give a checkpoint or a run directory")
