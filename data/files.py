"""What every reader of files shares: the form of a split, the lock between runs, and failed downloads."""

import contextlib
import fcntl
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import distributed
from utils.errors import UserError


class Split(NamedTuple):
    """Decoded images in file order: images uint8 (M, H, W, 3), RGB; labels int64 (M,)."""

    images: np.ndarray
    labels: np.ndarray


def say(line: str) -> None:
    """One line to the console, from one process only."""
    if distributed.is_main():
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock `folder` against other processes: of several runs one downloads or decodes, the others wait.

    A folder that cannot be written, or a file system without locks, goes unlocked: in the first nothing
    can be half-written, and everything written by the readers is renamed into place when it is whole.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(open(folder / ".lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that prepares the data in {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


@contextlib.contextmanager
def fetching(folder: Path, archive: str, remedy: str) -> Iterator[None]:
    """Around torchvision's download helpers: alone in `folder`, and quiet unless someone watches.

    Raises UserError for whatever fails inside, network, disk or archive (they raise a dozen types):
    the remedy is the same, `archive` by hand.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with alone(folder), quiet:
            yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{archive} is not ready in {folder} and could not be fetched ({reason}): {remedy}, "
            "or use --data_type synthetic, which needs no files"
        ) from error
