"""Atomic file writes and checksum-verified loading."""

import contextlib
import errno
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch

from utils.runtime import UserError, first_line

LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
ENTRIES = {"model": dict, "optimizer": dict, "objective": dict, "epoch": int, "history": list, "args": dict}
# What every epoch's record has had from the first version on.
RECORD = {"epoch", "lr", "alpha_t", "seconds", "images_per_second", "train", "val", "exits", "ensemble"}


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that, whatever happens, `path` holds either the old content or the new.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        remedy = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "fix that"
        raise UserError(
            f"{path} cannot be written ({e.strerror}); its earlier content is intact: {remedy}, then rerun"
        ) from None


def link_atomic(source: Path, path: Path) -> None:
    """Make `path` another name of the file `source`, or a copy on a file system without links."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)
    temporary.unlink(missing_ok=True)  # renaming one link of a file to another does nothing


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """The content of a JSON file; empty where it is missing or damaged."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_arrays(path: Path, **arrays: torch.Tensor) -> None:
    """Write tensors as an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    write_atomic(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint that this program wrote, onto the CPU.

    Raises:
        UserError: the file is missing, truncated, altered, or something else. torch.load accepts a file with flipped
            bytes, so the zip's checksums are verified first; it never runs code from a file.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device could be read for ever
            raise UserError(f"{path} cannot be read: not a regular file")
        content = path.read_bytes()
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise UserError(f"{path} is {'truncated or not a checkpoint' if content else 'empty'}")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except Exception as e:  # unpickling a foreign file can raise anything
        raise UserError(f"{path} is not a checkpoint of this program ({type(e).__name__}: {first_line(e)})") from None
    problem = _problem(checkpoint)
    if problem:
        raise UserError(f"{path} is not a checkpoint of this program: {problem}")
    return checkpoint


def _problem(checkpoint) -> str | None:
    """What is wrong with the structure of a checkpoint."""
    if not isinstance(checkpoint, dict):
        return f"it holds a {type(checkpoint).__name__}"
    wrong = [name for name, kind in ENTRIES.items() if not isinstance(checkpoint.get(name), kind)]
    if wrong:
        return f"{', '.join(wrong)} missing or of another type"
    history = checkpoint["history"]
    try:
        json.dumps([history, checkpoint["args"]])  # plain values, as metrics.jsonl and config.json have
        epochs = [r["epoch"] for r in history if r.keys() >= RECORD and r["val"]["top1_error"] >= 0 and r["train"]]
    except (LookupError, TypeError, ValueError, AttributeError):
        epochs = None
    if epochs != list(range(len(history))) or len(history) != checkpoint["epoch"] + 1:
        return "its history is not one record per epoch"
    if not all(isinstance(name, str) for name in checkpoint["args"]):
        return "its args are not named"
    return None


def load_states(checkpoint: dict, source, **owners) -> None:
    """Load the owners' states (`model`, `objective`, `optimizer`) from the checkpoint's entries of the same names.

    An optimiser keeps its own settings, learning rate, momentum and so on: the flags decide them, not the file.

    Raises:
        UserError: a state has other names or shapes than what the flags built, or values that are not finite.
    """
    for name, owner in owners.items():
        state = checkpoint[name]
        try:
            tensors = state
            if name == "optimizer":
                state = {**owner.state_dict(), "state": state["state"]}
                tensors = {f"momentum {i}": entry["momentum_buffer"] for i, entry in state["state"].items()}
                parameters = [p for group in owner.param_groups for p in group["params"]]
                shapes = {f"momentum {i}": p.shape for i, p in enumerate(parameters)}
                if not tensors or any(tensor.shape != shapes[key] for key, tensor in tensors.items()):
                    raise ValueError("momentum of another shape")
            for key, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{key} is not finite")
            owner.load_state_dict(state)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
            reason = (str(e).strip().splitlines() or [type(e).__name__])[-1].strip()
            raise UserError(f"{source} does not fit: its {name} is of another run ({reason})") from None


def best_record(history: list[dict]) -> dict | None:
    """The epoch of lowest top-1 error, the earliest where several tie."""
    return min(history, key=lambda record: record["val"]["top1_error"], default=None)


def find_checkpoint(path: Path) -> tuple[dict, Path, str]:
    """The checkpoint that a path means, that file itself or the newest intact one of a run directory; its file; and a
    note for the user, empty where all is well.

    Raises:
        UserError: there is none, or none that is intact.
    """
    if not path.is_dir():
        return load_checkpoint(path), path, ""
    last, previous = path / LAST, path / PREVIOUS
    if not last.exists() and not previous.exists():
        raise UserError(f"{path} holds no {LAST}")
    try:
        return load_checkpoint(last), last, ""
    except UserError as e:
        if last.exists() and not os.access(last, os.R_OK):  # it may be intact
            raise
        problem = str(e)
    remedy = "start anew with --overwrite or another --run_name"
    if not previous.exists():
        raise UserError(f"{problem}; there is no older one: {remedy}")
    try:
        return load_checkpoint(previous), previous, f"{problem}: continuing from {PREVIOUS}"
    except UserError as e:
        raise UserError(f"{problem}, and {e}: {remedy}") from None
