"""A run's directory: who may write there, where a run starts, and what is kept after each epoch."""

import contextlib
import fcntl
import json
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from utils.checkpoint import load_checkpoint, serialise, sync_directory, write_atomic, write_json
from utils.errors import UserError

LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
NEW = "checkpoint_new.pth"  # while it is written
DAMAGED = "checkpoint_damaged.pth"  # a last one that could not be read, put aside

FILES = (
    LAST, PREVIOUS, BEST, DAMAGED, "metrics.jsonl", "results.json", "config.json", "predictions.npz", "experiment.log",
    "val.json",
)  # fmt: skip
# Flags that may differ when a run goes on: they say where and how it is computed or kept, not what.
NOT_DEFINING = {
    "data_path", "workers", "device", "compile", "experiments_dir", "run_name", "resume", "val_only", "overwrite",
    "saveckp_freq", "save_predictions", "allow_end_epoch_change",
}  # fmt: skip


def differences(before: dict, now: dict, allowed: set[str] = NOT_DEFINING) -> list[str]:
    """The flags in which two command lines ask for different experiments, each as `--flag OLD -> NEW`."""
    names = (before.keys() | now.keys()) - allowed
    return [f"--{n} {before.get(n)} -> {now.get(n)}" for n in sorted(names) if before.get(n) != now.get(n)]


