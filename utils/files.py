"""Atomic file writes: whatever happens, a path holds its old content or the new."""

import contextlib
import errno
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import UserError


def temporary_name(path: Path) -> Path:
    """A unique path next to `path`; `*.tmp` finds what a killed process left."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def write_atomic(path: Path, content: bytes | memoryview | Callable[[BinaryIO], None]) -> None:
    """Write a file so that, whatever happens, `path` holds either the old content or the new.

    `content` may be a function that writes it to a file.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content)
            f.flush()
            os.fsync(f.fileno())
        _rename(temporary, path)
    except OSError as e:
        remedy = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "fix it"
        raise UserError(f"{path} cannot be written ({e.strerror}) and is as it was: {remedy}, then rerun") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named, who may have named a device or pipe, which a rename would replace by a file: it
    is written to. A symbolic link stays one: its target is replaced.

    Raises:
        UserError, OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
    else:
        write_atomic(Path(os.path.realpath(path)), content)


def link_atomic(source: Path, path: Path) -> None:
    """Make `path` another name of the file `source`, or a copy on a file system without links."""
    temporary = temporary_name(path)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    _rename(temporary, path)
    temporary.unlink(missing_ok=True)  # renaming one link of a file to another does nothing


def _rename(temporary: Path, path: Path) -> None:
    """os.replace, then fsync of the directory, so that a power cut does not undo it."""
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # SMB, FUSE and shared folders cannot do it
            raise
    finally:
        os.close(directory)


def write_json(path: Path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def write_arrays(path: Path, **arrays) -> None:
    """Write tensors as an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    write_atomic(path, buffer.getbuffer())
