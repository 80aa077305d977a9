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
from helpers import SMALL, before_step, bits, content, files, one_line, read, read_records, run, train

import main
from utils import run_directory
from utils.checkpoint import BEST, LAST, PREVIOUS

STEPS = 2  # per epoch
DISK = resource.getrlimit(resource.RLIMIT_FSIZE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("experiments") / "finished"
    assert train(directory) == 0
    return directory


def interrupt(monkeypatch, epoch: int, number: int | None = signal.SIGTERM) -> None:
    """Send a signal in the middle of an epoch, counted from those that are trained; without one, fill the disk."""

    def stop(step):
        if number:
            os.kill(os.getpid(), number)
        else:  # no file may become larger than 20,000 bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, DISK[1]))

    before_step(monkeypatch, STEPS * epoch + 1, stop)


@pytest.mark.parametrize(("epoch", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGHUP), (1, None)])
def test_stopped_in_any_epoch_equals_uninterrupted(epoch, number, finished, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, epoch, number)
    assert train(tmp_path / "run") == (128 + number if number else 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, DISK)
    kept = f"interrupted: {epoch} epoch(s) are saved" if epoch else "no epoch was saved; the same command starts over"
    assert (kept if number else "checkpoint_best.pth cannot be written (File too large)") in capsys.readouterr().err
    assert read(tmp_path / "run")["status"] == ("interrupted" if number else "failed")
    assert len(read_records(tmp_path / "run")) == epoch and train(tmp_path / "run") == 0
    assert content(tmp_path / "run") == content(finished)
    assert len(read(tmp_path / "run", "config.json")["starts"]) == (2 if epoch else 1)


def test_out_of_memory_and_numbers_that_are_not_finite_are_one_line(tmp_path, monkeypatch, capsys):
    error = RuntimeError("CUDA error: operation failed during capture")
    error.__context__ = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    before_step(monkeypatch, STEPS, mock.Mock(side_effect=error))
    assert train(tmp_path / "run") == 1 and "out of memory in training with --batch_size 16" in one_line(capsys)
    before_step(monkeypatch, 0, lambda step: step.model.exits[1].fc.weight.data.fill_(float("inf")))
    assert train(tmp_path / "run") == 1 and len(read_records(tmp_path / "run")) == 1
    assert "epoch 2: ce, byot_ce, byot_kl" in one_line(capsys)


def test_resumed_elsewhere_from_an_older_version_and_interrupted_there(finished, tmp_path, monkeypatch, capsys):
    """Its flags and records lack what has been added since; a flag that it lacks counts as off."""
    old, new = torch.load(finished / PREVIOUS, weights_only=True), tmp_path / "new"
    del old["args"]["label_smoothing"], old["args"]["cuda_graph"]
    for record in old["history"]:
        record["val"]["top1_error"] = 0.0  # so that the first epoch is and stays the best
        del record["val"]["eaurc"], record["seconds_validation"], record["seconds_saving"]
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / LAST)
    torch.save({**old, "epoch": 0, "history": old["history"][:1]}, tmp_path / "old" / BEST)
    interrupt(monkeypatch, 0)
    words = ("--resume", str(tmp_path / "old"))
    assert train(new, *words) == 143 and read_records(new) == old["history"]
    assert train(new, *words) == 0 and read_records(new)[:2] == old["history"]
    assert [read(new)["test"][name]["epoch"] for name in ("last", "best")] == [2, 0]
    ours, theirs = (torch.load(directory / LAST, weights_only=True) for directory in (new, finished))
    assert all(bits(ours[name]) == bits(theirs[name]) for name in ("model", "optimizer", "objective"))
    assert train(new, "--resume", str(finished)) == 1 and train(new, "--resume", str(new / BEST)) == 1
    error = capsys.readouterr().err
    assert f"holds a run that was not started from {finished}" in error and f"continues from its {LAST}" in error