class RunDirectory:
    """`<experiments_dir>/<run_name>`, held by a lock while the object lives.

    A checkpoint holds the run's whole history, so it alone says what happened: metrics.jsonl and results.json are
    written from it, after it, and can neither be torn nor run ahead.

    Raises:
        UserError: another process that is alive holds the directory, or it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.source: Path | None = None  # the checkpoint file that the run goes on from
        self.num_kept: int | None = None  # epochs in the checkpoints; None until it is known to be this run's directory
        try:
            self._is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "a")  # noqa: SIM115  (held until the process ends)
        except OSError as e:
            raise UserError(f"{path} cannot be used as a run directory: {e.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process ends
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{path} is in use by another run; wait for it, or choose another --run_name") from None
        except OSError:
            pass  # a file system without locks

    def close(self) -> None:
        """Let go of the directory, and remove it again where nothing has been written into it."""
        if self._is_new and [file.name for file in self.path.iterdir()] == [".lock"]:
            shutil.rmtree(self.path)
        self._lock.close()

    def starting_point(self, flags: dict, say: Callable[[str], None]) -> dict | None:
        """The checkpoint to go on from; None to start anew.

        Args:
            flags: the command line; `resume`, `overwrite`, `allow_end_epoch_change` and `end_epoch` say what is
                wanted, the others must be those of the checkpoint unless NOT_DEFINING names them.
            say: where notes for the user go.

        Raises:
            UserError: the checkpoint is damaged or foreign, or was trained with other flags.
        """
        if flags["overwrite"]:
            return None
        checkpoint, note = None, ""
        is_own = (self.path / LAST).exists() or (self.path / PREVIOUS).exists()
        if not is_own and self._results().get("epochs"):
            raise UserError(
                f"{self.path} holds the results of a run whose checkpoints are gone: give another --run_name, or"
                " --overwrite to start anew"
            )
        if is_own:
            checkpoint, self.source, note = find_checkpoint(self.path)
        if flags["resume"] is not None:
            given = Path(flags["resume"])
            directory = given if given.is_dir() else given.parent
            if directory.resolve() != self.path.resolve():
                other, file, other_note = find_checkpoint(given)
                # Either may have gone on since the one was taken from the other.
                common = min(len(other["history"]), len(checkpoint["history"])) if is_own else 0
                if not is_own:
                    checkpoint, self.source, note = other, file, other_note
                elif checkpoint["history"][:common] != other["history"][:common]:
                    raise UserError(f"{self.path} holds another run than {file}: give another --run_name")
            elif given != directory and given.name not in (LAST, PREVIOUS):
                raise UserError(
                    f"{given} lies in the run's own directory, which goes on from {LAST}: give another"
                    " --run_name to go on from here"
                )
            elif not is_own:
                raise UserError(f"{given} holds no {LAST}")
        if checkpoint is None:
            return None
        if note:
            say(note)
        self._check_flags(checkpoint, flags, self.source)
        done = checkpoint["epoch"] + 1
        if is_own:
            self.num_kept = done
        if done < flags["end_epoch"]:
            say(f"going on from {self.source}: {done} of {flags['end_epoch']} epochs are done")
        return checkpoint

    @staticmethod
    def _check_flags(checkpoint: dict, flags: dict, source: Path) -> None:
        differ = differences(checkpoint["args"], flags)
        if [d.split()[0] for d in differ] == ["--end_epoch"]:
            if not flags["allow_end_epoch_change"]:
                raise UserError(
                    f"{source} was trained with another {differ[0]}, on which PS-KD's alpha_t depends: give"
                    " --allow_end_epoch_change to go on all the same"
                )
        elif differ:
            raise UserError(
                f"{source} was trained with other flags: {', '.join(differ)}; give the same ones, another"
                " --run_name, or --overwrite to start anew"
            )
        done = checkpoint["epoch"] + 1
        if done > flags["end_epoch"]:
            raise UserError(f"{source} has {done} epochs already, more than --end_epoch {flags['end_epoch']}")

    def is_finished(self, end_epoch: int) -> bool:
        """Whether the run's files say so, and are there; those that are not, the same command writes again."""
        results = self._results()
        whole = results.get("last") and all((self.path / name).exists() for name in ("config.json", "metrics.jsonl"))
        return bool(whole) and results.get("status") == "finished" and results.get("epochs") == end_epoch

    def _results(self) -> dict:
        """What results.json says; nothing where it is missing or damaged."""
        try:
            results = json.loads((self.path / "results.json").read_text())
        except (OSError, ValueError):
            return {}
        return results if isinstance(results, dict) else {}

    def begin(self, config: dict, history: list[dict], overwrite: bool) -> None:
        """Write what is known before the first epoch; with `overwrite`, remove the former run's files first."""
        if overwrite:
            for file in [*(self.path / name for name in FILES), *self.path.glob("checkpoint_epoch*.pth")]:
                file.unlink(missing_ok=True)
        for name in (*FILES, NEW):  # of a process that was killed while it wrote
            (self.path / f"{name}.tmp").unlink(missing_ok=True)
        (self.path / NEW).unlink(missing_ok=True)
        if len(history) < config["end_epoch"]:
            (self.path / "predictions.npz").unlink(missing_ok=True)  # of an earlier end
        if self.source is not None and self.source.resolve().parent != self.path.resolve():
            self._adopt(history)
        elif self.source == self.path / PREVIOUS:
            # The next save makes LAST the previous one: what is damaged must not take the place of what is whole.
            if (self.path / LAST).exists():
                os.replace(self.path / LAST, self.path / DAMAGED)
            self._link(self.source, LAST)
        # Event files are written anew from the history: so no step stands there twice.
        for events in self.path.glob("tensorboard/events.out.tfevents.*"):
            events.unlink()
        write_json(self.path / "config.json", config)
        self.write_records(history, "running")
        self.num_kept = len(history)

    def _adopt(self, history: list[dict]) -> None:
        """Make the other directory's checkpoint this one's last, and its best one so far, if it is there, this
        one's best."""
        best = history[: best_record(history)["epoch"] + 1]
        for file in (self.source, self.source.with_name(BEST)):
            if file.exists() and load_checkpoint(file)["history"] == best:
                write_atomic(self.path / BEST, file.read_bytes())
                break
        write_atomic(self.path / LAST, self.source.read_bytes())

    def save(self, checkpoint: dict, is_best: bool, keep: bool) -> None:
        """Keep an epoch's checkpoint: as the last one, the former last as the previous one, and, where it is the
        best so far or to be kept for good (`keep`), under those names too. One file is written; the other names
        are links to it."""
        content = serialise(checkpoint)
        new = self.path / NEW
        write_atomic(new, content)
        if is_best:
            self._link(new, BEST)
        if keep:
            self._link(new, f"checkpoint_epoch{checkpoint['epoch']}.pth")
        if (self.path / LAST).exists():
            self._link(self.path / LAST, PREVIOUS)  # a link, so that LAST is there at every moment
        os.replace(new, self.path / LAST)
        sync_directory(self.path)
        self.num_kept = len(checkpoint["history"])

    def _link(self, source: Path, name: str) -> None:
        temporary = self.path / (name + ".tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)
        os.replace(temporary, self.path / name)
        temporary.unlink(missing_ok=True)  # renaming one link of a file to another does nothing

    def write_records(self, history: list[dict], status: str, test: dict | None = None) -> dict:
        """Write metrics.jsonl and results.json; return what the latter says."""
        lines = "".join(json.dumps(record) + "\n" for record in history)
        write_atomic(self.path / "metrics.jsonl", lines.encode())
        results = {
            "status": status,
            "epochs": len(history),
            "seconds_per_epoch": statistics.median(r["seconds"] for r in history) if history else None,
            "last": history[-1] if history else None,
            "best": best_record(history),
        }
        if test is not None:
            results["test"] = test
        write_json(self.path / "results.json", results)
        return results

    def set_status(self, status: str) -> None:
        """Change the status that results.json gives, if it is an unfinished run's and the disk allows."""
        if self.num_kept is None:
            return
        results = self._results()
        with contextlib.suppress(OSError, UserError):  # the message on the console matters more than this file
            if results and results.get("status") != "finished":
                write_json(self.path / "results.json", {**results, "status": status})


def find_checkpoint(path: Path) -> tuple[dict, Path, str]:
    """The checkpoint that a path means, that file itself or the newest whole one of a run directory; its file; and
    what to tell the user about it.

    Raises:
        UserError: there is none, or none that is whole.
    """
    if not path.is_dir():
        return load_checkpoint(path), path, ""
    last, previous = path / LAST, path / PREVIOUS
    problem = f"{path} holds no {LAST}"
    if last.exists():
        try:
            return load_checkpoint(last), last, ""
        except UserError as e:
            if not os.access(last, os.R_OK):  # it may be whole: nothing to be put aside
                raise
            problem = str(e)
    elif not previous.exists():
        raise UserError(problem)
    remedy = "start anew with --overwrite or another --run_name"
    if not previous.exists():
        raise UserError(f"{problem}; there is no older one: {remedy}")
    try:
        checkpoint = load_checkpoint(previous)
    except UserError as e:
        raise UserError(f"{problem}, and {e}: {remedy}") from None
    return checkpoint, previous, f"{problem}: going on from {PREVIOUS}"


def best_record(history: list[dict]) -> dict | None:
    """The epoch of lowest top-1 error, the earliest where several tie."""
    return min(history, key=lambda record: record["val"]["top1_error"], default=None)
