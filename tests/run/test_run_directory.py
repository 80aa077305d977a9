"""A run's directory: what stops a run, resuming to the bit, what is refused, when it is saved, who may write."""

import itertools
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import before_step, bits, content, files, read, read_checkpoint, read_records, run, train

import main
from models import load_run
from utils import checkpoint, run_directory
from utils.checkpoint import BEST, LAST, PREVIOUS, load_checkpoint
from utils.errors import UserError
from utils.records import EpochRecord, from_json

STEPS = 2  # per epoch
DISK = resource.getrlimit(resource.RLIMIT_FSIZE)


def interrupt(monkeypatch, epoch: int, number: int = signal.SIGTERM) -> None:
    """Send a signal in the middle of an epoch, counted from those that are trained."""
    before_step(monkeypatch, STEPS * epoch + 1, lambda step: os.kill(os.getpid(), number))


STOPS = [  # the epoch in which a signal arrives, the signal, and what is printed
    (0, signal.SIGTERM, "interrupted: nothing saved yet; rerunning starts from scratch"),
    (1, signal.SIGINT, "interrupted: 1 epoch(s) are saved"),
    (2, signal.SIGUSR1, "interrupted: 2 epoch(s) are saved"),
]


@pytest.mark.parametrize(("epoch", "number", "printed"), STOPS)
def test_stopped_in_any_epoch_equals_uninterrupted(epoch, number, printed, finished, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    interrupt(monkeypatch, epoch, number)
    assert train(directory) == 128 + number
    assert printed in capsys.readouterr().err
    if epoch:
        assert read(directory)["status"] == "interrupted"
        assert len(read_records(directory)) == epoch
    assert train(directory) == 0
    log = (directory / "experiment.log").read_text()
    assert (printed in log) == (f"checkpoint_last.pth: {epoch} of 3 epochs are done" in log) == (epoch > 0)
    assert content(directory) == content(finished)
    starts = read(directory, "config.json")["starts"]
    assert [start["epoch"] for start in starts] == sorted({0, epoch})


def test_full_disk_stops_a_run_that_resumes_to_the_bit(finished, tmp_path, monkeypatch, refused):
    """No file may become larger than 20,000 bytes, from the middle of the second epoch on."""
    directory = tmp_path / "run"
    before_step(monkeypatch, STEPS + 1, lambda step: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, DISK[1])))
    error = refused(train, directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, DISK)
    assert "checkpoint_last.pth cannot be written (File too large)" in error
    assert read(directory)["status"] == "failed"
    assert len(read_records(directory)) == 1
    assert train(directory) == 0
    assert content(directory) == content(finished)


def test_out_of_memory_is_one_line(tmp_path, monkeypatch, refused):
    error = RuntimeError("CUDA error: operation failed during capture")
    error.__context__ = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    before_step(monkeypatch, 0, mock.Mock(side_effect=error))
    assert "out of memory in training with --batch_size 16" in refused(train, tmp_path / "run")


def test_numbers_that_are_not_finite_name_epoch_and_terms(tmp_path, monkeypatch, refused):
    before_step(monkeypatch, STEPS, lambda step: step.model.exits[1].fc.weight.data.fill_(float("inf")))
    assert "epoch 2: ce, byot_ce, byot_kl" in refused(train, tmp_path / "run")
    assert len(read_records(tmp_path / "run")) == 1


@pytest.fixture(scope="module")
def old(finished, tmp_path_factory) -> Path:
    """The finished run after its second epoch, of an older version: its flags and records lack what has been added
    since. The first epoch is and stays its best."""
    directory = tmp_path_factory.mktemp("old")
    saved = read_checkpoint(finished, PREVIOUS)
    del saved["args"]["label_smoothing"], saved["args"]["weight_decay"], saved["args"]["cuda_graph"]
    for record in saved["history"]:
        record["val"]["final"]["top1_error"] = 0.0
        del record["val"]["final"]["eaurc"], record["seconds_validation"], record["seconds_saving"]
    torch.save(saved, directory / LAST)
    best = {**saved, "epoch": 0, "history": saved["history"][:1]}
    torch.save(best, directory / BEST)
    return directory


