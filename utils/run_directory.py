"""A run's directory: who may write there, where a run starts, and what is saved after each epoch."""

import contextlib
import fcntl
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils import distributed
from utils.checkpoint import BEST, LAST, PREVIOUS, find_checkpoint, load_checkpoint, reading, write_checkpoint
from utils.errors import Interrupted, UserError, tell
from utils.files import link_atomic, write_atomic
from utils.flags import MAY_CHANGE
from utils.records import best_record

# Beside checkpoints; what --overwrite removes.
FILES = ("metrics.jsonl", "results.json", "config.json", "predictions.npz", "experiment.log", "val.json")
TEMPORARY = re.compile(r"(checkpoint_\w+\.pth|[\w.]+\.jsonl?|predictions\.npz)\.[0-9a-f]{32}\.tmp")

# Writing costs at most about a twentieth of the time, unless a write is too short to matter.
SAVE_INTERVAL = 20  # times the duration of a write
SHORT_WRITE = 0.05  # seconds


class RunDirectory:
    """`<experiments_dir>/<run_name>`, locked while the `with` block lasts; only rank 0 touches it.

    A checkpoint is the complete run (utils/checkpoint.py). config.json, metrics.jsonl and results.json are exported
    from it, after it: they can neither be torn nor run ahead, and are never read back. On an exception, results.json
    gets the status "interrupted" or "failed".

    Args:
        differences: of two command lines, the flags in which they define different experiments (utils/flags.py).
    """

    def __init__(self, path: Path, flags: dict, differences: Callable[[dict, dict], list[str]]):
        self.path, self.flags, self.differences = path, flags, differences
        self.is_main = distributed.is_main()
        self.is_finished = False
        self.source: Path | None = None  # the checkpoint that the run continues from
        self.history: list[dict] = []  # one record per epoch
        self.seconds_saving = 0.0  # of the last epoch's save; 0 if it was not saved
        self._record = {"args": flags, "starts": [], "changes": [], "test": None, "finished": False}
        self._has_begun = False
        self._lock = None
        self._num_saved = 0  # epochs in LAST
        self._lines: list[str] = []  # of metrics.jsonl, so that each record is serialised once
        self._write_seconds, self._saved_at = 0.0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._has_begun and error is not None:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            with contextlib.suppress(OSError, UserError):  # the error itself matters more than these files
                self.export(status)
        if isinstance(error, Interrupted) and self.is_main:
            what = "nothing saved yet; rerunning starts from scratch"
            if self._num_saved:
                again = "the same command" + (" without --overwrite" if self.flags["overwrite"] else "")
                what = f"{self._num_saved} epoch(s) are saved in {self.path / LAST}; rerun {again} to resume"
            tell(f"\ninterrupted: {what}", sys.stderr)
        if self._lock is not None:
            self._lock.close()

    def open(self) -> dict | None:
        """Decide where the run starts, and return the checkpoint to continue from, None to start from nothing.

        1. --overwrite: from nothing; but a process that torchrun has restarted continues what its launch began.
        2. A checkpoint here: from the newest intact one. With --resume, only if the run was started from that path.
        3. No checkpoint here, --resume: from that checkpoint.
        4. Neither: from nothing.
        In 3 and 4 a directory with files of another run, or of something else, is refused; in 2 and 3, other flags.
        `is_finished` says that the run has nothing left to do. A new directory is made by `begin`, so that a run that
        cannot start leaves none behind.

        Raises:
            UserError: the directory is in use or cannot be written, or the checkpoint is damaged, foreign, or was
                trained with other flags.
        """
        checkpoint, self.source, self.is_finished = distributed.broadcast_from_rank_0(self._open)
        if checkpoint is not None:
            self.history = checkpoint["history"]
            self._record |= {name: checkpoint[name] for name in ("data", "starts", "changes")}
            if self.source.parent == self.path:  # what the run was started from once, also where nobody says so again
                self._record["args"] = {**self.flags, "resume": checkpoint["args"].get("resume")}
            if self.is_finished:
                self._record |= {name: checkpoint[name] for name in ("args", "test", "finished")}
        return checkpoint

    def _open(self) -> tuple[dict | None, Path | None, bool]:
        if self.path.exists():
            self._acquire_lock()
        if self.flags["overwrite"] and not self._was_begun_by_this_launch():
            return None, None, False
        is_here = (self.path / LAST).exists() or (self.path / PREVIOUS).exists()
        if not is_here:
            self._check_is_unused()
            if self.flags["resume"] is None:
                return None, None, False
        checkpoint, source, note = find_checkpoint(self.path if is_here else Path(self.flags["resume"]))
        with reading(source):
            if is_here and self.flags["resume"] is not None:
                self._check_origin(checkpoint)
            self._check_flags(checkpoint, source)
        done, wanted = len(checkpoint["history"]), self.flags["end_epoch"]
        self._num_saved = done if is_here else 0
        if note:
            tell(note)
        lacks_predictions = self.flags["save_predictions"] and not (self.path / "predictions.npz").exists()
        is_finished = is_here and done == wanted and checkpoint["finished"] and not lacks_predictions
        if done < wanted:
            tell(f"continuing from {source}: {done} of {wanted} epochs are done")
        return checkpoint, source, is_finished

    def _was_begun_by_this_launch(self) -> bool:
        """Whether the processes before a restart by torchrun had saved an epoch of this very launch."""
        if not distributed.is_restart():
            return False
        try:
            checkpoint, _, _ = find_checkpoint(self.path)
        except UserError:
            return False
        return checkpoint["starts"][-1]["launch"] == distributed.launch_id()

    def _check_is_unused(self) -> None:
        """Raises UserError where a directory without a checkpoint holds what this run would overwrite or remove."""
        if not self.path.exists():
            return
        metrics = self.path / "metrics.jsonl"
        if metrics.is_file() and metrics.stat().st_size > 0:
            raise UserError(
                f"{self.path} holds the results of a run whose checkpoints are gone: give another --run_name, or"
                " --overwrite to start over"
            )
        # A run that was stopped before its first save leaves none of the first three, and others beside results.json.
        unexpected = ["checkpoint_*.pth", "predictions.npz", "val.json"]
        if not self._holds_status():
            unexpected += ["results.json", "config.json", "experiment.log"]
        foreign = [file for pattern in unexpected for file in self.path.glob(pattern)]
        if foreign:
            raise UserError(
                f"{foreign[0]} is not this run's: give another --run_name, or --overwrite to remove what is there"
            )

    def _holds_status(self) -> bool:
        """Whether results.json is one of `export`'s."""
        try:
            return "status" in dict(json.loads((self.path / "results.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return False

    def _check_origin(self, checkpoint: dict) -> None:
        """Raises UserError where --resume names something else than this directory or what its run started from."""
        given = Path(self.flags["resume"])
        if (given if given.is_dir() else given.parent).resolve() == self.path.resolve():
            if given.is_file() and given.name != LAST:
                raise UserError(f"{self.path} continues from its {LAST}: give another --run_name to start from {given}")
        elif _origin(checkpoint["args"].get("resume")) != _origin(given):
            raise UserError(f"{self.path} holds a run that was not started from {given}: give another --run_name")

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

    def _check_flags(self, checkpoint: dict, source: Path) -> None:
        """Raises UserError where flags or number of processes are not the checkpoint's; notes what was allowed to
        change."""
        before, now = dict(checkpoint["args"]), dict(self.flags)
        before["processes"], now["processes"] = checkpoint["starts"][-1]["processes"], distributed.world_size()
        done = len(checkpoint["history"])
        for name in self.flags["allow_change"]:
            if before.get(name) != now[name]:
                change = {"epoch": done, "name": name, "before": before.get(name), "after": now[name]}
                checkpoint["changes"].append(change)
                before[name] = now[name]
        differ = [line.replace("--processes", "processes") for line in self.differences(before, now)]
        if differ:
            remedy = "give the same ones, another --run_name, or --overwrite to start over"
            raise UserError(
                f"{source} was trained with other flags: {', '.join(differ)}; {remedy}{_permission(differ)}"
            )
        if done > self.flags["end_epoch"]:
            raise UserError(f"{source} has {done} epochs already, more than --end_epoch {self.flags['end_epoch']}")

    def begin(self, environment: dict, data: dict, checkpoint: dict | None) -> None:
        """Write what is known before the first epoch; a new run removes an earlier one's files first.

        Args:
            environment: versions, device, processes and commit of this start (utils/machine.py).
            data: the data record (data/__init__.py).
            checkpoint: what `open` returned.

        Raises:
            UserError: the directory cannot be made, or another run has begun there.
        """
        if not self.is_main:
            return
        if self._lock is None:
            self._acquire_lock()
            if (self.path / LAST).exists():
                raise UserError(f"{self.path} is now used by another run; rerun this command to continue it")
        self.check_lock()
        start = {"epoch": len(self.history), **environment, "launch": distributed.launch_id()}
        self._record["data"] = data
        self._record["starts"] = [*self._record["starts"], start]

        unwanted = [file for file in self.path.iterdir() if TEMPORARY.fullmatch(file.name)]
        # Event files are rewritten from the history, so that no step is in them twice.
        unwanted += self.path.glob("tensorboard/**/events.out.tfevents.*")
        if checkpoint is None:
            unwanted += [self.path / name for name in FILES]
            unwanted += self.path.glob("checkpoint_*.pth")
        elif len(self.history) < self.flags["end_epoch"]:
            unwanted.append(self.path / "predictions.npz")  # of an earlier end
        for file in unwanted:
            file.unlink(missing_ok=True)

        if checkpoint is not None:
            if self.source != self.path / LAST:  # another directory's, or PREVIOUS, the last one being damaged
                write_checkpoint(self.path / LAST, {**checkpoint, **self._record})
            self._link_names()
            self._check_best()
        self._num_saved = len(self.history)
        self._has_begun = True
        self.export("running")

    def _link_names(self) -> None:
        """Give LAST the other names of its epoch: BEST, and that of --saveckp_freq."""
        epoch, frequency = len(self.history) - 1, self.flags["saveckp_freq"]
        if best_record(self.history)["epoch"] == epoch:
            link_atomic(self.path / LAST, self.path / BEST)
        if frequency > 0 and (epoch + 1) % frequency == 0:
            link_atomic(self.path / LAST, self.path / f"checkpoint_epoch{epoch}.pth")

    def _check_best(self) -> None:
        """See that BEST is of this run's best epoch: copy it from where the run comes from, or remove another's."""
        best = self.history[: best_record(self.history)["epoch"] + 1]
        for file in (self.path / BEST, self.source.with_name(BEST)):
            with contextlib.suppress(UserError):  # missing or damaged
                if load_checkpoint(file)["history"] == best:
                    if file.parent != self.path:
                        write_atomic(self.path / BEST, file.read_bytes())
                    return
        (self.path / BEST).unlink(missing_ok=True)

    def save(self, record: dict, make_states: Callable[[], dict]) -> None:
        """Add an epoch's record, and save the epoch if it is the best or the last, or if the last save was long ago.

        LAST becomes PREVIOUS; BEST and the checkpoints of --saveckp_freq are links to the same file as LAST.

        Args:
            record: the epoch's line of metrics.jsonl.
            make_states: returns the checkpoint's entries that hold states.
        """
        self.history.append(record)
        self.seconds_saving = 0.0
        self.check_lock()
        done, frequency = len(self.history), self.flags["saveckp_freq"]
        start = time.perf_counter()
        is_due = self._write_seconds < SHORT_WRITE or start - self._saved_at > SAVE_INTERVAL * self._write_seconds
        is_named = best_record(self.history) is record or (frequency > 0 and done % frequency == 0)
        if not (is_due or is_named or done == self.flags["end_epoch"]):
            return
        if (self.path / LAST).exists():
            link_atomic(self.path / LAST, self.path / PREVIOUS)
        states = make_states()
        write_checkpoint(self.path / LAST, {**states, **self._record, "epoch": done - 1, "history": self.history})
        self._link_names()
        self._num_saved = done
        self.export("running")
        self._saved_at = time.perf_counter()
        self.seconds_saving = self._write_seconds = self._saved_at - start

    def finish(self, test: dict | None) -> None:
        """Add the test block to BEST and LAST, and mark the run as finished: nothing more is done for it."""
        self.check_lock()
        self._record |= {"test": test, "finished": True}
        last = load_checkpoint(self.path / LAST)
        if (self.path / BEST).exists() and not os.path.samefile(self.path / BEST, self.path / LAST):
            best = load_checkpoint(self.path / BEST)
            write_checkpoint(self.path / BEST, {**best, "test": test})
            write_checkpoint(self.path / LAST, {**last, **self._record})
        else:
            write_checkpoint(self.path / BEST, {**last, **self._record})
            link_atomic(self.path / BEST, self.path / LAST)
        self.export("finished")

    def results(self, status: str, test: dict | None) -> dict:
        """The content of results.json."""
        history = self.history[: self._num_saved]
        seconds = [r["seconds"] + r.get("seconds_validation", 0) + r.get("seconds_saving", 0) for r in history]
        results = {
            "status": status,
            "epochs": len(history),
            "seconds_per_epoch": statistics.median(r["seconds"] for r in history) if history else None,
            "hours": sum(seconds) / 3600,
            "last": history[-1] if history else None,
            "best": best_record(history),
        }
        return results if test is None else results | {"test": test}

    def export(self, status: str) -> None:
        """Write config.json, metrics.jsonl and results.json where they are missing or differ.

        results.json comes last when the run is finished, else first: so that a status of "finished" never stands
        beside other files than the finished run's.
        """
        if not self.is_main:
            return
        self.check_lock()
        self._lines += [json.dumps(record) + "\n" for record in self.history[len(self._lines) : self._num_saved]]
        record = self._record
        starts = [{name: start[name] for name in start if name != "launch"} for start in record["starts"]]
        environment = {name: value for name, value in starts[-1].items() if name != "epoch"}
        origin = {"data": record["data"], "starts": starts, "changes": record["changes"]}
        contents = {
            "results.json": json.dumps(self.results(status, record["test"]), indent=1) + "\n",
            "metrics.jsonl": "".join(self._lines),
            "config.json": json.dumps({**record["args"], **environment, **origin}, indent=1) + "\n",
        }
        names = reversed(contents) if status == "finished" else contents
        for name in names:
            file, content = self.path / name, contents[name].encode()
            if not (file.is_file() and file.read_bytes() == content):
                write_atomic(file, content)


def _origin(resume: str | Path | None) -> Path | None:
    """What --resume names: a directory, or a file that is not the last checkpoint of one."""
    if resume is None:
        return None
    path = Path(resume).resolve()
    return path.parent if path.name == LAST else path


def _permission(differ: list[str]) -> str:
    """How to let these changes be; empty where one of them may not be allowed."""
    names = [line.split()[0].removeprefix("--") for line in differ]
    if not set(names) <= set(MAY_CHANGE):
        return ""
    return f" (--allow_change {' '.join(names)} continues all the same and records it)"
