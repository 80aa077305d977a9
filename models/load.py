"""A run's checkpoint -> a network ready to use."""

import argparse
from pathlib import Path

import torch

import models
from models.exits import MultiExitResNet
from utils.checkpoint import BEST, LAST, load_checkpoint, load_states, reading
from utils.errors import UserError
from utils.records import best_epoch


def load_run(path, epoch: str = "last") -> tuple[MultiExitResNet, dict]:
    """The network of a run directory, on the CPU, in evaluation mode and channels_last, and what is needed to use it.

    Args:
        path: the run directory.
        epoch: "last" or "best".

    Returns:
        model, its `temperatures` being the fitted ones where the run had `--val_split`; and a dict with
        `class_names` (K), `mean` and `std` (3 each, of RGB in 0..1), `image_size` (pixels), `splits` (number and digest of
        the images), `args` (the run's flags, a Namespace), `epoch` (from 0), `temperatures` (by classifier, or
        None where none were fitted).

    Raises:
        UserError: the checkpoint is missing or damaged, or BEST is not of the run's best epoch.
    """
    file = Path(path) / {"last": LAST, "best": BEST}[epoch]
    checkpoint = load_checkpoint(file)
    run = checkpoint.run
    if epoch == "best" and best_epoch(run.history).epoch != checkpoint.epoch:
        raise UserError(f"{file} is of epoch {checkpoint.epoch + 1}, which is not the best of its run")
    args, info = argparse.Namespace(**run.args), vars(run.data).copy()
    with reading(file):
        model = models.build_model(args, len(run.data.class_names)).eval().to(memory_format=torch.channels_last)
        load_states(checkpoint, model=model)
        temperatures = run.test[epoch].temperatures if run.test else None
        trained = [name for name in run.history[-1].val if name != "ensemble"]
        model.temperatures = temperatures or dict.fromkeys(trained, 1.0)
        info |= {"image_size": args.image_size, "args": args, "epoch": checkpoint.epoch, "temperatures": temperatures}
    return model, info
