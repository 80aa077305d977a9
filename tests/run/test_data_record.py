"""A run knows its images: what is recorded, and what happens when others lie on the disk."""

import random
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import enter_copy, files, read, read_records, run, save_photos, train_on_photos, val_only
from PIL import Image

import main
from data.readers import Split
from utils.checkpoint import LAST
from utils.engine import TrainStep

RUN, OUT, PHOTOS = Path("run"), Path("out"), Path("photos")
FLAGS = "--PSKD --image_size 16 --width 4 --num_resnet_blocks 2 --batch_size 8 --lr 0.05 --end_epoch 2"
HELD_OUT = f"{FLAGS} --val_split 0.25"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return train_on_photos(tmp_path_factory.mktemp("plain"), FLAGS)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return train_on_photos(tmp_path_factory.mktemp("held_out"), HELD_OUT)


@pytest.fixture
def plain_run(plain, tmp_path, monkeypatch) -> None:
    """In the working directory: a finished run and its images; validation is the test split."""
    enter_copy(plain, tmp_path, monkeypatch)


@pytest.fixture
def held_out_run(held_out, tmp_path, monkeypatch) -> None:
    """The same; validation is held-out training images."""
    enter_copy(held_out, tmp_path, monkeypatch)


def train(flags: str = FLAGS, photos: Path = PHOTOS, directory: Path = RUN) -> int:
    return run(directory, flags=f"--data_type folder --data_path {photos} {flags}")


def save_image(file: Path, colour: str = "red") -> None:
    Image.new("RGB", (20, 20), colour).save(file)


def rename_class() -> None:
    for split in ("train", "test"):
        (PHOTOS / split / "a").rename(PHOTOS / split / "z")


def exchange_image(photos: Path = PHOTOS, split: str = "train", number: int = 2) -> None:
    save_image(photos / split / "a" / f"{number}.png")


def add_image() -> None:
    save_image(PHOTOS / "train" / "b" / "new.png")


OTHER_IMAGES = [
    (rename_class, "has other classes than the network was trained on: missing: a; new: z"),
    (exchange_image, "pixels or labels of the 16 train images"),
    (add_image, "17 train images in place of 16"),
]


@pytest.mark.parametrize(("change", "named"), OTHER_IMAGES)
@pytest.mark.parametrize("is_finished", [False, True])
def test_resume_on_other_images_is_refused_by_name(change, named, is_finished, plain_run, refused):
    if not is_finished:
        (RUN / LAST).unlink()  # what is left is the first epoch of two
    before = files(RUN)
    change()
    assert named in refused(train)
    assert files(RUN) == before


def test_resume_with_added_images_does_not_move_held_out_ones_into_training(held_out_run, refused):
    (RUN / LAST).unlink()
    add_image()
    assert "13 train images in place of 12" in refused(train, HELD_OUT)


def test_val_only_uses_the_recorded_mean_and_std(plain_run):
    for number in range(8):
        save_image(PHOTOS / "train" / "a" / f"white {number}.png", "white")
    assert val_only(RUN, OUT) == 0
    assert read(OUT, "val.json")["val"] == read(RUN)["last"]["val"]


def test_val_only_on_another_test_set_records_both_digests(plain_run):
    save_image(PHOTOS / "test" / "a" / "new.png")
    assert val_only(RUN, OUT) == 0
    found = read(OUT, "val.json")
    images, of_the_run = found["images"], found["images_of_the_run"]
    assert images["images"] == 9
    assert of_the_run["images"] == 8
    assert images["digest"] != of_the_run["digest"]


def test_val_only_with_unknown_held_out_images_evaluates_the_test_split(held_out_run, capsys):
    add_image()
    assert val_only(RUN, OUT) == 0
    assert "8 test images" in capsys.readouterr().out
    expected = read(RUN)["test"]["last"]["metrics"]["final"]
    assert read(OUT, "val.json")["test"]["final"] == pytest.approx(expected)


def test_val_only_evaluates_a_test_set_by_itself(held_out_run):
    shutil.rmtree(PHOTOS / "train")
    assert val_only(RUN, OUT) == 0
    expected = read(RUN)["test"]["last"]["metrics"]["final"]
    assert read(OUT, "val.json")["test"]["final"] == pytest.approx(expected)


