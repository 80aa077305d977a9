"""Files to arrays: small data sets of every kind, good and bad, and the cache of decoded images."""

import hashlib
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import build, random_images
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from data import readers
from utils.errors import UserError

CLASS_IDS, IMAGE = [f"n{number:08d}" for number in range(1000, 1200)], Image.effect_noise((20, 24), 99)
TINY = "tiny-imagenet-200"
NOTES = f"{TINY}/val/val_annotations.txt"


def error_of(name, root, *words):
    with pytest.raises(UserError) as caught:
        build("--data_type", name, "--data_path", root, *words)
    assert str(caught.value).isprintable()
    return str(caught.value)


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
    (tmp_path / "train" / names[0] / ".DS_Store").touch()
    train, test, class_names = readers.read_folder(tmp_path, 2, False)
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
        readers.read_tiny_imagenet(new, 2, read_only=True)
    assert os.listdir(new) == [f"{TINY}.zip"]
    train, val, names = readers.read_tiny_imagenet(new, 2, False)
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
        ("folder", lambda r: shutil.rmtree(r / "train"), "No such file or directory: '{root}/train'"),
        ("folder", lambda r: (r / "train/d").mkdir(), "{root}/train/<class>/ must hold the images of each class"),
        ("folder", lambda r: shutil.rmtree(r / "test/b"), "class b has no folder in one of train/ and test/"),
        ("folder", lambda r: shutil.rmtree(r / "train/b"), "class b has no folder in one of train/ and test/"),
        ("folder", lambda r: IMAGE.save(r / "test/c/x.JPEG", "bmp"), "{root}/test/c/x.JPEG is not an intact JPEG"),
        ("folder", lambda r: Image.new("I;16", (20, 24)).save(r / "test/c/x", "png"), "16-bit grey"),
        ("folder", lambda r: IMAGE.resize((24, 20)).save(r / "test/c/x", "png"), "test/c/x and {root}/train/a/0000"),
        ("folder", lambda r: [IMAGE.save(r / "test/c/x", "jpeg"), os.truncate(r / "test/c/x", 500)], "test/c/x is not"),
        ("tinyimagenet", lambda r: shutil.rmtree(r / TINY / "train" / CLASS_IDS[9]), "train has 199 classes, not 200"),
        ("tinyimagenet", lambda r: (r / NOTES).unlink(), "{root}/tiny-imagenet-200/val/val_annotations.txt is damaged"),
        ("tinyimagenet", lambda r: (r / NOTES).write_text("0007.png\n"), "val_annotations.txt is damaged"),
        ("tinyimagenet", lambda r: (r / NOTES).write_text("0007.png\tn5"), "val_annotations.txt is damaged"),
        ("tinyimagenet", lambda r: (r / NOTES).write_text(2 * (r / NOTES).read_text()), "does not list each file"),
        ("tinyimagenet", lambda r: (r / TINY / "val/images/0007.png").unlink(), "does not list each file"),
    ],
)
def test_bad_files_are_named(root, name, damage, words):
    write_tiny_imagenet(root)
    damage(root)
    assert words.format(root=root) in error_of(name, root) and not list(root.rglob(readers.CACHE))


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
    assert rows[0] == rows[1] and capfd.readouterr() == ("", "")


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


def test_cache_is_used_until_a_file_changes(root, monkeypatch):
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    with ThreadPoolExecutor(2) as pool:  # two runs that start at once
        before, other = pool.map(lambda _: readers.read_folder(root, 1, False).train.images, range(2))
    assert (before == other).all() and sorted(os.listdir(root)) == [readers.CACHE, "test", "train"]
    assert len(opened) >= 12 and not opened.clear()
    assert (readers.read_folder(root, 1, False).train.images == before).all() and not opened
    file, facts = root / "train/a/0000.png", (root / "train/a/0000.png").stat()
    shutil.copyfile(root / "train/b/0001.png", file)  # of the same size, and given the same time
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = readers.read_folder(root, 1, False).train.images
    assert file.stat().st_size == facts.st_size and (after[0] == before[3]).all()


def test_damaged_cache_is_not_used(root, capsys):
    cache, expected = root / readers.CACHE, readers.read_folder(root, 1, False).train.images
    good = cache.read_bytes()
    damaged = [b"", good[:-1], good[: len(good) // 2], bytes(len(good)), b"\x93NUMPY\1\0"]
    for i in (*range(0, 400, 5), *range(400, len(good) - 400, 997), *range(len(good) - 400, len(good), 5)):
        damaged.append(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
    for content in damaged:
        cache.write_bytes(content)
        assert (readers.read_folder(root, 1, read_only=True).train.images == expected).all()
        assert cache.read_bytes() == content
    cache.unlink()
    cache.mkdir()  # so that it cannot be written
    assert (readers.read_folder(root, 1, False).train.images == expected).all()
    assert f"{cache} cannot be written" in capsys.readouterr().err
    assert sorted(os.listdir(root)) == [readers.CACHE, "test", "train"]
