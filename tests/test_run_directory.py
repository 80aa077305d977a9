"""A run's directory: resuming to the bit, what is refused, when a checkpoint is saved, who may write."""

import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_main import ALL, SMALL, before_step, files, one_line, read, read_records, run

import main
from utils import run_directory
from utils.checkpoint import BEST, LAST, PREVIOUS
from utils.flags import RUNTIME_FLAGS
from utils.run_directory import NEW, RunDirectory

FLAGS = (*ALL, "--end_epoch", "3", "--val_split", "0.25", "--save_predictions")
STEPS = 2  # per epoch


def leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """What nested dicts and lists hold, by path, without times and runtime flags; tensors and arrays as bytes."""
    if isinstance(value, dict):
        for key, item in value.items():
            if "second" not in str(key) and key not in {"hours", "starts"} | RUNTIME_FLAGS:
                yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate([len(value), *value]):
            yield from leaves(item, f"{path}/{i}")
    else:
        is_array = isinstance(value, torch.Tensor | np.ndarray)
        yield path, (value.dtype, value.shape, np.asarray(value).tobytes()) if is_array else value


def content(directory: Path) -> dict[str, object]:
    """Everything in a run directory that must not depend on what happened to the run."""
    found = {"files": sorted(file.name for file in directory.iterdir()), "metrics.jsonl": read_records(directory)}
    found |= {file.name: torch.load(file, weights_only=True) for file in directory.glob("*.pth")}
    found |= {file.name: dict(np.load(file)) for file in directory.glob("*.npz")}
    found |= {name: read(directory, name) for name in ("config.json", "results.json")}
    return dict(leaves(found))


def train(directory: Path, *words: str) -> int:
    return run(directory, *FLAGS, *words)


