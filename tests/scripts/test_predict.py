"""scripts/predict.py on the images that the loaders read: the same classes and confidences, and files that are none."""

import csv
import os
import shutil

import predict
import pytest
import torch
from helpers import run, save_photos
from PIL import Image

from data import build_loaders
from models import load_run
from models.exits import MultiExitResNet
from utils.engine import predict as predict_split


@pytest.mark.parametrize("methods", ["", "--BYOT", "--BYOT --val_split 0.3"])
def test_predictions_equal_those_of_the_loaders_network(methods, tmp_path, capsys):
    photos, table = tmp_path / "photos", tmp_path / "table.csv"
    save_photos(photos)
    words = f"{methods} --data_type folder --classes 2 --image_size 24 --data_path {photos}"
    assert run(tmp_path / "run", *words.split()) == 0
    model, info = load_run(tmp_path / "run")
    logits, labels = predict_split(model, build_loaders(info["args"], "cpu", split="test"), "fp32")
    costs, backbone = model.multiply_adds(24)
    (photos / "test" / "a" / "0-bad.jpg").write_bytes(b"\xff\xd8 not a photograph")
    for threshold, i, cost in (("1.01", -1, backbone), ("1", -1, costs[-1]), ("0", 0, costs[0])):
        capsys.readouterr()
        argv = [str(tmp_path / "run"), str(photos / "test"), "--threshold", threshold, "--csv", str(table)]
        assert predict.main(argv) == 1  # for the damaged one
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "bad.jpg is not" in error
        assert ("not calibrated" in error) == ("val_split" not in methods)
        _, *rows = csv.reader(table.open())
        scaled = (logits[i] / model.temperatures[i]).softmax(dim=1)
        for (file, *row), probabilities, label in zip(rows, scaled, labels.tolist(), strict=True):
            assert f"test/{'ab'[label]}/" in file
            decided_by = "exit 1" if methods and i == 0 else "final"
            expected = probabilities.max().item(), 100 * cost / backbone
            assert row[::2] == ["ab"[probabilities.argmax()], decided_by]
            assert [float(number) for number in row[1::2]] == pytest.approx(expected, rel=1e-5)
    assert predict.main([str(tmp_path), "x.png"]) == 1 and "no such file" in capsys.readouterr().err
    assert predict.main([str(tmp_path / "run"), file]) == 0
    assert f"{file}: " in capsys.readouterr().out


def resize_some(photos):
    for number, file in enumerate(sorted(photos.glob("*/*/*.png"))):
        if number % 3 == 0:
            with Image.open(file) as image:
                image.resize((30, 24 + number)).save(file)


def turn_some(photos):
    tags = Image.Exif()
    tags[0x0112] = 6
    for file in sorted(photos.glob("*/*/*.png"))[::2]:
        with Image.open(file) as image:
            image.resize((20, 28)).transpose(Image.Transpose.ROTATE_90).save(file, exif=tags)
    for file in sorted(photos.glob("*/*/*.png"))[1::2]:
        with Image.open(file) as image:
            image.resize((20, 28)).save(file)


@pytest.mark.parametrize("change", [lambda photos: None, resize_some, turn_some])
@pytest.mark.parametrize("image_size", ["16", "24"])
def test_images_are_prepared_exactly_as_those_of_validation(change, image_size, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    save_photos(photos)
    change(photos)
    words = f"--data_type folder --classes 2 --image_size {image_size} --end_epoch 1 --data_path {photos}"
    assert run(tmp_path / "run", *words.split()) == 0
    _, info = load_run(tmp_path / "run")
    given = []
    original = MultiExitResNet.predict_early
    monkeypatch.setattr(MultiExitResNet, "predict_early", lambda *args: given.append(args[1]) or original(*args))
    monkeypatch.setattr(predict, "BATCH_SIZE", 3)
    assert predict.main([str(tmp_path / "run"), str(photos / "test")]) == 0
    assert [len(images) for images in given] == [3, 3, 2]
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in given)
    expected = torch.cat([images for images, _, _ in build_loaders(info["args"], "cpu", split="test")])
    assert torch.equal(torch.cat(given), expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images of the classes `a` and one whose name forges an error."""
    directory = tmp_path_factory.mktemp("trained")
    save_photos(directory / "photos")
    for split in ("train", "test"):
        (directory / "photos" / split / "b").rename(directory / "photos" / split / FORGED)
    words = f"--data_type folder --classes 2 --end_epoch 1 --data_path {directory / 'photos'}"
    assert run(directory / "run", *words.split()) == 0
    return directory


FORGED = "b\nerror: forged \x1b[31m"


def test_names_are_printed_on_one_line_without_control_characters(trained, tmp_path, capsys):
    (tmp_path / FORGED).mkdir()
    shutil.copy(next((trained / "photos" / "test" / "a").glob("*.png")), tmp_path / FORGED / "x.png")
    (tmp_path / FORGED / "damaged.png").touch()
    capsys.readouterr()
    folders = [str(tmp_path / FORGED), str(trained / "photos" / "test")]
    assert predict.main([str(trained / "run"), *folders]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 9 and "\\nerror: forged \\x1b[31m" in out
    assert [line.split(":")[0] for line in err.splitlines()] == ["note", "error"] and (out + err).isascii()
    assert "\x1b" not in out + err


def test_pipe_named_as_an_image_is_an_error(trained, tmp_path, capsys):
    os.mkfifo(tmp_path / "x.png")
    assert predict.main([str(trained / "run"), str(tmp_path)]) == 1
    assert f"error: {tmp_path / 'x.png'} is not a regular file\n" in capsys.readouterr().err


def test_missing_file_is_an_error(trained, tmp_path, capsys):
    assert predict.main([str(trained / "run"), str(tmp_path / "x.png")]) == 1
    assert f"error: {tmp_path / 'x.png'} cannot be read (No such file or directory)\n" in capsys.readouterr().err


def test_hidden_and_foreign_files_are_counted_and_skipped(trained, tmp_path, capsys):
    shutil.copy(next((trained / "photos" / "test" / "a").glob("*.png")), tmp_path / "x.png")
    for name in ("._x.png", ".DS_Store", "notes.txt"):
        (tmp_path / name).touch()
    assert predict.main([str(trained / "run"), str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and f"note: skipped 3 hidden or foreign files in {tmp_path}, the first" in err


def test_folder_without_images_is_an_error(trained, tmp_path, capsys):
    assert predict.main([str(trained / "run"), str(tmp_path)]) == 1
    assert f"error: {tmp_path} holds no image\n" in capsys.readouterr().err


def test_table_holds_names_as_they_are(trained, tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff.png")  # not UTF-8
    shutil.copy(next((trained / "photos" / "test" / "a").glob("*.png")), tmp_path / name)
    table = tmp_path / "table.csv"
    assert predict.main([str(trained / "run"), str(tmp_path / name), "--csv", str(table)]) == 0
    _, row = csv.reader(table.open(encoding="utf-8", errors="surrogateescape", newline=""))
    assert row[0] == str(tmp_path / name)
