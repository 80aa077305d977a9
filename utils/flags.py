"""The command line: the parser, number types, and the flags of optimisation and run.

The packages data, models and loss declare their own flags in `add_flags` and check them in `check_flags`; `main.py`
assembles them.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

import torch

from utils import distributed
from utils.machine import has_bf16_instructions

# The flags that say where and how a run is computed or stored. All others define the experiment.
RUNTIME_FLAGS = frozenset(
    (
        "data_path", "workers", "device", "compile", "cuda_graph", "experiments_dir", "run_name", "resume", "val_only",
        "overwrite", "saveckp_freq", "save_predictions", "allow_end_epoch_change",
    )
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line, from one process per machine."""

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):  # read as an empty list: python/cpython#109475
                self.error(f"argument {word[:-3]}: '--' is not a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        if not distributed.is_local_main():  # what is wrong with flags or machine is wrong for all of its processes
            distributed.wait_for_rank_0()
            self.exit(2)
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().error(message)


def number_type(kind: type, low, high):
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            word, spec = ("integer", "") if kind is int else ("number", "g")
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid {word}, from {low:{spec}} to {high:{spec}}")
        return value

    return convert


def add_number(group, flag: str, kind: type, default, low, high, text: str, reason: str) -> None:
    """Add a flag for a number from `low` to `high`; `reason` is the default's reason or source."""
    shown = "" if default is None else f"{default:g}, "
    metavar = "N" if kind is int else "X"
    text = f"{text} (default: {shown}{reason})"
    group.add_argument(flag, type=number_type(kind, low, high), default=default, metavar=metavar, help=text)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of optimisation and run."""
    group = parser.add_argument_group("optimisation (SGD, Nesterov momentum 0.9)")
    number = functools.partial(add_number, group)
    number("--end_epoch", int, 300, 1, 100_000, "epochs T", "paper")
    number("--batch_size", int, 128, 1, 1_000_000, "images per step, over all processes", "paper")
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
    number, flag = functools.partial(add_number, group), functools.partial(group.add_argument, action="store_true")
    group.add_argument(
        "--experiments_dir",
        default="experiments",
        metavar="DIR",
        help="parent of run directories (default: %(default)s)",
    )
    group.add_argument("--run_name", metavar="NAME", help="(default: <data>_<model>_<methods>_seed<seed>)")
    group.add_argument(
        "--resume", metavar="PATH", help="continue from this checkpoint or run directory, with the same flags"
    )
    flag(
        "--val_only", help="with --resume: evaluate the checkpoint, or every run under a directory, with its own flags"
    )
    flag("--overwrite", help="start over, replacing what the run directory holds")
    flag("--allow_end_epoch_change", help="let --end_epoch differ on resume, though PS-KD's alpha_t depends on it")
    flag("--save_predictions", help="keep the last epoch's validation logits in predictions.npz")
    number("--saveckp_freq", int, 0, 0, 10**9, "also keep a checkpoint every N epochs", "only last, previous and best")
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... (default: auto, a GPU if any)"
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="auto is bf16 where the processor has it, else fp32; losses, memory and metrics are float32 or better in "
        "all (default: %(default)s)",
    )
    flag("--compile", help="torch.compile the network and the losses (default: off, not yet measured on a GPU)")
    flag("--cuda_graph", help="capture the training step as a CUDA graph, on one GPU (default: off, not yet measured)")
    flag("--sync_bn", help="BatchNorm over all processes' images (GPUs only)")


def check_flags(args: argparse.Namespace, fail) -> None:
    """Check the flags of this module, and resolve `auto`; `fail(message)` reports an error and does not return."""
    if sorted(set(args.lr_decay_schedule)) != args.lr_decay_schedule:
        fail(f"argument --lr_decay_schedule: {args.lr_decay_schedule} must ascend")
    if args.val_only and not args.resume:
        fail("argument --val_only: has no effect without --resume")
    if args.overwrite and args.resume:
        fail("argument --overwrite: cannot be used with --resume")
    _check_machine(fail, args)
    _check_paths(fail, args)


def _check_machine(fail, args: argparse.Namespace) -> None:
    """Device, precision and number of processes."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(args.device)
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
        if torch.cuda.device_count() < distributed.num_local():
            fail(f"argument --device: {distributed.num_local()} processes for {torch.cuda.device_count()} GPUs")
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            tf32 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        bf16, tf32 = has_bf16_instructions(), False
    if args.precision == "auto":
        args.precision = "bf16" if bf16 else "fp32"
    if args.precision == "tf32" and not tf32:
        fail("argument --precision: tf32 needs an NVIDIA GPU of compute capability 8.0 or higher; use fp32")
    if args.precision == "bf16" and on_gpu and not bf16:
        fail("argument --precision: this GPU has no bf16; use fp32")
    if args.sync_bn and not on_gpu and not args.val_only:
        fail("argument --sync_bn: needs GPUs; on a CPU BatchNorm is per process")
    if args.cuda_graph and not (on_gpu and distributed.num_launched() == 1):
        fail("argument --cuda_graph: needs one GPU and one process")
    processes = distributed.num_launched()
    if args.batch_size % processes and not args.val_only:
        below = args.batch_size // processes * processes
        near = f"{below} or {below + processes}" if below else str(processes)
        fail(f"argument --batch_size: {args.batch_size} cannot be split evenly over {processes} processes; use {near}")


def _check_paths(fail, args: argparse.Namespace) -> None:
    """Names and locations of files."""
    for name in ("run_name", "experiments_dir", "data_path", "resume"):
        value = getattr(args, name) or ""
        if not value.isprintable():  # control characters, or bytes that are no UTF-8, which TensorBoard cannot take
            fail(f"argument --{name}: {value!r} has characters that cannot be printed")
        if any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
            fail(f"argument --{name}: {value[:20]!r}... is longer than the 255 bytes that a name may have")
    parts = Path(args.run_name).parts
    if not parts or Path(args.run_name).is_absolute() or ".." in parts:
        fail(f"argument --run_name: {args.run_name!r} must be a name below --experiments_dir")
    for name in ("experiments_dir", "data_path"):
        value = getattr(args, name)
        path = Path(value).absolute()
        if not value or not os.path.isdir(next(filter(os.path.exists, (path, *path.parents)))):
            fail(f"argument --{name}: {value!r} is not a directory")
    if args.resume is not None and not os.path.exists(args.resume):
        fail(f"argument --resume: {args.resume!r} does not exist; give a checkpoint or a run directory")


def to_argv(values: dict) -> list[str]:
    """Flags by name -> the words of a command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return words


def differences(before: dict, now: dict) -> list[str]:
    """The flags in which two command lines define different experiments, each as `--flag OLD -> NEW`.

    A flag that only one of them has, because the program was younger or older, counts as off in the other.
    """
    names = sorted((before.keys() | now.keys()) - RUNTIME_FLAGS)
    return [
        f"--{n} {before.get(n)} -> {now.get(n)}"
        for n in names
        if before.get(n) != now.get(n) and (before.get(n) or now.get(n) or (n in before and n in now))
    ]


def notes(args, device: torch.device) -> list[str]:
    """Warnings of flags that are allowed but probably not intended."""
    found = []
    if not any(epoch < args.end_epoch for epoch in args.lr_decay_schedule):
        schedule = " ".join(map(str, args.lr_decay_schedule)) or "empty"
        found.append(f"the learning rate never drops: --lr_decay_schedule is {schedule}, --end_epoch {args.end_epoch}")
    if args.precision == "bf16" and device.type == "cpu" and not has_bf16_instructions():
        found.append("--precision bf16 is slow here: this processor has no bf16 instructions; fp32 is faster")
    if args.compile:
        found.append("--compile: compiling in the first step takes minutes")
    return found