def interrupt(monkeypatch, epoch: int, number: int = signal.SIGTERM) -> None:
    before_step(monkeypatch, STEPS * epoch + 1, lambda step: os.kill(os.getpid(), number))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("experiments") / "finished"
    assert train(directory) == 0
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(("epoch", "number"), enumerate([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
def test_interrupted_in_any_epoch_equals_uninterrupted_to_the_bit(
    epoch, number, finished, tmp_path, monkeypatch, capsys
):
    interrupt(monkeypatch, epoch, number)
    assert train(tmp_path / "run") == 128 + number
    kept = f"{epoch} epoch(s) are saved" if epoch else "no epoch was saved; the same command starts anew"
    assert kept in capsys.readouterr().err
    assert read(tmp_path / "run")["status"] == "interrupted" and len(read_records(tmp_path / "run")) == epoch
    assert train(tmp_path / "run") == 0
    assert content(tmp_path / "run") == content(finished)
    assert [start["epoch"] for start in read(tmp_path / "run", "config.json")["starts"]] == [0, epoch]


def test_resumed_in_another_directory_and_interrupted_there_equals_uninterrupted(
    finished, tmp_path, monkeypatch, capsys
):
    interrupt(monkeypatch, 1)
    assert train(tmp_path / "short") == 143
    interrupt(monkeypatch, 1)
    words = ("--resume", str(tmp_path / "short"))
    assert train(tmp_path / "new", *words) == 143 and len(read_records(tmp_path / "new")) == 2
    assert train(tmp_path / "new", *words) == 0
    assert content(tmp_path / "new") == content(finished)
    capsys.readouterr()
    before = files(tmp_path / "new")
    for words, named in (
        (("--resume", str(finished)), f"holds another run than one from {finished}"),
        (("--resume", str(tmp_path / "new" / BEST)), "lies in the run's own directory"),
        (("--resume", str(tmp_path)), f"{tmp_path} holds no checkpoint_last.pth"),
    ):
        directory = tmp_path / ("new" if "run" in named else "none")
        assert train(directory, *words) == 1 and named in one_line(capsys)
    assert files(tmp_path / "new") == before and not (tmp_path / "none").exists()


def test_more_epochs_on_request_bring_the_best_checkpoint_along(finished, tmp_path):
    words = ("--resume", str(finished / LAST), "--end_epoch", "4", "--allow_end_epoch_change")
    assert train(tmp_path / "run", *words) == 0
    records, before = read_records(tmp_path / "run"), read_records(finished)
    assert records[:3] == before and records[3]["alpha_t"] == pytest.approx(0.8)
    best = torch.load(tmp_path / "run" / BEST, weights_only=True)["epoch"]
    assert best == read(tmp_path / "run")["best"]["epoch"] == read(tmp_path / "run")["test"]["best"]["epoch"]


def test_a_finished_run_says_so_and_a_lost_file_is_written_again(copied, finished, capsys):
    before = files(copied)
    assert train(copied) == 0
    assert "is finished" in capsys.readouterr().out and files(copied) == before
    for name in ("config.json", "metrics.jsonl", "results.json", "predictions.npz", LAST):
        (copied / name).unlink()
        assert train(copied) == 0
        if name != LAST:  # after which the previous one is the last
            assert content(copied) == content(finished), name
    assert torch.load(copied / LAST, weights_only=True)["epoch"] == 2


OTHERS = [
    ("--width 8", "--width 4 -> 8"),
    (
        "--classifier_type resnet34 --DML_on_output",
        "--DML_on_output False -> True, --classifier_type resnet18 -> resnet34",
    ),
    ("--limit_train 20 --val_split 0.5", "--limit_train None -> 20, --val_split 0.25 -> 0.5"),
    ("--lr 0.1 --precision bf16", "--lr 0.05 -> 0.1, --precision fp32 -> bf16"),
    ("--end_epoch 4", "--end_epoch 3 -> 4, on which PS-KD's alpha_t depends: give --allow_end_epoch_change"),
    ("--end_epoch 2 --allow_end_epoch_change", "has 3 epochs already, more than --end_epoch 2"),
]


@pytest.mark.parametrize(("words", "named"), OTHERS)
def test_another_experiment_is_refused_by_name(words, named, copied, tmp_path, capsys):
    before = files(copied)
    assert train(copied, *words.split()) == 1 and named in one_line(capsys)
    assert train(tmp_path / "new", *words.split(), "--resume", str(copied)) == 1 and named in one_line(capsys)
    assert files(copied) == before and not (tmp_path / "new").exists()


def test_a_run_of_an_older_version_finishes(finished, tmp_path):
    """Its flags and records lack what has been added since; a flag that it lacks counts as off."""
    old = torch.load(finished / PREVIOUS, weights_only=True)
    for name in ("label_smoothing", "cuda_graph", "DML_as_published"):
        del old["args"][name]
    for record in old["history"]:
        del record["val"]["eaurc"], record["seconds_validation"], record["seconds_saving"]
    torch.save(old, tmp_path / "old.pth")
    words = ("--resume", str(tmp_path / "old.pth"))
    assert train(tmp_path / "run", *words, "--label_smoothing", "0") == 0
    weights = [torch.load(d / LAST, weights_only=True)["model"] for d in (tmp_path / "run", finished)]
    assert dict(leaves(weights[0])) == dict(leaves(weights[1]))


def test_overwrite_starts_anew_and_removes_own_files_only(copied, capsys):
    for name in ("notes.tmp", "tensorboard/notes.txt"):
        (copied / name).write_text("mine")
    for file in copied.glob("*.pth"):
        file.unlink()
    before = files(copied)
    assert train(copied) == 1  # whose checkpoints were deleted to save room
    assert "--overwrite" in one_line(capsys) and files(copied) == before
    assert run(copied, "--end_epoch", "1", "--overwrite") == 0
    assert read(copied, "config.json")["overwrite"] is True and not (copied / "predictions.npz").exists()
    assert (copied / "notes.tmp").exists() and (copied / "tensorboard" / "notes.txt").exists()
    assert len(read_records(copied)) == len(read(copied, "config.json")["starts"]) == 1


def test_a_start_that_fails_leaves_no_directory(tmp_path, capsys):
    words = ("--data_type", "folder", "--data_path", str(tmp_path))
    assert train(tmp_path / "a" / "b", *words) == 1
    assert "train" in one_line(capsys) and not list(tmp_path.iterdir())


# Top-1 error, seconds of the epoch, seconds that a write would take, and whether the epoch is saved.
EPOCHS = [
    (50, 1.0, 0.1, True),
    (60, 1.9, 0.1, False),  # 20 times 0.1 s are not over
    (60, 0.2, 0.1, True),
    (40, 0.0, 0.1, True),  # the best
    (60, 2.1, 0.04, True),
    (60, 0.0, 0.1, True),  # a write took less than 50 ms
    (60, 0.0, 0.1, False),
    (60, 0.0, 0.1, True),  # the last
]


def test_epochs_are_saved_by_what_saving_costs_and_records_never_run_ahead(finished, tmp_path, monkeypatch):
    now, template, directory = [0.0], read_records(finished)[0], tmp_path / "run"
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    write = run_directory.write_atomic
    history, num_saved = [], 0

    def slow(path, data):
        now[0] += EPOCHS[len(history) - 1][2] if path.name == NEW else 0
        write(path, data)

    monkeypatch.setattr(run_directory, "write_atomic", slow)
    where = ["--experiments_dir", str(tmp_path), "--run_name", "run", "--end_epoch", str(len(EPOCHS))]
    with RunDirectory(directory, vars(main.parse_args([*SMALL.split(), *where]))) as owner:
        assert owner.open() is None
        owner.begin({"data": {}}, [])
        for epoch, (error, seconds, writing, is_saved) in enumerate(EPOCHS):
            now[0] += seconds
            history.append({**template, "epoch": epoch, "val": {"top1_error": error}})
            owner.save(lambda: {"model": {}}, history)
            num_saved = epoch + 1 if is_saved else num_saved
            assert owner.seconds_saving == pytest.approx(writing if is_saved else 0)
            saved = torch.load(directory / LAST, weights_only=True)
            assert saved["history"] == read_records(directory) == history[:num_saved]
            assert read(directory)["epochs"] == num_saved


def take_over(directory: Path, how: str) -> dict:
    """Another run comes to the name of one that is alive; what it wrote."""
    directory.rename(directory.with_name("away")) if how == "renamed" else (directory / ".lock").unlink()
    assert run(directory, "--overwrite") == 0
    return files(directory)


@pytest.mark.parametrize("how", ["renamed", ".lock deleted"])
@pytest.mark.parametrize("moment", ["last epoch", "after it"])
def test_a_run_that_lost_its_directory_writes_nothing_into_it(how, moment, tmp_path, monkeypatch, capsys):
    written = []
    if moment == "last epoch":
        before_step(monkeypatch, 2 * STEPS, lambda step: written.append(take_over(tmp_path / "run", how)))
    else:
        finish = main.Logger.finish

        def finish_late(*args):
            monkeypatch.setattr(main.Logger, "finish", finish)
            written.append(take_over(tmp_path / "run", how))

        monkeypatch.setattr(main.Logger, "finish", finish_late)
    assert train(tmp_path / "run") == 1
    assert "was renamed or its .lock removed" in one_line(capsys)
    log = tmp_path / "run" / "experiment.log"
    assert {p: c for p, c in files(tmp_path / "run").items() if p != log} == {
        p: c for p, c in written[0].items() if p != log
    }


def test_two_runs_on_one_directory(finished, tmp_path, monkeypatch, capsys):
    refused = []
    before_step(monkeypatch, STEPS, lambda step: refused.append(train(tmp_path / "run", "--overwrite")))
    assert train(tmp_path / "run") == 0 and refused == [1]
    assert "is in use by another run" in one_line(capsys)
    assert content(tmp_path / "run") == content(finished)


def test_a_full_disk_costs_nothing_that_was_there(finished, tmp_path, monkeypatch, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal: writing fails as on a full disk
    try:
        size = (finished / PREVIOUS).stat().st_size
        before_step(monkeypatch, STEPS, lambda step: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard)))
        assert train(tmp_path / "run") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{NEW} cannot be written (File too large)" in one_line(capsys)
    assert read(tmp_path / "run")["status"] == "failed" and len(read_records(tmp_path / "run")) == 1
    assert train(tmp_path / "run") == 0
    assert content(tmp_path / "run") == content(finished)


def test_a_file_system_without_links_or_locks(finished, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    assert train(tmp_path / "run") == 0
    assert content(tmp_path / "run") == content(finished)
