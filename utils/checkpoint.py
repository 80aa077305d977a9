"""The checkpoint's format: verified when it is read, and loaded."""

import contextlib
import io
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from utils.errors import UserError, first_line
from utils.files import write_atomic
from utils.records import RunRecord, best_epoch, from_json, to_json

LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
STATES = ("model", "optimizer", "objective", "scaler")  # the last, fp16's, is empty with other precisions


class Checkpoint(NamedTuple):
    """A run as it was after its last epoch. The file is a dict of the states, the record as JSON, and `epoch`, the
    number of that epoch from 0."""

    file: Path
    run: RunRecord
    states: dict[str, dict]  # by STATES

    @property
    def epoch(self) -> int:
        return len(self.run.history) - 1


def write_checkpoint(path: Path, states: dict[str, dict], run: RunRecord) -> None:
    """Write the states and a run's record.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({**states, "epoch": len(run.history) - 1, **to_json(run)}, buffer)
    write_atomic(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that this program wrote, onto the CPU.

    Raises:
        UserError: the file is missing, truncated, altered, or something else. torch.load accepts a file with flipped
            bytes, so the zip's checksums are verified first; it never runs code from a file.
    """
    try:
        if not path.is_file():  # a pipe or a device could be read for ever
            raise ValueError("not a regular file" if path.exists() else "no such file")
        content = io.BytesIO(path.read_bytes())
        if not zipfile.is_zipfile(content):
            raise ValueError("truncated or of another format")
        with zipfile.ZipFile(content) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its part {damaged} is wrong")
        content.seek(0)
        entries = torch.load(content, map_location="cpu", weights_only=True)
        return _from_entries(path, entries)
    except Exception as e:  # unpickling a foreign file can raise anything
        raise UserError(f"{path} is not a valid checkpoint ({first_line(e)})") from None


def _from_entries(path: Path, entries: dict) -> Checkpoint:
    """Raises an exception whose message says what is wrong with the content of a checkpoint."""
    if not isinstance(entries, dict) or "history" not in entries:
        raise TypeError(f"it holds a {type(entries).__name__} without a history")
    states = {name: entries.pop(name) for name in STATES}
    epoch = entries.pop("epoch")
    json.dumps(entries)  # plain values, as the exports need
    run = from_json(RunRecord, entries)
    epochs = [record.epoch for record in run.history]
    if epochs != list(range(len(epochs))) or epochs[-1] != epoch:
        raise ValueError("its history is not one record per epoch")
    best_epoch(run.history)  # every epoch has a final classifier
    return Checkpoint(path, run, states)


@contextlib.contextmanager
def reading(source):
    """Around what is done with a checkpoint's content. The checksums of a forged file are right, its content can be
    anything: whatever that raises becomes a UserError which names the file, `source`."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as e:
        raise UserError(f"{source} does not hold what this program writes ({first_line(e)})") from e


def load_states(checkpoint: Checkpoint, **owners) -> None:
    """Load the owners' states (`model`, `objective`, `optimizer`, `scaler`) from the checkpoint's of the same names.

    An optimiser keeps its own settings, learning rate, momentum and so on: the flags decide them, not the file.

    Raises:
        UserError: a state has other names or shapes than what the flags built, or values that are not finite.
    """
    for name, owner in owners.items():
        try:
            if name == "scaler" and not checkpoint.states[name]:  # of another precision than fp16
                continue
            if name == "optimizer":
                tensors = _load_momentum(owner, checkpoint.states[name])
            else:
                owner.load_state_dict(checkpoint.states[name])
                tensors = owner.state_dict().values()
            if not all(tensor.isfinite().all() for tensor in tensors if torch.is_tensor(tensor)):
                raise ValueError("numbers that are not finite")
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
            reason = (str(e).strip().splitlines() or [type(e).__name__])[-1].strip()
            raise UserError(f"{checkpoint.file}: its {name} state does not match these flags ({reason})") from None


def _load_momentum(optimizer, state: dict) -> list[torch.Tensor]:
    """Load the optimiser's state and return its momentum, which an untrained exit's weights do not have."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})
    found = {p: entry["momentum_buffer"] for p, entry in optimizer.state.items()}
    if not found or any(m.shape != p.shape or m.dtype != p.dtype for p, m in found.items()):
        raise ValueError("momentum is missing or of another shape or type")
    return list(found.values())


def find_checkpoint(path: Path) -> tuple[Checkpoint, str]:
    """The checkpoint that a path means, that file itself or the newest intact one of a run directory; and a note for
    the user, empty where all is well.

    Raises:
        UserError: there is none, or none that is intact.
    """
    if not path.is_dir():
        return load_checkpoint(path), ""
    if not any((path / name).exists() for name in (LAST, PREVIOUS)):
        raise UserError(f"{path} holds no checkpoint: give a run directory, or a checkpoint file")
    try:
        return load_checkpoint(path / LAST), ""
    except UserError as e:
        problem = e
    try:
        return load_checkpoint(path / PREVIOUS), f"{problem}: using {path / PREVIOUS}"
    except UserError as e:
        raise UserError(f"{problem}; {e}: start over with --overwrite or another --run_name") from None