@pytest.fixture(scope="module")
def resumed(old, tmp_path_factory) -> Path:
    """It, resumed in another directory, interrupted there in the first epoch, and finished by the same command."""
    new = tmp_path_factory.mktemp("resumed") / "new"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 0)
        assert train(new, "--resume", str(old)) == 143
    assert [record["epoch"] for record in read_records(new)] == [0, 1]
    assert train(new, "--resume", str(old)) == 0
    return new


def test_resumed_in_another_directory_ends_in_the_same_bits(resumed, finished):
    ours = read_checkpoint(resumed)
    theirs = read_checkpoint(finished)
    for name in ("model", "optimizer", "objective"):
        assert bits(ours[name]) == bits(theirs[name])


def test_resumed_in_another_directory_keeps_the_records_it_came_with(resumed, old):
    for ours, theirs in zip(read_records(resumed), read_checkpoint(old)["history"], strict=False):
        assert theirs.items() <= ours.items()


def test_resumed_in_another_directory_tests_the_best_epoch_it_came_with(resumed):
    test = read(resumed)["test"]
    assert test["last"]["epoch"] == 2
    assert test["best"]["epoch"] == 0


def test_resumed_in_another_directory_names_the_checkpoint_that_it_went_on_from(resumed, old):
    origins = [start.get("resumed_from") for start in read(resumed, "config.json")["starts"]]
    assert origins == [None, str(old / LAST), None]


def test_directory_goes_on_from_its_own_checkpoint_whatever_resume_says(resumed, finished, capsys, monkeypatch):
    before = files(resumed)
    monkeypatch.chdir(resumed.parent)
    for path, is_other in ((finished, True), (resumed / BEST, True), (resumed / LAST, False), (Path("new"), False)):
        assert train(resumed, "--resume", str(path)) == 0
        line = f"{resumed} goes on from its own checkpoint, not from {path}\n"
        assert (line in capsys.readouterr().out) == is_other
    assert files(resumed) == before


@pytest.mark.parametrize("is_moved", [False, True])
def test_without_the_best_epoch_s_checkpoint_no_other_takes_its_place(is_moved, old, tmp_path):
    shutil.copyfile(old / LAST, tmp_path / ("checkpoint_epoch1.pth" if is_moved else LAST))
    words = ["--resume", str(tmp_path / "checkpoint_epoch1.pth")] if is_moved else []
    directory = tmp_path / "new" if is_moved else tmp_path
    assert train(directory, *words) == 0
    assert read(directory)["best"]["epoch"] == 0
    assert read(directory)["test"].keys() == {"last"}
    assert not (directory / BEST).exists()


def test_load_run_refuses_a_best_checkpoint_of_another_epoch(old, tmp_path):
    shutil.copyfile(old / LAST, tmp_path / BEST)
    with pytest.raises(UserError, match="is not of the best epoch of the run in"):
        load_run(tmp_path, "best")


def test_directory_without_a_checkpoint_is_named(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    error = refused(train, tmp_path / "run", "--resume", str(tmp_path / "empty"))
    assert error.startswith(f"error: {tmp_path / 'empty'} holds no checkpoint")


def test_lost_predictions_of_a_finished_run_are_written_again(finished, copied):
    (copied / "predictions.npz").unlink()
    assert train(copied) == 0
    assert content(copied) == content(finished)


def test_checkpoints_are_the_same_again_where_the_last_epoch_is_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "best_epoch", lambda history: history[-1])
    assert train(tmp_path / "run") == 0
    before = content(tmp_path / "run")
    assert BEST in before
    (tmp_path / "run" / "predictions.npz").unlink()
    assert train(tmp_path / "run") == 0
    assert content(tmp_path / "run") == before


