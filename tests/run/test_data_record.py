"""A run knows its images: what is recorded, and what happens when others lie on the disk."""

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import files, one_line, read, read_records, run, save_photos, val_only
from PIL import Image

import main
from data.readers import Split
from utils.checkpoint import load_checkpoint
from utils.engine import TrainStep

SMALL = "--data_type folder --image_size 16 --width 4 --num_resnet_blocks 2 --batch_size 8 --lr 0.05"


@pytest.fixture
def photos(tmp_path) -> Path:
    save_photos(tmp_path / "photos")
    return tmp_path / "photos"


def train(directory: Path, photos: Path, *words: str) -> int:
    return run(directory, "--data_path", str(photos), *words, flags=SMALL)


def rename_class(photos: Path) -> None:
    for split in ("train", "test"):
        (photos / split / "a").rename(photos / split / "z")


def exchange_image(photos: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(photos / "train" / "a" / "2.png")


def add_image(photos: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(photos / "train" / "b" / "new.png")


OTHER_IMAGES = [
    (rename_class, "has other classes than the network was trained on: missing: a; new: z"),
    (exchange_image, "pixels or labels of the 16 train images"),
    (add_image, "17 train images in place of 16"),
]


@pytest.mark.parametrize(("change", "named"), OTHER_IMAGES)
@pytest.mark.parametrize("is_finished", [False, True])
def test_resume_on_other_images_is_refused_by_name(change, named, is_finished, photos, tmp_path, capsys):
    words = ("--PSKD", "--end_epoch", "2")
    if is_finished:
        assert train(tmp_path / "run", photos, *words) == 0
    else:  # the first epoch of two
        assert train(tmp_path / "run", photos, "--PSKD", "--end_epoch", "1") == 0
        words = (*words, "--allow_end_epoch_change")
    before = files(tmp_path / "run")
    change(photos)
    assert train(tmp_path / "run", photos, *words) == 1
    assert named in one_line(capsys) and files(tmp_path / "run") == before


def test_resume_with_added_images_does_not_move_held_out_ones_into_training(photos, tmp_path, capsys):
    words = ("--val_split", "0.25")
    assert train(tmp_path / "run", photos, "--end_epoch", "1", *words) == 0
    add_image(photos)
    assert train(tmp_path / "run", photos, "--end_epoch", "2", "--allow_end_epoch_change", *words) == 1
    assert "13 train images in place of 12" in one_line(capsys)


def test_another_folder_under_the_same_run_name_is_refused(photos, tmp_path, capsys):
    assert train(tmp_path / "run", photos, "--end_epoch", "1") == 0
    other = shutil.copytree(photos, tmp_path / "other")
    exchange_image(other)
    assert train(tmp_path / "run", other, "--end_epoch", "1") == 1 and "other images" in one_line(capsys)


def test_val_only_refuses_other_classes_by_name(photos, tmp_path, capsys):
    assert train(tmp_path / "run", photos, "--end_epoch", "1") == 0
    rename_class(photos)
    assert val_only(tmp_path / "run", tmp_path / "out") == 1 and "missing: a; new: z" in one_line(capsys)


def test_val_only_uses_the_recorded_mean_and_std(photos, tmp_path):
    assert train(tmp_path / "run", photos, "--end_epoch", "2") == 0
    for number in range(8):
        Image.new("RGB", (20, 20), "white").save(photos / "train" / "a" / f"white {number}.png")
    assert val_only(tmp_path / "run", tmp_path / "out") == 0
    assert read(tmp_path / "out", "val.json")["val"] == read(tmp_path / "run")["last"]["val"]


def test_val_only_on_another_test_set_records_both_digests(photos, tmp_path):
    assert train(tmp_path / "run", photos, "--end_epoch", "1") == 0
    Image.new("RGB", (20, 20), "red").save(photos / "test" / "a" / "new.png")
    assert val_only(tmp_path / "run", tmp_path / "out") == 0
    found = read(tmp_path / "out", "val.json")
    assert found["images"]["images"] == 9 and found["images_of_the_run"]["images"] == 8
    assert found["images"]["digest"] != found["images_of_the_run"]["digest"]


def test_val_only_with_unknown_held_out_images_evaluates_the_test_split(photos, tmp_path, capsys):
    assert train(tmp_path / "run", photos, "--end_epoch", "1", "--val_split", "0.25") == 0
    assert val_only(tmp_path / "run", tmp_path / "same") == 0
    assert read(tmp_path / "same", "val.json")["val"] == read(tmp_path / "run")["last"]["val"]
    add_image(photos)
    assert val_only(tmp_path / "run", tmp_path / "out") == 0 and "8 test images" in capsys.readouterr().out
    assert read(tmp_path / "out", "val.json")["val"] == pytest.approx(read(tmp_path / "run")["test"]["last"]["val"])


def test_the_record_names_classes_numbers_and_digests(photos, tmp_path):
    assert train(tmp_path / "run", photos, "--end_epoch", "1", "--val_split", "0.25") == 0
    record = load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["data"]
    assert record == read(tmp_path / "run", "config.json")["data"]
    assert record["class_names"] == ["a", "b"] and len(record["mean"]) == len(record["std"]) == 3
    assert {name: split["images"] for name, split in record["splits"].items()} == {"train": 12, "val": 4, "test": 8}


def test_digest_depends_on_pixels_labels_order_and_shape():
    images = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    labels = np.array([0, 1])
    others = [
        Split(images + 1, labels),
        Split(images, labels + 1),
        Split(images[::-1], labels),
        Split(images.reshape(2, 6, 4, 3), labels),
    ]
    digest = Split(images, labels).digest()
    assert digest == Split(np.asfortranarray(images), labels.astype(np.int32)).digest()
    assert len({digest, *(other.digest() for other in others)}) == 5


def test_code_that_draws_random_numbers_resumes_to_the_bit(photos, tmp_path, monkeypatch):
    call = TrainStep.__call__

    def noisy(step, images, *others):
        level = np.random.rand() * torch.rand(len(images), 1, 1, 1)
        call(step, images + level, *others)

    monkeypatch.setattr(TrainStep, "__call__", noisy)
    words = ("--end_epoch", "3", "--PSKD")
    assert train(tmp_path / "straight", photos, *words) == 0
    monkeypatch.setattr(main, "predict", mock.Mock(wraps=main.predict, side_effect=[mock.DEFAULT, KeyError]))
    with pytest.raises(KeyError):  # in the second epoch
        train(tmp_path / "stopped", photos, *words)
    monkeypatch.undo()
    monkeypatch.setattr(TrainStep, "__call__", noisy)
    assert train(tmp_path / "stopped", photos, *words) == 0
    losses = [[epoch["train"]["loss"] for epoch in read_records(tmp_path / name)] for name in ("straight", "stopped")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


def test_val_only_reads_a_test_split_without_train(photos, tmp_path, capsys):
    assert train(tmp_path / "run", photos, "--end_epoch", "1") == 0
    shutil.rmtree(photos / "train")
    assert val_only(tmp_path / "run", tmp_path / "out") == 0 and "8 test images" in capsys.readouterr().out
    assert read(tmp_path / "out", "val.json")["val"] == read(tmp_path / "run")["last"]["val"]


def test_val_only_brings_other_images_to_the_recorded_stored_size(photos, tmp_path):
    """The run's images are 20 x 20, squeezed from 30 x 20 those of the other set would be wrong: they are cut."""
    assert train(tmp_path / "run", photos, "--end_epoch", "1") == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["data"]["stored_size"] == [20, 20]
    for file in (photos / "test").glob("*/*.png"):
        with Image.open(file) as image:
            wide = Image.new("RGB", (30, 20), "red")
            wide.paste(image, (5, 0))
            wide.save(file)
    assert val_only(tmp_path / "run", tmp_path / "out") == 0
    found = read(tmp_path / "out", "val.json")
    assert found["images"] == found["images_of_the_run"] and found["val"] == read(tmp_path / "run")["last"]["val"]


def test_run_without_a_test_split_says_so(photos, tmp_path, capsys):
    shutil.rmtree(photos / "test")
    assert train(tmp_path / "run", photos, "--end_epoch", "1") == 1 and "--val_split" in one_line(capsys)
    for name, folder in (("run", photos), ("flat", photos / "train")):
        assert train(tmp_path / name, folder, "--end_epoch", "1", "--val_split", "0.25") == 0
        assert read(tmp_path / name)["test"] == {} and "no test split" in capsys.readouterr().out
        assert val_only(tmp_path / name, tmp_path / "out") == 0
        assert read(tmp_path / "out", "val.json")["val"] == read(tmp_path / name)["last"]["val"]


def test_resume_with_a_lost_test_split_is_refused(photos, tmp_path, capsys):
    words = ("--val_split", "0.25", "--end_epoch", "1")
    assert train(tmp_path / "run", photos, *words) == 0
    shutil.rmtree(photos / "test")
    assert train(tmp_path / "run", photos, *words) == 1 and "0 test images in place of 8" in one_line(capsys)
