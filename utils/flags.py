"""The flags of optimisation and run.

The packages data, models and loss declare their own flags in `add_flags` and check them in `check_flags`; `main.py`
assembles them.
"""

import argparse
import functools
import math
import os
from pathlib import Path

import torch

from utils import distributed, launch
from utils.machine import has_bf16_instructions
from utils.parser import add_flag, add_number, add_path, add_switch, check_name, number_type
from utils.resume import MAY_CHANGE


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of optimisation and run."""
    group = parser.add_argument_group("optimisation (SGD, Nesterov momentum 0.9)")
    add, number = functools.partial(add_flag, group), functools.partial(add_number, group)
    number("--end_epoch", int, 300, 1, 100_000, "number of epochs T", "paper", also="epochs num_epochs max_epochs")
    number("--batch_size", int, 128, 1, 1_000_000, "images per step, over all processes", "paper")
    number("--lr", float, 0.1, 1e-12, 1000, "learning rate", "paper", also="learning_rate")
    add(
        "--lr_schedule",
        choices=["step", "cosine"],
        default="step",
        help="step: drops as the next two flags say; cosine: from --lr towards 0 along half a cosine, per epoch"
        " (default: step, paper)",
        also="scheduler",
    )
    number("--lr_decay_rate", float, 0.1, 1e-12, 1, "step: factor at each epoch of the schedule", "paper", also="gamma")
    add(
        "--lr_decay_schedule",
        type=number_type(int, 1, 10**9),
        nargs="*",
        metavar="EPOCH",
        help="step: epochs, ascending, at which the rate drops (default: 1/2 and 3/4 of --end_epoch, paper)",
        also="milestones",
    )
    text = "increase the rate linearly over the first N epochs: --lr / (N + 1), 2 --lr / (N + 1), ..."
    number("--warmup_epochs", int, 0, 0, 100_000, text, "paper, none", also="warmup")
    text = "on every parameter, BatchNorm's and biases too"
    number("--weight_decay", float, 5e-4, 0, 1, text, "published script", also="wd")
    text = "random seed (initialisation, data order, augmentation)"
    number("--seed", int, 4, 0, 2**32 - 1, text, "published script")

    group = parser.add_argument_group("run")
    add, number, path = (functools.partial(function, group) for function in (add_flag, add_number, add_path))
    switch = functools.partial(add_switch, group)
    text = "parent of run directories (default: %(default)s, below the working directory)"
    path("--experiments_dir", "machine", text, default="experiments", metavar="DIR", also="output output_dir out")
    text = (
        "the run's directory (default: <data>_<model>_<methods>_seed<seed>; runs that differ in other flags need"
        " names of their own)"
    )
    add("--run_name", "runtime", type=check_name, metavar="NAME", help=text)
    text = (
        "continue this checkpoint or run directory, with the same flags and images, in the run directory, unless that"
        " holds a checkpoint of its own (default: none)"
    )
    path("--resume", "runtime", text, metavar="PATH", also="checkpoint")
    text = (
        "with --resume: evaluate the checkpoint with its own flags on the validation images; writes val.json to"
        " <experiments_dir>/<run_name> (default name: the run's and `_val`)"
    )
    switch("--val_only", "runtime", help=text, also="eval evaluate test")
    switch("--overwrite", "runtime", help="start over, replacing what the run directory holds")
    add(
        "--allow_change",
        "runtime",
        nargs="+",
        choices=MAY_CHANGE,
        default=[],
        metavar="NAME",
        help="let these differ on resume, and record it: end_epoch, and with it the default of --lr_decay_schedule;"
        " lr_decay_schedule, precision, processes, weights_digest, where --weights are gone (default: none, since a run"
        " is then no longer what one command computes)",
    )
    switch("--save_predictions", "runtime", help="keep the last epoch's validation logits in predictions.npz")
    text, reason = "also keep a checkpoint every N epochs", "only last, previous and best, which resuming needs"
    number("--saveckp_freq", int, 0, 0, 10**9, text, reason, kind="runtime")
    text = "auto, cpu, cuda, cuda:1, ... (default: auto, a GPU if any)"
    add("--device", "runtime", default="auto", metavar="NAME", help=text, also="gpu")
    add(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 if the hardware supports it, else fp32; fp16, with a scaled loss, is for GPUs without bf16"
        " (V100, T4, RTX 20) and never chosen by auto, because its accuracy has not been measured yet; losses, memory"
        " and metrics are float32 or better in all (default: %(default)s, the fastest that needs no loss scaling)",
        also="amp",
    )
    text = "torch.compile the network and the losses (default: off, not yet measured on a GPU); weight decay then"
    text += " reaches exits that no loss trains, of which nothing is reported"
    switch("--compile", "runtime", help=text)
    text = (
        "capture the training step as a CUDA graph, on one GPU; may double the memory (default: off, not yet measured)"
    )
    switch("--cuda_graph", "runtime", help=text)
    text = "synchronise BatchNorm across processes, on GPUs (default: off, statistics per process)"
    switch("--sync_bn", help=text)


def check_flags(args: argparse.Namespace, fail) -> None:
    """Check the flags of this module, and resolve `auto`; `fail(message)` reports an error and does not return."""
    if args.lr_decay_schedule is None:
        args.lr_decay_schedule = sorted({math.ceil(args.end_epoch / 2), math.ceil(3 * args.end_epoch / 4)})
        if "end_epoch" in args.allow_change:
            args.allow_change.append("lr_decay_schedule")
    if sorted(set(args.lr_decay_schedule)) != args.lr_decay_schedule:
        fail(f"argument --lr_decay_schedule: {args.lr_decay_schedule} must ascend")
    if args.warmup_epochs and args.warmup_epochs >= args.end_epoch:
        fail(f"argument --warmup_epochs: {args.warmup_epochs} leaves none of the {args.end_epoch} epochs after it")
    if args.val_only and not args.resume:
        fail("argument --val_only: has no effect without --resume")
    if args.overwrite and args.resume:
        fail("argument --overwrite: cannot be used with --resume")
    if args.overwrite and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        fail("argument --overwrite: each of torchrun's --max-restarts would start over; leave one of them out")
    check_machine(args, fail)
    _check_paths(args, fail)


def check_machine(args: argparse.Namespace, fail) -> None:
    """Device, precision and number of processes."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(args.device)
        if device.type not in ("cpu", "cuda"):  # mps has no float64, which metrics and means of losses need
            raise ValueError
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception as e:  # an unknown name, a missing driver, a number too high: each has its own exception
        why = " (its memory is full)" if "out of memory" in str(e) else ""
        gpus = f"{torch.cuda.device_count()} NVIDIA GPUs, from cuda:0 on"
        fail(f"argument --device: {args.device!r} cannot be used here{why}; this machine has cpu and {gpus}")
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.device_count() < launch.WORLD.local_size:
        fail(f"argument --device: {launch.WORLD.local_size} processes but only {torch.cuda.device_count()} GPUs")
    is_new_gpu = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    if args.precision == "auto":
        args.precision = "bf16" if is_new_gpu or (not on_gpu and has_bf16_instructions()) else "fp32"
    if not is_new_gpu and (args.precision == "tf32" or (on_gpu and args.precision == "bf16")):
        fail(f"argument --precision: {args.precision} needs a GPU of compute capability 8.0+; use fp16 or fp32")
    if args.precision == "fp16" and on_gpu and torch.cuda.get_device_capability(device) < (7, 0):
        fail("argument --precision: fp16 needs a GPU of compute capability 7.0 or higher; use fp32")
    if args.val_only:  # what follows concerns training
        return
    if args.sync_bn and not on_gpu:
        fail("argument --sync_bn: needs GPUs; on a CPU BatchNorm is per process")
    if args.cuda_graph and not (on_gpu and launch.WORLD.size == 1):
        fail("argument --cuda_graph: needs one GPU and one process")
    processes = launch.WORLD.size
    if args.batch_size % processes:
        near = max(processes, args.batch_size // processes * processes)
        fail(f"argument --batch_size: {args.batch_size} cannot be split evenly over {processes} processes; use {near}")


def _check_paths(args: argparse.Namespace, fail) -> None:
    """Names and locations of files."""
    for name in ("run_name", "experiments_dir", "data_path", "resume", "weights"):
        value = getattr(args, name) or ""
        if not value.isprintable():  # control characters, or bytes that are no UTF-8, which TensorBoard cannot take
            fail(f"argument --{name}: {value!r} has characters that cannot be printed")
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


def notes(args, given: set[str], device: torch.device) -> list[str]:
    """Warnings of flags that are allowed but probably not intended; `given` are those on the command line."""
    found = []
    if args.lr_schedule == "cosine":
        unused = sorted(given & {"lr_decay_rate", "lr_decay_schedule"})
        found += [f"--{name} has no effect with --lr_schedule cosine" for name in unused]
    is_slow = args.precision == "fp16" or (args.precision == "bf16" and not has_bf16_instructions())
    if is_slow and device.type == "cpu":
        found.append(f"--precision {args.precision} is slow on this processor, which has no instructions for it")
    if args.compile:
        found.append("--compile: compiling in the first step takes minutes")
    return found
