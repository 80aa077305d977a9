"""`--val_only`: one run by the flags in its checkpoint."""

import shlex
import shutil
from pathlib import Path

import pytest
from helpers import enter_copy, files, forge, read, read_checkpoint, run, save_photos, train_on_photos, val_only

import main
from utils.checkpoint import BEST, LAST

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
    assert after.pop(folder / "experiments" / "run_val" / "val.json")
    assert after == before


def test_val_json_holds_checkpoint_images_and_metrics_of_the_last_epoch(folder):
    assert val_only(RUN, Path("out")) == 0
    images = read(RUN, "config.json")["data"]["splits"]["val"]
    found = {"checkpoint": "run/checkpoint_last.pth", "images": images, "images_of_the_run": images}
    last = read(RUN)["last"]
    assert read(Path("out"), "val.json") == {**found, "epoch": last["epoch"], "val": last["val"]}


def test_validation_images_by_themselves_are_not_called_test_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_photos(Path("photos"))
    shutil.copytree("photos/train", "photos/val")
    assert run(RUN, flags="--data_type folder --data_path photos --width 8 --end_epoch 1") == 0
    for split in ("train", "test"):
        shutil.rmtree(f"photos/{split}")
    assert val_only(RUN, Path("out")) == 0
    assert "16 validation images" in capsys.readouterr().out
    written = read(Path("out"), "val.json")
    assert written["val"] == read(RUN)["last"]["val"]
    assert written["images"] == written["images_of_the_run"]


NAMES = {"run": "run_val", "run/": "run_val", f"run/{LAST}": "run_val", f"run/{BEST}": "run_checkpoint_best_val"}


@pytest.mark.parametrize("resume", NAMES)
def test_evaluation_is_named_after_what_is_evaluated(resume, folder):
    argv = ["--val_only", "--resume", resume, "--device", "cpu"]
    assert main.parse_args(argv).run_name == NAMES[resume]
    assert main.parse_args([*argv, "--run_name", "mine"]).run_name == "mine"


def test_missing_images_are_named_as_the_run_s_and_no_folder_is_made(folder, refused):
    Path("photos").rename("moved")
    error = refused(val_only, RUN, Path("out"))
    assert "photos is not a directory" in error
    assert "the run itself was given --data_path photos" in error
    assert not Path("photos").exists()


def test_data_path_and_precision_may_be_given(folder):
    Path("photos").rename("moved")
    assert val_only(RUN, Path("out"), "--data_path", "moved", "--precision", "bf16") == 0


@pytest.mark.parametrize("words", ["--PSKD", "--width 8", "--overwrite", "--compile"])
def test_other_flags_are_the_run_s_own(words, folder, capsys):
    with pytest.raises(SystemExit):
        val_only(RUN, Path("out"), *words.split())
    name = words.split()[0]
    assert f"argument {name}: with --val_only it is the run's own; leave it out" in capsys.readouterr().err


def test_flag_that_the_run_does_not_know_has_its_default(folder):
    args = read_checkpoint(RUN)["args"]
    del args["label_smoothing"], args["cuda_graph"]
    forge(RUN / LAST, args=args)
    assert val_only(RUN, Path("out")) == 0


def test_run_of_a_gpu_is_evaluated_on_a_cpu(folder, refused):
    args = read_checkpoint(RUN)["args"] | {"device": "cuda", "cuda_graph": True, "sync_bn": True}
    forge(RUN / LAST, args=args | {"precision": "tf32"})
    error = refused(main.main, ["--val_only", "--resume", "run", "--device", "cpu"])
    assert "give another value: argument --precision: tf32 needs a GPU" in error
    assert val_only(RUN, Path("out"), "--precision", "fp32") == 0


BAD_FLAGS = [{"width": -5}, {"image_size": 7}, {"seed": "four"}, {"data_path": "new"}, {"val_split": "x"}]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flag_of_a_checkpoint_is_one_line_and_nothing_is_made(flags, folder, refused):
    forge(RUN / LAST, args=read_checkpoint(RUN)["args"] | flags)
    before = files(folder)
    refused(val_only, RUN, Path("out"))
    assert files(folder) == before
    assert not Path("new").exists()


def test_limit_val_takes_some_of_the_run_s_own_validation_images(finished, tmp_path):
    assert val_only(finished, tmp_path / "val", "--limit_val", "3") == 0
    written = read(tmp_path / "val", "val.json")
    assert written["images"]["images"] == 3
    assert "val" in written
