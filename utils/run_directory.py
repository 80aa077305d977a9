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
from utils.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    best_record,
    find_checkpoint,
    link_atomic,
    load_checkpoint,
    read_json,
    sync_directory,
    write_atomic,
    write_json,
)  # fmt: skip
from utils.flags import differences
from utils.runtime import Interrupted, UserError

NEW = "checkpoint_new.pth"  # while it is written
FILES = (LAST, PREVIOUS, BEST, "metrics.jsonl", "results.json", "config.json", "predictions.npz", "experiment.log",
         "val.json")  # fmt: skip

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
        self._num_saved: int | None = None  # epochs in LAST; None until the directory is known to be this run's
        self._write_seconds, self._saved_at = 0.0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._lock is None:
            return
        if error is not None:
            self._set_status("interrupted" if isinstance(error, Interrupted) else "failed")
        if isinstance(error, Interrupted):
            what = "no epoch was saved; the same command starts anew"
            if self._num_saved:
                again = "the same command" + (" without --overwrite" if self.flags["overwrite"] else "")
                what = f"{self._num_saved} epoch(s) are saved in {self.path / LAST}; {again} continues from there"
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"\ninterrupted: {what}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # where nothing was written, leave no empty directory behind
            if self._created and self._owns_lock() and [file.name for file in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                for path in self._created:
                    path.rmdir()
        self._lock.close()

    def open(self) -> dict | None:
        """Lock the directory and decide where the run starts: the checkpoint to continue from, None to start anew.
        Sets `is_finished` where nothing is left to do.

        Raises:
            UserError: the directory is in use or cannot be written, or the checkpoint is damaged, foreign, or was
                trained with other flags.
        """
        checkpoint, self.is_finished = distributed.from_main(self._open)
        return checkpoint

    def _open(self) -> tuple[dict | None, bool]:
        self._acquire_lock()
        flags = self.flags
        restarted = flags["overwrite"] and distributed.is_restart()  # what the processes before these saved must stay
        exists = (self.path / LAST).exists() or (self.path / PREVIOUS).exists()
        if flags["overwrite"] and not restarted:
            return None, False
        if not exists and flags["resume"] is None:
            if read_json(self.path / "results.json").get("epochs"):
                raise UserError(
                    f"{self.path} holds the results of a run whose checkpoints are gone: give another --run_name, or"
                    " --overwrite to start anew"
                )
            return None, False
        other = self._other_source()
        if exists and other and read_json(self.path / "config.json").get("resume") != flags["resume"]:
            raise UserError(f"{self.path} holds another run than one from {other}: give another --run_name")
        source = other if other and not exists else self.path
        checkpoint, self.source, note = find_checkpoint(source)
        self._check_flags(checkpoint)
        done, wanted = checkpoint["epoch"] + 1, flags["end_epoch"]
        finished = exists and done == wanted and self._has_all_files()
        if finished and restarted:
            raise UserError(
                f"{self.path} is finished, perhaps by an earlier run: processes started with --overwrite died, maybe"
                " before they began; rerun the same command"
            )
        if exists:
            self._num_saved = done
        if note:
            print(note)
        if done < wanted:
            print(f"continuing from {self.source}: {done} of {wanted} epochs are done")
        return checkpoint, finished

    def _other_source(self) -> Path | None:
        """The path of --resume where that lies outside this directory."""
        if self.flags["resume"] is None:
            return None
        given = Path(self.flags["resume"])
        directory = given if given.is_dir() else given.parent
        if directory.resolve() != self.path.resolve():
            return given
        if given != directory and given.name not in (LAST, PREVIOUS):
            raise UserError(
                f"{given} lies in the run's own directory, which continues from {LAST}: give another --run_name to"
                " continue from here"
            )
        return None

    def _acquire_lock(self) -> None:
        try:
            self._created = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115  (held until the process ends)
        except OSError as e:
            raise UserError(f"{self.path} cannot be used as a run directory: {e.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process ends
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise UserError(f"{self.path} is in use by another run; wait, or choose another --run_name") from None
        except OSError:
            pass  # a file system without locks

    def _owns_lock(self) -> bool:
        """Whether this run's lock is still the directory's. Where not, another run may have its name."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock"))
        except OSError:
            return False

    def check_lock(self) -> None:
        """Raises UserError where the directory was renamed or its lock deleted; called before anything is written."""
        if not self._owns_lock():
            raise UserError(f"{self.path} was renamed or its .lock removed during this run: nothing more is written")

    def _check_flags(self, checkpoint: dict) -> None:
        differ = differences(checkpoint["args"], self.flags)
        if [d.split()[0] for d in differ] == ["--end_epoch"]:
            if not self.flags["allow_end_epoch_change"]:
                raise UserError(
                    f"{self.source} was trained with another {differ[0]}, on which PS-KD's alpha_t depends: give"
                    " --allow_end_epoch_change to continue all the same"
                )
        elif differ:
            raise UserError(
                f"{self.source} was trained with other flags: {', '.join(differ)}; give the same ones, another"
                " --run_name, or --overwrite to start anew"
            )
        done = checkpoint["epoch"] + 1
        if done > self.flags["end_epoch"]:
            raise UserError(f"{self.source} has {done} epochs already, more than --end_epoch {self.flags['end_epoch']}")

    def _has_all_files(self) -> bool:
        """Whether results.json says "finished" and no file is missing; the same command writes missing ones again."""
        names = ["config.json", "metrics.jsonl", *(["predictions.npz"] if self.flags["save_predictions"] else [])]
        results = read_json(self.path / "results.json")
        is_finished = results.get("status") == "finished" and results.get("epochs") == self.flags["end_epoch"]
        return is_finished and all((self.path / name).exists() for name in names)

    def begin(self, facts: dict, history: list[dict]) -> None:
        """Write what is known before the first epoch; with --overwrite, remove the earlier run's files first.

        Args:
            facts: what config.json holds beside the flags: `data`, and the machine's facts.
            history: the records of the epochs that are done.
        """
        if not self.is_main:
            return
        self.check_lock()
        starts = read_json(self.path / "config.json").get("starts", [])
        if self.source is None:  # a new run
            starts = []
            for file in [*(self.path / name for name in FILES), *self.path.glob("checkpoint_epoch*.pth")]:
                file.unlink(missing_ok=True)
        for name in (*FILES, NEW):  # left by a process that was killed while it wrote
            (self.path / f"{name}.tmp").unlink(missing_ok=True)
        (self.path / NEW).unlink(missing_ok=True)
        if len(history) < self.flags["end_epoch"]:
            (self.path / "predictions.npz").unlink(missing_ok=True)  # of an earlier end
        machine = {key: value for key, value in facts.items() if key != "data"}
        starts.append({"epoch": len(history), **machine})
        write_json(self.path / "config.json", {**self.flags, **facts, "starts": starts})
        if self.source is not None and self.source.resolve().parent != self.path.resolve():
            self._adopt(history)
        elif self.source == self.path / PREVIOUS:
            link_atomic(self.source, self.path / LAST)  # which the next save makes the previous one: it must be intact
        # Event files are written anew from the history, so that no step is in them twice.
        for events in self.path.glob("tensorboard/events.out.tfevents.*"):
            events.unlink()
        self.write_records(history, "running")
        self._num_saved = len(history)

    def _adopt(self, history: list[dict]) -> None:
        """Make the other directory's checkpoint this one's last, and its best one so far, if it exists, the best."""
        best = history[: best_record(history)["epoch"] + 1]
        for file in (self.source, self.source.with_name(BEST)):
            if file.exists() and load_checkpoint(file)["history"] == best:
                write_atomic(self.path / BEST, file.read_bytes())
                break
        write_atomic(self.path / LAST, self.source.read_bytes())

    def save(self, make_states: Callable[[], dict], history: list[dict]) -> None:
        """Save an epoch if it is the best or the last, or if the last save lies long enough back.

        LAST becomes PREVIOUS; BEST and the checkpoints of --saveckp_freq are links to the same file.

        Args:
            make_states: returns the entries `model`, `optimizer`, `objective`.
            history: all records, this epoch's last.
        """
        self.seconds_saving = 0.0
        if not self.is_main:
            return
        self.check_lock()
        epoch, frequency = history[-1]["epoch"], self.flags["saveckp_freq"]
        is_best = best_record(history)["epoch"] == epoch
        keep = frequency > 0 and (epoch + 1) % frequency == 0
        is_last = epoch + 1 == self.flags["end_epoch"]
        start = time.perf_counter()
        due = self._write_seconds < SHORT_WRITE or start - self._saved_at > SAVE_INTERVAL * self._write_seconds
        if not (is_best or keep or is_last or due):
            return
        buffer = io.BytesIO()
        torch.save({**make_states(), "epoch": epoch, "history": history, "args": self.flags}, buffer)
        new = self.path / NEW
        write_atomic(new, buffer.getbuffer())
        if is_best:
            link_atomic(new, self.path / BEST)
        if keep:
            link_atomic(new, self.path / f"checkpoint_epoch{epoch}.pth")
        if (self.path / LAST).exists():
            link_atomic(self.path / LAST, self.path / PREVIOUS)  # a link, so that LAST exists at every moment
        os.replace(new, self.path / LAST)
        sync_directory(self.path)
        self._num_saved = len(history)
        self.write_records(history, "running")
        self._saved_at = time.perf_counter()
        self.seconds_saving = self._write_seconds = self._saved_at - start

    def write_records(self, history: list[dict], status: str, test: dict | None = None) -> dict:
        """Write metrics.jsonl and results.json; return the content of the latter."""
        seconds = [sum(r.get(f"seconds{k}", 0.0) for k in ("", "_validation", "_saving")) for r in history]
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
        if self.is_main:
            self.check_lock()
            write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in history).encode())
            write_json(self.path / "results.json", results)
        return results

    def _set_status(self, status: str) -> None:
        """Change the status in results.json, if it is an unfinished run's and the disk allows."""
        if self._num_saved is None:
            return
        results = read_json(self.path / "results.json")
        with contextlib.suppress(OSError, UserError):  # the message on the console matters more than this file
            if results and results.get("status") != "finished" and self._owns_lock():
                write_json(self.path / "results.json", {**results, "status": status})