def test_own_validation_images_select_and_the_test_split_is_used_at_the_end(plain_run, capsys):
    shutil.copytree(PHOTOS / "test", PHOTOS / "val")
    assert train(FLAGS, PHOTOS, Path("new")) == 0
    results = read(Path("new"))
    assert results["test"]["last"]["metrics"] == results["last"]["val"]
    assert results["test"]["best"]["temperatures"]
    assert val_only(Path("new"), OUT) == 0
    exchange_image(PHOTOS, "val", 0)  # which is in no training split
    assert val_only(Path("new"), OUT) == 0
    assert capsys.readouterr().out.count(": 8 validation images") == 2
    written = read(OUT, "val.json")
    assert written["images"] != written["images_of_the_run"]


@pytest.mark.parametrize("folder", [".", "train"])
def test_run_without_a_test_split_says_so(folder, plain_run, capsys):
    shutil.rmtree(PHOTOS / "test")
    assert train(HELD_OUT, PHOTOS / folder, Path("new")) == 0
    assert "no test split" in capsys.readouterr().out
    assert read(Path("new"))["test"]["last"]["temperatures"]
    assert val_only(Path("new"), OUT) == 0
    assert read(OUT, "val.json")["val"] == read(Path("new"))["last"]["val"]


def test_resume_with_a_lost_test_split_is_refused(held_out_run, refused):
    shutil.rmtree(PHOTOS / "test")
    assert "0 test images in place of 8" in refused(train, HELD_OUT)


def test_record_names_classes_and_counts_the_images_of_each_split(held_out_run):
    record = read(RUN, "config.json")["data"]
    assert record["class_names"] == ["a", "b"]
    counts = {name: split["images"] for name, split in record["splits"].items()}
    assert counts == {"train_and_val": 16, "train": 12, "val": 4, "test": 8}


def test_record_identifies_the_training_images_before_any_are_held_out(plain, held_out):
    split, whole = (read(folder / "run", "config.json")["data"]["splits"] for folder in (held_out, plain))
    assert split["train_and_val"] == whole["train"]


IMAGES = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
LABELS = np.array([0, 1])
OTHER_SPLITS = {
    "pixels": Split(IMAGES + 1, LABELS),
    "labels": Split(IMAGES, LABELS + 1),
    "order": Split(IMAGES[::-1], LABELS),
    "shape": Split(IMAGES.reshape(2, 6, 4, 3), LABELS),
}


@pytest.mark.parametrize("what", OTHER_SPLITS)
def test_digest_depends_on(what):
    assert OTHER_SPLITS[what].digest() != Split(IMAGES, LABELS).digest()


def test_digest_does_not_depend_on_the_layout_in_memory():
    same = Split(np.asfortranarray(IMAGES), LABELS.astype(np.int32))
    assert same.digest() == Split(IMAGES, LABELS).digest()


def add_noise(monkeypatch) -> None:
    """To every batch, drawn from all three global generators, as code may that a user adds."""
    original = TrainStep.__call__

    def noisy(step, images, *others):
        level = random.random() * np.random.rand() * torch.rand(len(images), 1, 1, 1)
        original(step, images + level, *others)

    monkeypatch.setattr(TrainStep, "__call__", noisy)


def losses(directory: Path) -> list[float]:
    return [record["train"]["loss"] for record in read_records(directory)]


def test_code_that_draws_random_numbers_resumes_to_the_bit(tmp_path, monkeypatch):
    flags = f"{FLAGS} --end_epoch 3"
    save_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    add_noise(monkeypatch)
    assert train(flags, directory=Path("straight")) == 0
    with monkeypatch.context() as patch, pytest.raises(KeyError):  # in the second epoch
        patch.setattr(main, "predict", mock.Mock(wraps=main.predict, side_effect=[mock.DEFAULT, KeyError]))
        train(flags, directory=Path("stopped"))
    assert len(losses(Path("stopped"))) == 1
    assert train(flags, directory=Path("stopped")) == 0
    assert losses(Path("stopped")) == losses(Path("straight"))
    assert len(set(losses(Path("straight")))) == 3
