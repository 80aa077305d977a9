"""May a run go on with these flags and these images? Decided without touching a file."""

from pathlib import Path

from utils.errors import UserError
from utils.records import Change, find_changes

# Between two starts of a run, with --allow_change.
MAY_CHANGE = ("end_epoch", "lr_decay_schedule", "precision", "processes", "weights_digest")


def check_flags(file: Path, before: dict, now: dict, defaults: dict, allowed: list[str]) -> list[Change]:
    """The differences between a checkpoint's flags and the command's, all of which are allowed.

    Args:
        file: the checkpoint, to be named in errors.
        before, now: the flags that define the experiment, and `processes`.
        defaults: of these flags.
        allowed: names that may differ (`--allow_change`).

    Raises:
        UserError: something else differs.
    """
    changes = find_changes(before, now, defaults)
    refused = [change for change in changes if change.name not in allowed]
    if not refused:
        return changes
    remedy = (
        "give the same ones, or start a new run: without --resume, with --overwrite, or with another --run_name (and"
        " --weights PATH, to begin from a run's weights)"
    )
    names = [change.name for change in refused]
    if set(names) <= set(MAY_CHANGE):
        remedy += f"; --allow_change {' '.join(names)} continues all the same and records it"
    raise UserError(f"{file} was trained with other flags: {', '.join(map(str, refused))}; {remedy}")


def check_length(file: Path, done: int, end_epoch: int) -> None:
    """Raises UserError where a run has more epochs than the command asks for."""
    if done > end_epoch:
        raise UserError(f"{file} has {done} epochs already, more than --end_epoch {end_epoch}")
