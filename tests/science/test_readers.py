"""Data sets of every kind, good and bad: their splits, classes, order, and what is said of files that are wrong."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import build, random_images
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

import data
import main
from data import readers
from data.images import CACHE, ReadOptions
from utils.errors import UserError

CLASS_IDS, IMAGE = [f"n{number:08d}" for number in range(1000, 1200)], Image.effect_noise((20, 24), 99)
TINY = "tiny-imagenet-200"
NOTES = f"{TINY}/val/val_annotations.txt"


def error_of(name, root, *words):
    with pytest.raises(UserError) as caught:
        build("--data_type", name, "--data_path", root, *words)
    assert str(caught.value).isprintable()
    return str(caught.value)


def build_splits(*words):
    return data.load_splits(main.parse_args([str(word) for word in words]), "cpu")


def write_classes(folder, images, labels, names, kind="png"):
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / names[label] / f"{row:04}.{kind}", compress_level=0)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """3 + 1 images of 20 x 24 pixels in each of 3 classes, a, b and c; nothing can be downloaded."""
    monkeypatch.setattr("urllib.request.urlopen", None)
    for folder, num in (("train", 9), ("test", 3)):
        write_classes(tmp_path / "set" / folder, random_images(num, 24, 20), np.arange(num) % 3, "abc")
    return tmp_path / "set"


def truncate(path):
    IMAGE.save(path)
    os.truncate(path, 500)


def write_tiny_imagenet(root):
    """One training and one validation image of each of 200 classes; annotations in reverse order."""
    tiny, labels = root / TINY, np.arange(200)
    write_classes(tiny / "train", random_images(200, 24, 20), labels, [f"{name}/images" for name in CLASS_IDS])
    write_classes(tiny / "val", random_images(200, 24, 20), 0 * labels, ["images"])
    (tiny / "train" / CLASS_IDS[0] / f"{CLASS_IDS[0]}_boxes.txt").touch()
    (tiny / "wnids.txt").write_text("\n".join(CLASS_IDS))
    (tiny / "words.txt").write_text(f"{CLASS_IDS[0]}\tgoldfish, Carassius auratus\n")
    (root / NOTES).write_text("".join(f"{n:04}.png\t{CLASS_IDS[n]}\t0\t0\t19\t15\n" for n in reversed(labels)))


@pytest.mark.parametrize(
    "num_classes, height, width, kind, test_name", [(3, 24, 40, "jpg", "test"), (11, 32, 32, "png", "val")]
)
def test_folder_of_classes(tmp_path, num_classes, height, width, kind, test_name):
    names, labels = [f"class {n}" for n in range(num_classes)], np.arange(2 * num_classes) % num_classes
    for folder in ("train", test_name):
        write_classes(tmp_path / folder, random_images(len(labels), height, width), labels, names, kind)
    files = sorted(tmp_path.glob("train/*/*"))
    for hidden in (".class", f"{names[0]}/.folder"):
        (tmp_path / "train" / hidden).mkdir()
        shutil.copy(files[0], tmp_path / "train" / hidden)
    train, test, class_names = readers.read_folder(tmp_path, ReadOptions(32))
    assert class_names == sorted(names) and len(test.labels) == len(labels)  # "class 10" before "class 2"
    assert [class_names[label] for label in train.labels] == [file.parent.name for file in files]
    assert (train.images == np.stack([np.asarray(Image.open(file)) for file in files])).all()
    _, val = build("--data_type", "folder", "--data_path", tmp_path, "--classes", "2")
    pixels = train.images[:4] / 255
    np.testing.assert_allclose([val.mean, val.std], [pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))], rtol=1e-6)
    assert "--classes 12: folder has" in error_of("folder", tmp_path, "--classes", "12")
    assert "--val_split 0.9 leaves no image" in error_of("folder", tmp_path, "--val_split", "0.9")


def test_tiny_imagenet_archive_is_unpacked_and_read_in_order(root, monkeypatch):
    write_tiny_imagenet(root)
    new = root / "new"
    archive = shutil.make_archive(new / TINY, "zip", root, TINY)
    monkeypatch.setattr(readers, "TINY_IMAGENET_MD5", hashlib.md5(Path(archive).read_bytes()).hexdigest())
    with pytest.raises(UserError, match="--val_only downloads nothing"):
        readers.read_tiny_imagenet(new, ReadOptions(32, read_only=True))
    assert os.listdir(new) == [f"{TINY}.zip"]
    train, val, names = readers.read_tiny_imagenet(new, ReadOptions(32))
    assert sorted(os.listdir(new)) == [TINY, f"{TINY}.zip"]
    _, loader = build("--data_type", "tinyimagenet", "--data_path", new / TINY)
    assert (loader.mean, loader.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert train.labels.tolist() == list(range(200)) and val.labels.tolist() == list(reversed(range(200)))
    assert (train.images == random_images(200, 24, 20)).all() and (val.images[::-1] == train.images).all()
    assert names == ["goldfish", *CLASS_IDS[1:]]
    (new / TINY).rename(new / "other")
    os.truncate(archive, 99)
    assert f"the checksum of {archive} is wrong" in error_of("tinyimagenet", new)
    assert f"put that file into {root / 'er'}, or" in error_of("tinyimagenet", root / "er")
    assert not (root / "er").exists()


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("folder", lambda r: r.rename(r.with_name("other")), "{root} is not a directory"),
        ("folder", lambda r: shutil.rmtree(r / "train"), "{root} has a folder test/ but none of the name train/"),
        ("folder", lambda r: shutil.rmtree(r / "test"), "give --val_split to hold out a part of the training images"),
        ("folder", lambda r: (r / "train/d").mkdir(), "{root}/train/d holds no image"),
        (
            "folder",
            lambda r: [shutil.rmtree(path) for path in r.glob("test/*")],
            "{root}/test holds no folder of images",
        ),
        ("folder", lambda r: shutil.rmtree(r / "test/b"), "{root}/test lacks classes that {root}/train has: b"),
        ("folder", lambda r: shutil.rmtree(r / "train/b"), "{root}/train lacks classes that {root}/test has: b"),
        ("folder", lambda r: IMAGE.save(r / "test/c/x.JPEG", "bmp"), "test/c/x.JPEG is not a JPEG, PNG or WebP image"),
        ("folder", lambda r: (r / "test/c/photo.heic").touch(), "test/c/photo.heic is not a JPEG, PNG or WebP image"),
        ("folder", lambda r: os.mkfifo(r / "test/c/x.png"), "test/c/x.png is not a regular file"),
        ("folder", lambda r: Image.new("I;16", (20, 24)).save(r / "test/c/x.png"), "x.png is a 16-bit grey PNG"),
        ("folder", lambda r: truncate(r / "test/c/x.jpg"), "x.jpg is not an intact JPEG, PNG or WebP"),
        ("tinyimagenet", lambda r: shutil.rmtree(r / TINY / "train" / CLASS_IDS[9]), "train has 199 classes, not 200"),
        ("tinyimagenet", lambda r: (r / NOTES).unlink(), "{root}/tiny-imagenet-200/val/val_annotations.txt is damaged"),
        ("tinyimagenet", lambda r: (r / NOTES).write_text("0007.png\n"), "val_annotations.txt is damaged"),
        ("tinyimagenet", lambda r: (r / NOTES).write_text("0007.png\tn5"), "val_annotations.txt is damaged"),
        ("tinyimagenet", lambda r: (r / NOTES).write_text(2 * (r / NOTES).read_text()), "missing (one of 200)"),
        ("tinyimagenet", lambda r: (r / TINY / "val/images/0007.png").unlink(), "val/images/0007.png is missing, or"),
        ("tinyimagenet", lambda r: IMAGE.save(r / TINY / "val/images/x.png"), "x.png is not listed in {root}"),
    ],
)
def test_bad_files_are_named(root, name, damage, words):
    write_tiny_imagenet(root)
    damage(root)
    assert words.format(root=root) in error_of(name, root) and not list(root.rglob(CACHE))


def test_damaged_images_are_all_counted_and_ten_are_named(root):
    for number in range(12):
        truncate(root / "train/b" / f"x{number:02}.png")
    truncate(root / "test/a/x.png")
    named = [f"{root}/train/b/x{number:02}.png is not an intact" for number in range(10)]
    error = error_of("folder", root)
    assert all(words in error for words in named) and error.count(".png") == 10 and error.endswith("; and 3 more")


@pytest.fixture(params=[CIFAR10, CIFAR100])
def cifar(request, root, monkeypatch):
    """The same images, 3 + 1 per class, as torchvision's files and, under `folders`, as folders of classes."""
    kind, classes, contents = request.param, 10 if request.param is CIFAR10 else 100, {}
    names = [f"name {n:02}" for n in range(classes)]
    for part, num in (("train", 3 * classes), ("test", classes)):
        images, labels = random_images(num), np.random.RandomState(0).permutation(num) % classes
        write_classes(root / "folders" / part, images, labels, names)
        contents[part] = {"data": images.transpose(0, 3, 1, 2).reshape(num, -1), "labels": labels.tolist()}
    contents["meta"] = {kind.meta["key"]: names}
    (root / kind.base_folder).mkdir()
    for name, content in contents.items():
        (root / kind.base_folder / name).write_bytes(pickle.dumps(content))
        md5 = hashlib.md5(pickle.dumps(content)).hexdigest()
        monkeypatch.setattr(kind, f"{name}_list", [(name, md5)], raising=False)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": "meta", "md5": md5})
    monkeypatch.setattr(readers, "CIFAR_SIZES", (3 * classes, classes))
    return kind.__name__.lower(), root / kind.base_folder, root / "folders"


