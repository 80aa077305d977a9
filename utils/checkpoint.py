"""Files that are whole or absent: atomic writing, and checkpoints that are verified before they are believed."""

import contextlib
import errno
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError

ENTRIES = {"model": dict, "optimizer": dict, "objective": dict, "epoch": int, "history": list, "args": dict}


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
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        remedy = "make room" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise UserError(
            f"{path} cannot be written ({e.strerror}); what was there before is whole: {remedy} and give the same"
            " command"
        ) from None
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def write_arrays(path: Path, **arrays: torch.Tensor) -> None:
    """Write tensors as an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    write_atomic(path, buffer.getbuffer())


def serialise(checkpoint: dict) -> memoryview:
    """The checkpoint as the bytes of torch.save's file (a zip with a checksum for every entry)."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getbuffer()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint that this program wrote, onto the CPU.

    Raises:
        UserError: the file is missing, truncated, altered, or something else. torch.load takes a file with
            flipped bytes without a word, so the checksums are verified first; it never runs code from a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except zipfile.BadZipFile:
        what = "is empty" if path.stat().st_size == 0 else "is truncated or no checkpoint"
        raise UserError(f"{path} {what}") from None
    except pickle.UnpicklingError:  # whose own message says how to run a file's code
        raise UserError(f"{path} is no checkpoint of this program: it holds more than tensors and numbers") from None
    except Exception as e:  # unpickling a foreign file can raise anything
        reason = str(e).strip().split("\n")[0][:200]
        raise UserError(f"{path} is no checkpoint of this program ({type(e).__name__}: {reason})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint of this program: it holds a {type(checkpoint).__name__}")
    wrong = [name for name, kind in ENTRIES.items() if not isinstance(checkpoint.get(name), kind)]
    if wrong:
        raise UserError(f"{path} is no checkpoint of this program: it lacks {', '.join(wrong)}, or they are no such")
    history, entries = checkpoint["history"], {"epoch", "seconds", "train", "val", "exits", "ensemble"}
    whole = all(isinstance(record, dict) and entries <= record.keys() for record in history)
    if not whole or not history or len(history) != checkpoint["epoch"] + 1:
        raise UserError(f"{path} is no checkpoint of this program: its history is not one of its epochs")
    return checkpoint


def load_states(checkpoint: dict, source, **owners) -> None:
    """Load the owners' states from the checkpoint's entries of the same names.

    Raises:
        UserError: the states are another network's.
    """
    for name, owner in owners.items():
        try:
            owner.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
            reason = str(e).strip().splitlines()[-1].strip()
            raise UserError(f"{source} does not fit: its {name} is of another run ({reason})") from None
