"""The checkpoint's format: verified when it is read, and loaded."""

import io
import json
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError, first_line

LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
ENTRIES = {"model": dict, "optimizer": dict, "objective": dict, "epoch": int, "history": list, "args": dict}


def load_checkpoint(path: Path) -> dict:
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
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        _check_structure(checkpoint)
    except Exception as e:  # unpickling a foreign file can raise anything
        raise UserError(f"{path} is not an intact checkpoint of this program ({first_line(e)})") from None
    return checkpoint


def _check_structure(checkpoint) -> None:
    """Raises an exception whose message says what is wrong with the structure of a checkpoint."""
    if not isinstance(checkpoint, dict):
        raise TypeError(f"it holds a {type(checkpoint).__name__}")
    for name, kind in ENTRIES.items():
        if not isinstance(checkpoint.get(name), kind):
            raise TypeError(f"{name} is missing or of another type")
    history, args = checkpoint["history"], checkpoint["args"]
    json.dumps([history, args])  # plain values, as metrics.jsonl and config.json have
    if len(history) != checkpoint["epoch"] + 1 or [r["epoch"] for r in history] != list(range(len(history))):
        raise ValueError("its history is not one record per epoch")
    lists = [value for value in args.values() if isinstance(value, list)]
    if not all(isinstance(number, int) for numbers in lists for number in numbers):
        raise ValueError("its args are not this program's flags")


def load_states(checkpoint: dict, source, **owners) -> None:
    """Load the owners' states (`model`, `objective`, `optimizer`) from the checkpoint's entries of the same names.

    An optimiser keeps its own settings, learning rate, momentum and so on: the flags decide them, not the file.

    Raises:
        UserError: a state has other names or shapes than what the flags built, or values that are not finite.
    """
    for name, owner in owners.items():
        state = checkpoint[name]
        try:
            if name == "optimizer":
                owner.load_state_dict({**owner.state_dict(), "state": state["state"]})
                momentum = {p: entry["momentum_buffer"] for p, entry in owner.state.items()}
                if not momentum or any(buffer.shape != p.shape for p, buffer in momentum.items()):
                    raise ValueError("momentum is missing or of another shape")
                tensors = momentum.values()
            else:
                owner.load_state_dict(state)
                tensors = owner.state_dict().values()
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise ValueError("numbers that are not finite")
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
            reason = (str(e).strip().splitlines() or [type(e).__name__])[-1].strip()
            raise UserError(f"{source}: its {name} state does not match these flags ({reason})") from None


def find_checkpoint(path: Path) -> tuple[dict, Path, str]:
    """The checkpoint that a path means, that file itself or the newest intact one of a run directory; its file; and a
    note for the user, empty where all is well.

    Raises:
        UserError: there is none, or none that is intact.
    """
    if not path.is_dir():
        return load_checkpoint(path), path, ""
    problems = []
    for file in (path / LAST, path / PREVIOUS):
        try:
            return load_checkpoint(file), file, "".join(f"{problem}: using {file}" for problem in problems)
        except UserError as e:
            problems.append(str(e))
    raise UserError(f"{'; '.join(problems)}: start over with --overwrite or another --run_name")