def test_cifar_pickles_and_folders_give_the_same_images(cifar, capfd):
    name, pickles, folders = cifar
    rows = []
    for path in (pickles.parent, folders):
        train, val = build("--data_type", name, "--data_path", path)
        assert train.class_names[3] == "name 03" and train.augmentation == "crop"
        assert (train.mean, train.std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
        parts = [zip(part.images, part.labels, strict=True) for part in (train, val)]
        rows.append([sorted((image.numpy().tobytes(), int(label)) for image, label in part) for part in parts])
    assert rows[0] == rows[1]
    out, err = capfd.readouterr()
    assert out.startswith(f"writing {folders / CACHE} (") and out.count("\n") == 1 and not err  # torchvision prints


def test_damaged_wrong_or_missing_cifar_is_named_and_leaves_no_empty_folders(cifar):
    name, pickles, folders = cifar
    for file in pickles.iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b"?")
        assert f"the checksum of {file} is wrong" in error_of(name, pickles.parent)
        file.write_bytes(content)
    missing = folders / "new" / "er"
    assert f"put that file into {missing}, or use" in error_of(name, missing) and not (folders / "new").exists()
    shutil.copytree(folders / "train/name 03", folders / "train/name 04", dirs_exist_ok=True)
    assert f"{folders} is not {name.upper()}" in error_of(name, folders)


