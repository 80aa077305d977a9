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
from models.early_exit import multiply_adds
from utils import engine


def call(*words) -> int:
    return predict.main([str(word) for word in words])


def train(directory, flags="--end_epoch 1"):
    """A run on the photos beside it."""
    words = f"--data_type folder --classes 2 --data_path {directory / 'photos'} {flags}"
    assert run(directory / "run", *words.split()) == 0


@pytest.fixture(scope="module", params=["", "--BYOT", "--BYOT --val_split 0.3"])
def methods(request):
    return request.param


@pytest.fixture(scope="module")
def multi_exit(methods, tmp_path_factory):
    """A folder with a run and its photos; logits and labels of the loaders' network. Then a photo is damaged."""
    directory = tmp_path_factory.mktemp("multi_exit")
    save_photos(directory / "photos")
    train(directory, f"{methods} --image_size 24")
    model, info = load_run(directory / "run")
    loader = build_loaders(info["args"], "cpu", split="test")
    logits, labels = engine.predict(model, loader, "fp32")
    damaged = directory / "photos" / "test" / "a" / "0-bad.jpg"
    damaged.write_bytes(b"\xff\xd8 not a photograph")
    return directory, logits, labels


@pytest.mark.parametrize("threshold", [1.01, 1, 0])
def test_predictions_equal_those_of_the_loaders_network(multi_exit, methods, threshold, tmp_path):
    directory, logits, labels = multi_exit
    model, info = load_run(directory / "run")
    i = 0 if threshold == 0 else -1
    decided_by = "exit 1" if methods and threshold == 0 else "final"
    costs, backbone = multiply_adds(model, 24, info["temperatures"])
    cost = backbone if threshold > 1 else costs[decided_by]
    scaled = logits[i] / info["temperatures"][decided_by]
    confidences, classes = scaled.softmax(dim=1).max(dim=1)

    table = tmp_path / "table.csv"
    assert call(directory / "run", directory / "photos" / "test", "--threshold", threshold, "--csv", table) == 1
    _, *rows = csv.reader(table.open())
    for (file, *row), confidence, number, label in zip(rows, confidences, classes, labels, strict=True):
        assert f"test/{'ab'[label]}/" in file
        assert row[::2] == ["ab"[number], decided_by]
        expected = [confidence.item(), 100 * cost / backbone]
        assert [float(value) for value in row[1::2]] == pytest.approx(expected, rel=1e-5)


def test_a_damaged_file_is_named_and_the_others_continue(multi_exit, capsys):
    directory, _, _ = multi_exit
    assert call(directory / "run", directory / "photos" / "test") == 1
    out, err = capsys.readouterr()
    assert err.count("error: ") == 1
    assert "bad.jpg is not" in err
    assert len(out.splitlines()) == 8


def test_confidences_are_noted_as_not_calibrated_without_val_split(multi_exit, methods, capsys):
    directory, _, _ = multi_exit
    call(directory / "run", directory / "photos" / "test")
    is_noted = "not calibrated" in capsys.readouterr().err
    assert is_noted == ("val_split" not in methods)


def test_without_an_image_the_table_holds_no_earlier_rows(multi_exit, tmp_path):
    directory, _, _ = multi_exit
    table = tmp_path / "table.csv"
    table.write_text("of an earlier call")
    assert call(directory / "run", directory / "photos" / "test" / "a" / "0-bad.jpg", "--csv", table) == 1
    assert table.read_text().splitlines() == [",".join(predict.HEADINGS)]


def test_a_folder_that_is_no_run_is_an_error(tmp_path, refused):
    assert "must be a run directory" in refused(call, tmp_path, "x.png")


def vary(photos):
    """Of different sizes, and every second one on its side, as its EXIF tag says."""
    tags = Image.Exif()
    for number, file in enumerate(sorted(photos.glob("*/*/*.png"))):
        with Image.open(file) as image:
            image = image.resize((20, 20 + number))
        if number % 2:
            image = image.transpose(Image.Transpose.ROTATE_90)
        tags[0x0112] = 6 if number % 2 else 1
        image.save(file, exif=tags)


@pytest.mark.parametrize("change", [lambda photos: None, vary])
@pytest.mark.parametrize("image_size", [16, 24])
def test_images_are_prepared_exactly_as_those_of_validation(change, image_size, tmp_path, monkeypatch):
    save_photos(tmp_path / "photos")
    change(tmp_path / "photos")
    train(tmp_path, f"--image_size {image_size} --end_epoch 1")
    given = []
    original = predict.predict_early

    def predict_early(model, images, *rest):
        assert images.is_contiguous(memory_format=torch.channels_last)
        given.append(images)
        return original(model, images, *rest)

    monkeypatch.setattr(predict, "predict_early", predict_early)
    monkeypatch.setattr(predict, "BATCH_SIZE", 3)
    assert call(tmp_path / "run", tmp_path / "photos" / "test") == 0
    assert [len(images) for images in given] == [3, 3, 2]
    _, info = load_run(tmp_path / "run")
    loader = build_loaders(info["args"], "cpu", split="test")
    expected = [images for images, _, _ in loader]
    assert torch.equal(torch.cat(given), torch.cat(expected))


FORGED = "b\nerror: forged \x1b[31m"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images of the classes `a` and `b`."""
    directory = tmp_path_factory.mktemp("trained")
    save_photos(directory / "photos")
    train(directory)
    return directory


@pytest.fixture
def photo(trained):
    return next((trained / "photos" / "test" / "a").glob("*.png"))


def test_names_are_printed_on_one_line_without_control_characters(trained, photo, tmp_path, monkeypatch, capsys):
    """Of classes, of an image and of a damaged file."""
    model, info = load_run(trained / "run")
    info["class_names"] = [FORGED, FORGED]
    monkeypatch.setattr(predict, "load_run", lambda *args: (model, info))
    forged = tmp_path / FORGED
    forged.mkdir()
    shutil.copy(photo, forged / "x.png")
    (forged / "damaged.png").touch()
    assert call(trained / "run", forged) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert out.count("b\\nerror: forged \\x1b[31m") == 2
    note, error = err.splitlines()
    assert note.startswith("note:")
    assert error.startswith("error:")
    assert "\x1b" not in out + err


def test_missing_file_is_an_error(trained, tmp_path, capsys):
    missing = tmp_path / "x.png"
    assert call(trained / "run", missing) == 1
    assert f"error: {missing} cannot be read (No such file or directory)\n" in capsys.readouterr().err


def test_hidden_and_foreign_files_are_counted_and_skipped(trained, photo, tmp_path, capsys):
    shutil.copy(photo, tmp_path / "x.png")
    for name in ("._x.png", ".DS_Store", "notes.txt"):
        (tmp_path / name).touch()
    assert call(trained / "run", tmp_path) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert f"note: skipped 3 hidden or foreign files in {tmp_path}, the first" in err


def test_folder_without_images_is_an_error(trained, tmp_path, capsys):
    assert call(trained / "run", tmp_path) == 1
    assert f"error: {tmp_path} holds no image\n" in capsys.readouterr().err


def test_table_holds_names_as_they_are(trained, photo, tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9 \xff.png")  # not UTF-8
    shutil.copy(photo, file)
    table = tmp_path / "table.csv"
    assert call(trained / "run", file, "--csv", table) == 0
    _, row = csv.reader(table.open(encoding="utf-8", errors="surrogateescape", newline=""))
    assert row[0] == str(file)
