"""A run's directory: who may write there, where a run starts, and what is saved after each epoch."""

import contextlib
import fcntl
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from utils import distributed
from utils.checkpoint import BEST, LAST, PREVIOUS, find_checkpoint
from utils.errors import Interrupted, UserError
from utils.files import link_atomic, read_json, write_atomic, write_json
from utils.flags import differences
from utils.records import best_record

# Beside checkpoints; what --overwrite removes.
FILES = ("metrics.jsonl", "results.json", "config.json", "predictions.npz", "experiment.log", "val.json")

# Writing costs at most about a twentieth of the time, unless a write is too short to matter.
SAVE_INTERVAL = 20  # times the duration of a write
SHORT_WRITE = 0.05  # seconds


class RunDirectory:
    """`<experiments_dir>/<run_name>`, locked while the `with` block lasts; only rank 0 touches it.

    A checkpoint holds the run's complete history: metrics.jsonl and results.json are written from it, after it, and
    can neither be torn nor run ahead. On an exception, results.json gets the status "interrupted" or "failed".
    """

    def __init__(self, path: Path, flags: dict):
        self.path, self.flags = path, flags
        self.is_main = distributed.is_main()
        self.is_finished = False
        self.source: Path | None = None  # the checkpoint that the run continues from
        self.seconds_saving = 0.0  # of the last epoch's save; 0 if it was not saved
        self._lock = None
        self._history: list[dict] | None = None  # None until the run has begun
        self._num_saved = 0  # epochs in LAST
        self._write_seconds, self._saved_at = 0.0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._history is not None and error is not None:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            with contextlib.suppress(OSError, UserError):  # the error itself matters more than this file
                self.write_records(self._history[: self._num_saved], status)
        if isinstance(error, Interrupted) and self.is_main:
            what = "no epoch was saved; the same command starts over"
            if self._num_saved:
                again = "the same command" + (" without --overwrite" if self.flags["overwrite"] else "")
                what = f"{self._num_saved} epoch(s) are saved in {self.path / LAST}; {again} continues from there"
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"\ninterrupted: {what}", file=sys.stderr, flush=True)
        if self._lock is not None:
            self._lock.close()

    def open(self) -> dict | None:
        """Decide where the run starts: the checkpoint to continue from, None to start over. Sets `is_finished` where
        nothing is left to do. A new directory is made by `begin`, so that a run that cannot start leaves none behind.

        Raises:
            UserError: the directory is in use or cannot be written, or the checkpoint is damaged, foreign, or was
                trained with other flags.
        """
        checkpoint, self.is_finished = distributed.from_main(self._open)
        return checkpoint

    def _open(self) -> tuple[dict | None, bool]:
        flags = self.flags
        if self.path.exists():
            self._acquire_lock()
        # What the processes before a restart saved must stay, if they had begun: config.json says so.
        has_begun = distributed.is_restart() and read_json(self.path / "config.json").get("overwrite")
        if flags["overwrite"] and not has_begun:
            return None, False
        exists = (self.path / LAST).exists() or (self.path / PREVIOUS).exists()
        results = read_json(self.path / "results.json")
        if not exists and flags["resume"] is None:
            if results.get("epochs"):
                raise UserError(
                    f"{self.path} holds the results of a run whose checkpoints are gone: give another --run_name, or"
                    " --overwrite to start over"
                )
            return None, False
        checkpoint, self.source, note = find_checkpoint(self._find_source(exists))
        self._check_flags(checkpoint)
        done, wanted = checkpoint["epoch"] + 1, flags["end_epoch"]
        self._num_saved = done if exists else 0
        if note:
            print(note)
        is_finished = exists and done == results.get("epochs") == wanted and results.get("status") == "finished"
        files = ["config.json", "metrics.jsonl", *(["predictions.npz"] if flags["save_predictions"] else [])]
        if not all((self.path / file).exists() for file in files):  # they are written again
            is_finished = False
        if is_finished:
            print(f"{self.path} is finished ({wanted} epochs); --overwrite starts over")
        elif done < wanted:
            print(f"continuing from {self.source}: {done} of {wanted} epochs are done")
        return checkpoint, is_finished

    def _find_source(self, exists: bool) -> Path:
        """What the run continues from: this directory where it has a checkpoint, else the path of --resume."""
        if self.flags["resume"] is None:
            return self.path
        given = Path(self.flags["resume"])
        if (given if given.is_dir() else given.parent).resolve() == self.path.resolve():
            if given.is_file() and given.name != LAST:
                raise UserError(f"{self.path} continues from its {LAST}: give another --run_name to start from {given}")
            return self.path
        if exists and read_json(self.path / "config.json").get("resume") != self.flags["resume"]:
            raise UserError(f"{self.path} holds a run that was not started from {given}: give another --run_name")
        return self.path if exists else given

    def _acquire_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115  (held until the process ends)
        except OSError as e:
            raise UserError(f"{self.path} cannot be used as a run directory: {e.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process ends
        except BlockingIOError:
            raise UserError(f"{self.path} is in use by another run; wait, or choose another --run_name") from None
        except OSError:
            pass  # a file system without locks

    def check_lock(self) -> None:
        """Raises UserError where the directory was renamed or its lock deleted, since another run may have its name;
        called before anything is written."""
        try:
            is_own = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock"))
        except OSError:
            is_own = False
        if not is_own:
            raise UserError(f"{self.path} was renamed or its .lock removed during this run: nothing more is written")

    def _check_flags(self, checkpoint: dict) -> None:
        before, now = checkpoint["args"], self.flags
        if now["allow_end_epoch_change"]:
            now = now | {"end_epoch": before.get("end_epoch")}
        if differ := differences(before, now):
            remedy = "give the same ones, another --run_name, or --overwrite to start over"
            if any(flag.startswith("--end_epoch ") for flag in differ):
                remedy += " (--allow_end_epoch_change lets --end_epoch differ, though PS-KD's alpha_t depends on it)"
            raise UserError(f"{self.source} was trained with other flags: {', '.join(differ)}; {remedy}")
        done = checkpoint["epoch"] + 1
        if done > self.flags["end_epoch"]:
            raise UserError(f"{self.source} has {done} epochs already, more than --end_epoch {self.flags['end_epoch']}")

    def begin(self, facts: dict, history: list[dict]) -> None:
        """Write what is known before the first epoch; a new run removes an earlier one's files first.

        Args:
            facts: what config.json holds beside the flags: `data`, and the machine's facts.
            history: the records of the epochs that are done.

        Raises:
            UserError: the directory cannot be made, or another run has begun there.
        """
        if not self.is_main:
            return
        if self._lock is None:
            self._acquire_lock()
            if (self.path / LAST).exists():
                raise UserError(f"{self.path} was started by another command meanwhile; rerun this one to continue it")
        self.check_lock()
        starts = read_json(self.path / "config.json").get("starts", [])
        if self.source is None:  # a new run
            starts = []
            for file in [*(self.path / name for name in FILES), *self.path.glob("checkpoint_*.pth")]:
                file.unlink(missing_ok=True)
        if len(history) < self.flags["end_epoch"]:
            (self.path / "predictions.npz").unlink(missing_ok=True)  # of an earlier end
        # Event files are rewritten from the history, so that no step is in them twice.
        for file in [*self.path.glob("*.tmp"), *self.path.glob("tensorboard/events.out.tfevents.*")]:
            file.unlink()
        machine = {key: value for key, value in facts.items() if key != "data"}
        starts.append({"epoch": len(history), **machine})
        write_json(self.path / "config.json", {**self.flags, **facts, "starts": starts})
        if self.source == self.path / PREVIOUS:
            link_atomic(self.source, self.path / LAST)  # which the next save makes the previous one: it must be intact
        elif self.source not in (None, self.path / LAST):
            self._import_checkpoint(history)
        self._history, self._num_saved = history, len(history)
        self.write_records(history, "running")

    def _import_checkpoint(self, history: list[dict]) -> None:
        """Copy another directory's checkpoint, and the best one of its history if it is there."""
        best = history[: best_record(history)["epoch"] + 1]
        for file in (self.source, self.source.with_name(BEST)):
            if file.exists() and find_checkpoint(file)[0]["history"] == best:
                write_atomic(self.path / BEST, file.read_bytes())
        write_atomic(self.path / LAST, self.source.read_bytes())

    def save(self, make_states: Callable[[], dict], history: list[dict]) -> None:
        """Save an epoch if it is the best or the last, or if the last save was long enough ago.

        LAST becomes PREVIOUS; BEST and the checkpoints of --saveckp_freq are links to the same file as LAST.

        Args:
            make_states: returns the entries `model`, `optimizer`, `objective`.
            history: all records, this epoch's last.
        """
        self.seconds_saving = 0.0
        self.check_lock()
        epoch, frequency = history[-1]["epoch"], self.flags["saveckp_freq"]
        names = [BEST] if best_record(history)["epoch"] == epoch else []
        if frequency > 0 and (epoch + 1) % frequency == 0:
            names.append(f"checkpoint_epoch{epoch}.pth")
        start = time.perf_counter()
        is_due = self._write_seconds < SHORT_WRITE or start - self._saved_at > SAVE_INTERVAL * self._write_seconds
        if not (names or is_due or epoch + 1 == self.flags["end_epoch"]):
            return
        if (self.path / LAST).exists():
            link_atomic(self.path / LAST, self.path / PREVIOUS)
        buffer = io.BytesIO()
        torch.save({**make_states(), "epoch": epoch, "history": history, "args": self.flags}, buffer)
        first, *others = [*names, LAST]
        write_atomic(self.path / first, buffer.getbuffer())
        for name in others:
            link_atomic(self.path / first, self.path / name)
        self._num_saved = len(history)
        self.write_records(history, "running")
        self._saved_at = time.perf_counter()
        self.seconds_saving = self._write_seconds = self._saved_at - start

    def write_records(self, history: list[dict], status: str, test: dict | None = None) -> dict:
        """Write metrics.jsonl and results.json; return the content of the latter."""
        seconds = [r["seconds"] + r.get("seconds_validation", 0) + r.get("seconds_saving", 0) for r in history]
        results = {
            "status": status,
            "epochs": len(history),
            "seconds_per_epoch": statistics.median(r["seconds"] for r in history) if history else None,
            "hours": sum(seconds) / 3600,
            "last": history[-1] if history else None,
            "best": best_record(history),
        }
        if test is not None:
            results["test"] = test
        self.check_lock()
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in history).encode())
        write_json(self.path / "results.json", results)
        return results