def test_classes_are_read_without_a_test_split_for_val_split(root):
    shutil.rmtree(root / "test")
    for folder in (root, root / "train"):  # the second is one folder of classes
        options = ReadOptions(32, needs_test=False)
        train, test, class_names = readers.read_folder(folder, options)
        assert (len(train.images), test, class_names) == (9, None, ["a", "b", "c"])
        loaders = build_splits("--data_type", "folder", "--data_path", folder, "--val_split", "0.3")
        assert {name: part.num_samples for name, part in loaders.items()} == {"train": 6, "val": 3}


def test_a_test_split_that_is_there_is_read_with_val_split_too(root):
    loaders = build_splits("--data_type", "folder", "--data_path", root, "--val_split", "0.3")
    assert {name: part.num_samples for name, part in loaders.items()} == {"train": 6, "val": 3, "test": 3}


def test_a_test_split_is_read_alone(root):
    _, expected, _ = readers.read_folder(root, ReadOptions(32))
    shutil.rmtree(root / "train")
    for _ in range(2):  # from the cache, and from the files
        train, test, class_names = readers.read_folder(root, ReadOptions(32, train=False))
        assert train is None and class_names == ["a", "b", "c"] and test.digest() == expected.digest()
        (root / CACHE).unlink(missing_ok=True)


def test_hidden_and_foreign_files_are_skipped_with_one_line_that_counts_them(root, capsys):
    before = readers.read_folder(root, ReadOptions(32))
    for name in ("train/a/._0000.png", "train/a/.DS_Store", "train/b/Thumbs.db", "test/c/notes.txt", "test/loose.png"):
        (root / name).write_text("no image")
    (root / "train/.hidden").mkdir()
    (root / "train/b/.folder").mkdir()
    shutil.copy(root / "train/a/0000.png", root / "train/b/.folder")
    capsys.readouterr()
    for _ in range(2):
        after = readers.read_folder(root, ReadOptions(32))
        assert after.class_names == before.class_names
        assert [split.digest() for split in after[:2]] == [split.digest() for split in before[:2]]
    line, *others = capsys.readouterr().err.splitlines()
    assert line == f"note: skipped 6 hidden or foreign files in {root}, the first of them train/a/.DS_Store"
    assert not others


def test_pickles_folders_and_cache_give_identical_arrays(cifar, tmp_path):
    name, pickles, folders = cifar
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    options = ReadOptions(32)
    from_pickles = readers.read_cifar(kind.__name__, pickles.parent, options)
    order = [np.argsort(split.labels, kind="stable") for split in from_pickles[:2]]  # as folders have them
    expected = [split.select(rows).digest() for split, rows in zip(from_pickles[:2], order, strict=True)]
    for _ in range(2):  # decoded, and from the cache
        found = readers.read_cifar(kind.__name__, folders, options)
        assert [split.digest() for split in found[:2]] == expected and found.class_names == from_pickles.class_names
        assert all(split.images.flags["C_CONTIGUOUS"] and split.labels.dtype == np.int64 for split in found[:2])
    assert all(split.images.flags["C_CONTIGUOUS"] for split in from_pickles[:2])


def test_another_test_set_of_cifars_classes_is_read(cifar):
    name, _, folders = cifar
    shutil.rmtree(folders / "train")
    (folders / "test/name 00/new.png").write_bytes(next((folders / "test/name 00").glob("*.png")).read_bytes())
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    _, test, class_names = readers.read_cifar(kind.__name__, folders, ReadOptions(32, train=False))
    assert len(test.images) == len(class_names) + 1
