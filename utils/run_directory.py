"""A run's directory: who may write there, what lies there, and what is saved after each epoch."""

import contextlib
import dataclasses
import fcntl
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils import launch
from utils.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, find_checkpoint, load_checkpoint, write_checkpoint
from utils.errors import Interrupted, UserError, tell
from utils.exports import exports
from utils.files import link_atomic, write_atomic
from utils.records import EpochRecord, RunRecord, TestRecord, best_epoch

# What a run writes beside checkpoints, and --overwrite removes.
LOG = "experiment.log"
EXPORTS = ("config.json", "metrics.jsonl", "results.json", "predictions.npz")
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
        runtime_flags: names of flags that do not define the experiment, for config.json.
    """

    def __init__(self, path: Path, runtime_flags: set[str]):
        self.path, self.runtime_flags = path, runtime_flags
        self.run: RunRecord | None = None  # set by `begin`
        self.seconds_saving = 0.0  # of the last epoch's save; 0 if it was not saved
        self._lock = None
        self._num_saved = 0  # epochs in LAST
        self._write_seconds, self._saved_at = 0.0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        is_interrupted = isinstance(error, Interrupted)
        line = "interrupted: nothing saved yet; rerunning starts from scratch"
        if self._num_saved:
            saved = f"{self._num_saved} epoch(s) are saved in {self.path / LAST}"
            line = f"interrupted: {saved}; rerun the same command, without --overwrite, to resume"
        if self.run is not None and error is not None:
            with contextlib.suppress(OSError, UserError):  # the error itself matters more than these files
                self.export("interrupted" if is_interrupted else "failed")
                if is_interrupted:
                    with open(self.path / LOG, "a", encoding="utf-8") as log:
                        log.write(f"{line}\n")
        if is_interrupted:
            tell(f"\n{line}", sys.stderr)
        if self._lock is not None:
            self._lock.close()

    def open(self, resume: str | None, overwrite: bool) -> Checkpoint | None:
        """The checkpoint to continue from, or None to start from nothing. Called in rank 0.

        1. --overwrite: from nothing.
        2. A checkpoint here: the newest intact one, whatever --resume says.
        3. No checkpoint here, --resume: that checkpoint.
        4. Neither: from nothing.
        In 3 and 4 a directory that holds what this run would overwrite is refused. A new directory is made by `begin`,
        so that a run that cannot start leaves none behind.

        Raises:
            UserError: the directory is in use or cannot be written, or a checkpoint is damaged or foreign.
        """
        if self.path.exists():
            self._acquire_lock()
        if overwrite:
            return None
        if (self.path / LAST).exists() or (self.path / PREVIOUS).exists():
            checkpoint, note = find_checkpoint(self.path)
            self._num_saved = len(checkpoint.run.history)
            own = (self.path.resolve(), (self.path / LAST).resolve())
            if resume is not None and Path(resume).resolve() not in own:
                note = f"{note}\n{self.path} goes on from its own checkpoint, not from {resume}".strip()
        else:
            for pattern in ("checkpoint_*.pth", *EXPORTS):  # nothing of these is written before a checkpoint
                for file in self.path.glob(pattern):
                    raise UserError(
                        f"{file} is there, but no {LAST} to go on from: give another --run_name, or --overwrite to"
                        " remove what is there"
                    )
            if resume is None:
                return None
            checkpoint, note = find_checkpoint(Path(resume))
        if note:
            tell(note)
        return checkpoint

    def _acquire_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
            self._lock = os.fdopen(descriptor)
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
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock")):
                return
        raise UserError(f"{self.path} was renamed or its .lock removed during this run: nothing more is written")

    def begin(self, run: RunRecord, checkpoint: Checkpoint | None) -> None:
        """Before the first epoch of this command: clear what an earlier one left. A new run removes an earlier one's
        files; a run that comes from elsewhere, or from PREVIOUS, writes its checkpoint here.

        Args:
            run: the record so far, this start included.
            checkpoint: what `open` returned.

        Raises:
            UserError: the directory cannot be made, or another run has begun there.
        """
        if not launch.WORLD.is_main:
            return
        if self._lock is None:
            self._acquire_lock()
            if (self.path / LAST).exists():
                raise UserError(f"{self.path} is now used by another run; rerun this command to continue it")
        self.check_lock()
        unwanted = [file for file in self.path.iterdir() if TEMPORARY.fullmatch(file.name)]
        # Event files are rewritten from the history, so that no step is in them twice.
        unwanted += self.path.glob("tensorboard/**/events.out.tfevents.*")
        if checkpoint is None:
            unwanted += [self.path / name for name in (*EXPORTS, LOG)]
            unwanted += self.path.glob("checkpoint_*.pth")
        elif len(run.history) < run.args["end_epoch"]:
            unwanted.append(self.path / "predictions.npz")  # of an earlier end
        for file in unwanted:
            file.unlink(missing_ok=True)

        self.run = run
        if checkpoint is not None:
            if checkpoint.file != self.path / LAST:
                self._write_last(checkpoint.states)
            self._link_names()
            self._find_best(checkpoint.file)
            self.export("running")

    def _names(self) -> list[str]:
        """The names that the last epoch's checkpoint has beside LAST: BEST, and that of --saveckp_freq."""
        history, frequency = self.run.history, self.run.args["saveckp_freq"]
        names = [BEST] if best_epoch(history) is history[-1] else []
        if frequency and len(history) % frequency == 0:
            names.append(f"checkpoint_epoch{history[-1].epoch}.pth")
        return names

    def _link_names(self) -> None:
        for name in self._names():
            link_atomic(self.path / LAST, self.path / name)

    def _find_best(self, source: Path) -> None:
        """See that BEST is of this run's best epoch: copy it from where the run comes from, or remove another's."""
        best = self.run.history[: best_epoch(self.run.history).epoch + 1]
        for file in (self.path / BEST, source.with_name(BEST)):
            with contextlib.suppress(UserError):  # missing or damaged
                if load_checkpoint(file).run.history == best:
                    if file.parent != self.path:
                        write_atomic(self.path / BEST, file.read_bytes())
                    return
        (self.path / BEST).unlink(missing_ok=True)

    def save(self, record: EpochRecord, make_states: Callable[[], dict]) -> None:
        """Add an epoch's record, and save the epoch if it is the best or the last, or if the last save was long ago.

        LAST becomes PREVIOUS; BEST and the checkpoints of --saveckp_freq are links to the same file as LAST.

        Args:
            make_states: returns the checkpoint's states (`utils.checkpoint.STATES`).
        """
        self.run.history.append(record)
        self.seconds_saving = 0.0
        self.check_lock()
        start = time.perf_counter()
        is_due = self._write_seconds < SHORT_WRITE or start - self._saved_at > SAVE_INTERVAL * self._write_seconds
        if not (is_due or self._names() or len(self.run.history) == self.run.args["end_epoch"]):
            return
        if (self.path / LAST).exists():
            link_atomic(self.path / LAST, self.path / PREVIOUS)
        self._write_last(make_states())
        self._link_names()
        self.export("running")
        self._saved_at = time.perf_counter()
        self.seconds_saving = self._write_seconds = self._saved_at - start

    def _write_last(self, states: dict) -> None:
        write_checkpoint(self.path / LAST, states, self.run)
        self._num_saved = len(self.run.history)

    def finish(self, test: dict[str, TestRecord] | None) -> None:
        """Add the test records to BEST and then to LAST, and mark the run as finished: nothing more is done for it."""
        self.check_lock()
        self.run.test, self.run.finished = test, True
        if (self.path / BEST).exists():
            best = load_checkpoint(self.path / BEST)
            best.run.test, best.run.finished = test, False  # also where it is LAST of a finished run
            write_checkpoint(best.file, best.states, best.run)
        self._write_last(load_checkpoint(self.path / LAST).states)
        self.export("finished")

    def export(self, status: str) -> None:
        """Write config.json, metrics.jsonl and results.json where they are missing or differ, once an epoch is saved.

        results.json comes last when the run is finished, else first: so that a status of "finished" never stands
        beside other files than the finished run's.
        """
        if not launch.WORLD.is_main:
            return
        self.check_lock()
        if not self._num_saved:
            return
        saved = dataclasses.replace(self.run, history=self.run.history[: self._num_saved])
        contents = exports(saved, status, self.runtime_flags)
        names = reversed(contents) if status == "finished" else contents
        for name in names:
            file, content = self.path / name, contents[name].encode()
            if not (file.is_file() and file.read_bytes() == content):
                write_atomic(file, content)
