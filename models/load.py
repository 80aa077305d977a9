"""A run's checkpoint -> a network ready to use; any file of weights -> a network to train."""

import argparse
import errno
import hashlib
import io
import os
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from models.exits import MultiExitNetwork
from utils.checkpoint import BEST, LAST, load_checkpoint, load_states, reading
from utils.errors import UserError
from utils.records import best_epoch


def load_run(path, epoch: str = "last") -> tuple[MultiExitNetwork, dict]:
    """The network of a run directory, on the CPU, in evaluation mode and channels_last, and what is needed to use it.

    Args:
        path: the run directory.
        epoch: "last" or "best".

    Returns:
        model; and a dict with `class_names` (K), `mean` and `std` (3 each, of RGB in 0..1), `image_size` (pixels),
        `data` (these and more, a DataRecord), `args` (the run's flags, a Namespace), `epoch` (from 0), `temperatures`
        (of each classifier that a loss trains, by name; 1 where none were fitted), `is_calibrated` (whether they were).

    Raises:
        UserError: the checkpoint is missing or damaged, or BEST is not of the run's best epoch.
    """
    file = Path(path) / {"last": LAST, "best": BEST}[epoch]
    if not file.exists():
        raise UserError(f"{file} is missing: {path} must be a run directory")
    checkpoint = load_checkpoint(file)
    run = checkpoint.run
    if epoch == "best":
        last = file.with_name(LAST)
        history = load_checkpoint(last).run.history if last.exists() else run.history
        if run.history != history[: best_epoch(history).epoch + 1]:
            raise UserError(f"{file} is not of the best epoch of the run in {path}")
    with reading(file):
        parser = argparse.ArgumentParser()
        models.add_flags(parser)
        args = parser.parse_args([], argparse.Namespace(**run.args))  # defaults, where its program was older
        model = models.build_model(args, len(run.data.class_names)).eval().to(memory_format=torch.channels_last)
        load_states(checkpoint, model=model)
        temperatures = run.test[epoch].temperatures if run.test else None
    info = {"image_size": args.image_size, "data": run.data, "args": args, "epoch": checkpoint.epoch}
    info |= {"temperatures": temperatures or dict.fromkeys(run.trained, 1.0), "is_calibrated": temperatures is not None}
    return model, vars(run.data) | info


def read_weights(path: str) -> tuple[str, dict[str, Tensor]]:
    """The digest of a file, and the tensors by name in it: the network of a run directory's last checkpoint or of
    another checkpoint, or a state_dict, such as torchvision's.

    Raises:
        UserError: the file is missing or holds something else. No code from it is run.
    """
    file = Path(path, LAST) if os.path.isdir(path) else Path(path)
    try:
        if not os.path.isfile(file):  # a pipe or a device could be read for ever
            raise FileNotFoundError(errno.ENOENT, "no such regular file")
        content = file.read_bytes()
        entries = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        entries = entries.get("model", entries)
        # counts of batches, which BatchNorm does not use here, are no weights
        tensors = {name: entry for name, entry in entries.items() if torch.is_tensor(entry) and entry.ndim > 0}
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror})") from None
    except Exception:  # unpickling a foreign file can raise anything
        raise UserError(
            f"{file} holds no checkpoint and no state_dict, as torch.save(model.state_dict(), FILE) writes it"
        ) from None
    return hashlib.sha256(content).hexdigest()[:16], tensors


def load_weights(model: nn.Module, path: str) -> str:
    """Give the network those of the weights in a file (`read_weights`) that have its names and shapes; returns a line
    that says how many, and which parts keep others.

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    _, found = read_weights(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim > 0}
    taken = {name: tensor for name, tensor in found.items() if name in own and tensor.shape == own[name].shape}
    if not taken:
        raise UserError(
            f"{path}: none of the {len(found)} tensors at its top level has name and shape of one of this network's"
        )
    model.load_state_dict(taken, strict=False)
    rest = dict.fromkeys(name.partition(".")[0] for name in own if name not in taken)
    return f"{len(taken)} of {len(own)} tensors are from {path}; initial weights in: {', '.join(rest) or 'none'}"