def test_another_experiment_is_refused_before_anything_is_written(finished, tmp_path, refused):
    before = files(finished)
    for words in ([], ["--resume", str(finished)]):
        directory = tmp_path / "new" if words else finished
        assert "lr 0.05 -> 0.1, width 4 -> 8" in refused(train, directory, "--width", "8", "--lr", "0.1", *words)
    assert files(finished) == before
    assert not (tmp_path / "new").exists()


EPOCHS = [  # top-1 error, seconds of the epoch, seconds that a write would take, whether the epoch is saved
    (50, 1.0, 0.1, True),
    (60, 1.9, 0.1, False),  # 20 times 0.1 s are not over
    (60, 0.2, 0.1, True),
    (40, 0.0, 0.1, True),  # the best
    (60, 2.1, 0.04, True),
    (60, 0.0, 0.1, True),  # the last write took less than 50 ms
    (60, 0.0, 0.1, False),
    (60, 0.0, 0.1, True),  # the last epoch
]


class Clock:
    """A clock that stands still, but for what an epoch and the write of a checkpoint take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.writing = 0.0  # seconds
        write_atomic = checkpoint.write_atomic

        def write(path, data):
            if path.suffix == ".pth":
                self.now += self.writing
            write_atomic(path, data)

        monkeypatch.setattr(checkpoint, "write_atomic", write)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_epochs_are_saved_by_what_saving_costs_and_records_never_run_ahead(finished, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    usual = read_records(finished)[0]
    history = []
    run = load_checkpoint(finished / LAST).run
    run.history, run.args["end_epoch"] = [], len(EPOCHS)
    with run_directory.RunDirectory(tmp_path / "run", set()) as directory:
        directory.begin(run, directory.open(None, False))
        for epoch, (error, seconds, clock.writing, is_saved) in enumerate(EPOCHS):
            clock.now += seconds
            record = {**usual, "epoch": epoch, "val": {"final": {"top1_error": error}}}
            history.append(record)
            directory.save(from_json(EpochRecord, record), dict)
            saved = history if is_saved else history[:-1]
            assert read_checkpoint(directory.path)["history"] == saved
            assert read_records(directory.path) == saved
            assert directory.seconds_saving == pytest.approx(clock.writing if is_saved else 0)


class Successor:
    """Another run, which comes to the name of the first one before its prediction of a number, counted from 0.

    It cannot while the first one holds the lock: the directory is renamed, or the lock deleted.
    """

    def __init__(self, monkeypatch, directory: Path, how: str, number: int, refused):
        predict = main.predict
        numbers = itertools.count()

        def predict_later(*args):
            if next(numbers) == number:
                assert "is in use by another run" in refused(run, directory, "--overwrite")
                if how == "renamed":
                    directory.rename(directory.with_name("away"))
                else:
                    (directory / ".lock").unlink()
                assert run(directory, "--overwrite") == 0
                (directory / "experiment.log").unlink()
                self.written = files(directory)
            return predict(*args)

        monkeypatch.setattr(main, "predict", predict_later)


VALIDATION, AFTER_LAST_CHECKPOINT = 2, 3  # of the last epoch
LOST = [  # what becomes of the directory, when, and what is said
    ("renamed", VALIDATION, "was renamed or its .lock removed"),
    (".lock deleted", VALIDATION, "was renamed or its .lock removed"),
    ("renamed", AFTER_LAST_CHECKPOINT, "does not match"),  # the other run's checkpoint
    (".lock deleted", AFTER_LAST_CHECKPOINT, "does not match"),
]


@pytest.mark.parametrize(("how", "number", "message"), LOST)
def test_run_that_lost_its_directory_writes_nothing_into_it(how, number, message, tmp_path, monkeypatch, refused):
    directory = tmp_path / "run"
    successor = Successor(monkeypatch, directory, how, number, refused)
    assert message in refused(train, directory)
    assert files(directory) == successor.written
    assert read(directory, "config.json")["overwrite"] is True