def test_a_finished_run_says_so_and_a_lost_file_is_written_again(finished, tmp_path, capsys):
    directory = shutil.copytree(finished, tmp_path / "run")
    before = files(directory)
    assert train(directory) == 0 and "is finished" in capsys.readouterr().out and files(directory) == before
    for name in ("config.json", "metrics.jsonl", "results.json", "predictions.npz"):
        (directory / name).unlink()
        assert train(directory) == 0 and content(directory) == content(finished)
    for file in directory.glob("*.pth"):  # as a user may, to save room
        file.unlink()
    before = files(directory)
    assert train(directory) == 1 and "--overwrite" in one_line(capsys) and files(directory) == before


OTHERS = [
    ("--width 8 --lr 0.1", "--lr 0.05 -> 0.1, --width 4 -> 8"),
    ("--DML_on_output --limit_train 20", "--DML_on_output False -> True, --limit_train None -> 20"),
    ("--end_epoch 4", "--end_epoch 3 -> 4"),
    ("--end_epoch 2 --allow_end_epoch_change", "has 3 epochs already, more than --end_epoch 2"),
]


@pytest.mark.parametrize(("words", "named"), OTHERS)
def test_another_experiment_is_refused_by_name(words, named, finished, tmp_path, capsys):
    before = files(finished)
    assert train(finished, *words.split()) == 1 and named in one_line(capsys)
    assert train(tmp_path / "new", *words.split(), "--resume", str(finished)) == 1 and named in one_line(capsys)
    assert files(finished) == before and not (tmp_path / "new").exists()


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


def test_epochs_are_saved_by_what_saving_costs_and_records_never_run_ahead(finished, tmp_path, monkeypatch):
    now, history, write = [0.0], [], run_directory.write_atomic

    def slow(path, data):
        now[0] += EPOCHS[len(history) - 1][2] if path.suffix == ".pth" else 0
        write(path, data)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run_directory, "write_atomic", slow)
    flags = vars(main.parse_args([*SMALL.split(), "--end_epoch", str(len(EPOCHS))]))
    with run_directory.RunDirectory(tmp_path / "run", flags) as directory:
        directory.open()
        directory.begin({"data": {}}, [])
        for epoch, (error, seconds, writing, is_saved) in enumerate(EPOCHS):
            now[0] += seconds
            history.append({**read_records(finished)[0], "epoch": epoch, "val": {"top1_error": error}})
            directory.save(lambda: {"model": {}}, history)
            saved = torch.load(directory.path / LAST, weights_only=True)["history"]
            assert saved == read_records(directory.path) == history[: epoch + is_saved]
            assert directory.seconds_saving == pytest.approx(writing if is_saved else 0)


@pytest.mark.parametrize("how", ["renamed", ".lock deleted"])
@pytest.mark.parametrize("number", [2, 3])  # validation of the last epoch, and after its checkpoint
def test_a_run_that_lost_its_directory_writes_nothing_into_it(how, number, tmp_path, monkeypatch, capsys):
    directory, calls, written, predict = tmp_path / "run", itertools.count(), [], main.predict

    def predict_later(*args):
        """Meanwhile another run comes to the name of this one, but not while it holds the lock."""
        if next(calls) == number:
            assert run(directory, "--overwrite") == 1 and "is in use by another run" in one_line(capsys)
            directory.rename(tmp_path / "away") if how == "renamed" else (directory / ".lock").unlink()
            assert run(directory, "--overwrite") == 0
            (directory / "experiment.log").unlink()
            written.append(files(directory))
        return predict(*args)

    monkeypatch.setattr(main, "predict", predict_later)
    message = "was renamed or its .lock removed" if number == 2 else "does not match"  # the other run's checkpoint
    assert train(directory) == 1 and message in one_line(capsys)
    assert [files(directory)] == written
    assert read(directory, "config.json")["overwrite"] is True and not (directory / "predictions.npz").exists()
