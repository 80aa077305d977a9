"""A run's checkpoint -> a network ready to use."""

import argparse
from pathlib import Path

import torch

import models
from models.exits import MultiExitResNet
from utils.checkpoint import BEST, LAST, load_checkpoint, load_states, reading


def load_run(path, epoch: str = "last") -> tuple[MultiExitResNet, dict]:
    """The network of a run directory, on the CPU, in evaluation mode and channels_last, and what is needed to use it.

    Args:
        path: the run directory.
        epoch: "last" or "best".

    Returns:
        model, its `temperatures` being the fitted ones where the run had `--val_split`; and a dict with
        `class_names` (K), `mean` and `std` (3 each, of RGB in 0..1), `image_size` (pixels), `splits` (number and digest
        of the images), `args` (the run's flags, a Namespace), `epoch` (from 0), `temperatures` (B, shallow to deep, or
        None where none were fitted).

    Raises:
        UserError: the checkpoint is missing or damaged.
    """
    file = Path(path) / {"last": LAST, "best": BEST}[epoch]
    checkpoint = load_checkpoint(file)
    args, info = argparse.Namespace(**checkpoint["args"]), dict(checkpoint["data"])
    with reading(file):
        model = models.build_model(args, len(info["class_names"])).eval().to(memory_format=torch.channels_last)
        load_states(checkpoint, file, model=model)
        temperatures = checkpoint["test"][epoch]["temperatures"] if checkpoint["test"] else None
        trained = [1.0 if metrics else None for metrics in checkpoint["history"][-1]["exits"]]
        model.temperatures = temperatures or [*trained, 1.0]
        info |= {"image_size": args.image_size, "args": args, "epoch": checkpoint["epoch"]}
        info["temperatures"] = temperatures
    return model, info
