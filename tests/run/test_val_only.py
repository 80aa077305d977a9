"""`--val_only`: one run by the flags in its checkpoint, and a directory of runs past the bad ones."""

import contextlib
import io
import math
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import enter_copy, files, read, read_checkpoint, train_on_photos, val_only

import main
from utils.checkpoint import LAST
from utils.engine import predict

RUN = Path("run")
FLAGS = (  # none is the default
    "--BYOT --width 8 --num_resnet_blocks 2 --image_size 24 --val_split 0.3 --classes 2 --batch_size 16 --lr 0.05"
    " --end_epoch 2"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = train_on_photos(tmp_path_factory.mktemp("trained"), FLAGS)
    for cache in (folder / "photos").glob("decoded-*"):
        cache.unlink()
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    return enter_copy(trained, tmp_path, monkeypatch)


def test_the_line_in_the_log_evaluates_the_run_and_writes_val_json_only(folder):
    log = (folder / "run" / "experiment.log").read_text()
    line = log.split("evaluate again: python main.py ")[1].splitlines()[0]
    before = files(folder)
    assert main.main([*shlex.split(line), "--device", "cpu"]) == 0
    after = files(folder)
    assert after.pop(folder / "experiments" / "val_only" / "val.json")
    assert after == before


def test_val_json_holds_the_metrics_of_the_last_epoch(folder):
    assert val_only(RUN, Path("out")) == 0
    last = read(RUN)["last"]
    expected = {name: last[name] for name in ("epoch", "val", "exits", "ensemble")}
    assert expected.items() <= read(Path("out"), "val.json").items()


def test_val_json_names_the_checkpoint_and_its_images(folder):
    assert val_only(RUN, Path("out")) == 0
    found = read(Path("out"), "val.json")
    assert found["checkpoint"] == "run/checkpoint_last.pth"
    recorded = read(RUN, "config.json")["data"]["splits"]["val"]
    assert found["images"] == recorded
    assert found["images_of_the_run"] == recorded


def test_missing_images_are_named_and_no_folder_is_made(folder, refused):
    Path("photos").rename("moved")
    assert "photos is not a directory" in refused(val_only, RUN, Path("out"))
    assert not Path("photos").exists()


def test_data_path_precision_and_flags_that_agree_may_be_given(folder):
    Path("photos").rename("moved")
    words = ("--data_path", "moved", "--precision", "bf16", "--label_smoothing", "0")
    assert val_only(RUN, Path("out"), *words) == 0


def test_flags_that_contradict_the_checkpoint_are_refused_by_name(folder, refused):
    error = refused(val_only, RUN, Path("out"), "--PSKD", "--width", "4")
    assert "--PSKD False -> True, --width 8 -> 4" in error


BAD_RUNS = {  # name, and words of the error
    "a": "a: a mistake",  # of the program itself
    "b": "b/checkpoint_last.pth: its model state",
    "c": "--width: -5",
    "d": "--image_size",
    "e": "manual_seed",
    "f": "new is not a directory",
    "g": "g/checkpoint_last.pth is not a valid checkpoint",
}
BAD_FLAGS = {"c": {"width": -5}, "d": {"image_size": 7}, "e": {"seed": "four"}, "f": {"data_path": "new"}}


def save_bad_runs(folder: Path, good: dict) -> None:
    """Directories `a` to `g`, with what became of a checkpoint that was good."""
    checkpoints = {"a": good, "g": "foreign"}
    not_finite = {name: tensor * math.nan for name, tensor in good["model"].items()}
    checkpoints["b"] = {**good, "model": not_finite}
    for name, changes in BAD_FLAGS.items():
        checkpoints[name] = {**good, "args": good["args"] | changes}
    for name, checkpoint in checkpoints.items():
        (folder / name).mkdir(parents=True)
        torch.save(checkpoint, folder / name / LAST)


@pytest.fixture(scope="module")
def of_many(trained, tmp_path_factory) -> SimpleNamespace:
    """The bad runs and a good one, `h`, evaluated: the working directory, exit status, and standard error."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("many") / "folder")
    save_bad_runs(folder / "runs", read_checkpoint(folder / "run"))
    (folder / "run").rename(folder / "runs" / "h")
    outcomes = [RuntimeError("a mistake"), mock.DEFAULT]  # of runs a and h
    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.chdir(folder)
        patch.setattr(main, "predict", mock.Mock(wraps=predict, side_effect=outcomes))
        status = val_only(Path("runs"), Path("all"))
    return SimpleNamespace(folder=folder, status=status, error=error.getvalue())


def test_bad_runs_of_a_directory_are_counted_in_one_line(of_many):
    assert of_many.status == 1
    assert of_many.error.startswith("error: 7 of 8 runs in runs could not be evaluated: ")
    assert of_many.error.count("\n") == 1


@pytest.mark.parametrize("name", BAD_RUNS)
def test_each_bad_run_of_a_directory_is_named_with_its_reason(of_many, name):
    assert BAD_RUNS[name] in of_many.error


def test_good_run_of_a_directory_is_evaluated_past_the_bad_ones(of_many):
    assert read(of_many.folder / "all", "val.json").keys() == {"runs/h"}


def test_missing_data_path_of_a_run_is_not_made(of_many):
    assert not (of_many.folder / "new").exists()
