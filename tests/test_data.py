"""Which images the loaders give, and in which order; the readers on small trees of files, good and bad."""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.v2 import functional as reference

import data
from data import augment, loader, readers, synthetic
from main import parse_args
from utils import distributed
from utils.runtime import UserError


def build(name, *words, split=None):
    words = ["--data_type", name, "--device", "cpu", "--precision", "fp32", "--batch_size", "16", *map(str, words)]
    return data.build_loaders(parse_args(words), "cpu", split)


def random_images(num, height=32, width=32):
    return np.random.RandomState(num).randint(0, 256, (num, height, width, 3)).astype(np.uint8)


def epoch_of(part):
    """(images, labels, index) of all batches."""
    return [torch.cat(parts) for parts in zip(*part, strict=True)]


@pytest.fixture(params=augment.KINDS)
def small_set(request, monkeypatch):
    """70 + 30 images of 10 classes in the place of the synthetic ones, with each kind of augmentation."""
    splits = [readers.Split(random_images(num), np.arange(num) * 3 % 10) for num in (70, 30)]
    images = readers.Images(*splits, [f"class {label}" for label in range(10)])
    row = data.DATASETS["synthetic"]._replace(num_classes=10, augmentation=request.param, read=lambda *_: images)
    monkeypatch.setitem(data.DATASETS, "synthetic", row)
    return images


@pytest.mark.parametrize("size", [16, 32, 64])
def test_batches_hold_every_row_once_under_its_index(small_set, size):
    images = torch.from_numpy(small_set.test.images)
    resized, expected = loader.resize(images, size), reference.resize(images.permute(0, 3, 1, 2), [size, size])
    assert (resized.permute(0, 3, 1, 2).int() - expected.int()).abs().max() <= 1  # PyTorch 2.4 does not round
    for split in small_set[:2]:  # one colour per image
        split.images[:] = split.images[:, :1, :1]
    for part, sizes in zip(build("synthetic", "--image_size", size), ([16, 16, 16, 16, 6], [30]), strict=True):
        images, labels, index = epoch_of(part)
        assert [len(labels) for _, labels, _ in part] == sizes and part.num_samples == sum(sizes)
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _, _ in part)
        assert images.dtype == torch.float32 and images.shape == (sum(sizes), 3, size, size)
        assert torch.equal(index.sort().values, torch.arange(sum(sizes))) and torch.equal(labels, part.labels[index])
        torch.testing.assert_close(images[:, :, 8, 8], (part.images[index, 0, 0] / 255 - 0.5) / 0.25)
        assert torch.equal(part.denormalise(images)[:, :, 8, 8], part.pictures(index)[:, :, 8, 8])
    assert torch.equal(index, torch.arange(30))  # validation is in file order


def test_order_and_augmentation_are_functions_of_seed_and_epoch(small_set):
    def last_of(*epochs, seed=4, chunk_pixels=0):
        train, _ = build("synthetic", "--seed", seed)
        train.chunk_pixels = chunk_pixels  # augmented at once
        for epoch in epochs:
            train.set_epoch(epoch)
            batches = epoch_of(train)
        return batches

    first, other = last_of(0), last_of(3)
    assert all(map(torch.equal, other, last_of(0, 1, 3)))
    for chunk_pixels in (3 * 16 * 32 * 32, loader.CHUNK_PIXELS):
        torch.testing.assert_close(last_of(3, chunk_pixels=chunk_pixels), other, rtol=0, atol=1e-4)
    for different in (other, last_of(0, seed=5)):
        assert not torch.equal(first[2], different[2])
        in_order = [images[index.argsort()] for images, _, index in (first, different)]
        assert (in_order[0] == in_order[1]).flatten(1).all(dim=1).float().mean() < 0.2


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_of_the_processes_make_up_every_batch(small_set, monkeypatch, world_size):
    single, shards = [list(part) for part in build("synthetic")], []
    monkeypatch.setattr(distributed, "local_main_first", lambda make: make())
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shards.append([list(part) for part in build("synthetic")])
    for part in (0, 1):  # training and validation
        for number, batch in enumerate(single[part]):
            parts = [shard[part][number] for shard in shards]
            sizes = [len(index) for _, _, index in parts]
            torch.testing.assert_close(epoch_of(parts), list(batch), rtol=0, atol=1e-4)
            assert max(sizes) - min(sizes) <= 1
    with pytest.raises(UserError, match=f"holds 1 of 49 images, fewer than the {world_size} processes"):
        build("synthetic", "--limit_train", 49)


@pytest.mark.parametrize(
    "words, sizes",
    [
        ("", (70, 30, 30)),
        ("--classes 4", (28, 12, 12)),
        ("--limit_train 25 --limit_val 11", (25, 11, 11)),
        ("--val_split 0.3", (50, 20, 30)),  # 2.1 of 7 is 2
        ("--val_split 0.01 --limit_val 999", (60, 10, 30)),  # at least one of each class
        ("--classes 4 --val_split 0.3 --limit_train 17 --limit_val 7", (17, 7, 7)),
    ],
)
def test_flags_choose_images_evenly_in_file_order(small_set, words, sizes):
    pixels, labels = (np.concatenate(parts) for parts in zip(*small_set[:2], strict=True))
    row_of, words, rows = {image.tobytes(): row for row, image in enumerate(pixels)}, words.split(), []
    for part in (*build("synthetic", *words), build("synthetic", *words, split="test")):
        rows.append([row_of[image.numpy().tobytes()] for image in part.images])
        assert rows[-1] == sorted(rows[-1]) and part.labels.tolist() == labels[rows[-1]].tolist()
        counts = torch.bincount(part.labels)
        assert len(counts) == part.num_classes == len(part.class_names) and counts.max() - counts.min() <= 1
    train, val, test = rows
    assert (len(train), len(val), len(test)) == sizes and not set(train) & set(val) and min(test) >= 70
    assert max(val) < 70 if "--val_split" in words else val == test


def test_limit_takes_the_first_of_each_class_and_val_split_random_ones():
    labels = np.array([2, 2, 0, 1, 2, 0, 2])
    for limit, rows in {1: [2], 2: [2, 3], 3: [0, 2, 3], 4: [0, 2, 3, 5], 5: [0, 1, 2, 3, 5], 9: [*range(7)]}.items():
        assert data.first_of_each_class(labels, limit).tolist() == rows
    held_out, again, other = (data.hold_out(np.arange(1000) % 10, 0.1, seed) for seed in (4, 4, 5))
    assert (held_out == again).all() and (held_out != other).any()
    assert len(set(np.flatnonzero(held_out) // 10)) > 40  # not the same images of every class


def test_synthetic_set_is_fixed_balanced_and_learnable(monkeypatch):
    monkeypatch.setattr(synthetic, "TRAIN_PER_CLASS", 20)
    train, test, names = synthetic.read(Path(), 1, False)
    assert len(set(names)) == 100 and np.bincount(test.labels).tolist() == [20] * 100
    means = [split.images.mean(axis=(0, 1, 2)) / 255 for split in (train, test)]  # recorded from another process
    recorded = [[0.491848325, 0.497606051, 0.498882531], [0.502224489, 0.500864252, 0.500336045]]
    np.testing.assert_allclose(means, recorded, atol=1e-6)
    grey = [split.images.mean(axis=3) - split.images.mean(axis=(1, 2, 3))[:, None, None] for split in (train, test)]
    lags = [np.stack([(g[..., k:] * g[..., : 32 - k]).mean(axis=(1, 2)) for k in range(16)], axis=1) for g in grey]
    weights = np.linalg.lstsq(lags[0], np.eye(10)[train.labels % 10], rcond=None)[0]
    assert ((lags[1] @ weights).argmax(axis=1) == test.labels % 10).mean() > 0.4  # rings' widths; chance is 0.1


WNIDS = [f"n{number:08d}" for number in range(1000, 1200)]
NOTES, IMAGE = "val/val_annotations.txt", Image.effect_noise((20, 24), 99)


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


@pytest.fixture
def tiny(root):
    """One training and one validation image for each of 200 classes; wnids.txt and annotations in reverse order."""
    tiny, labels = root / "tiny-imagenet-200", np.arange(200)
    write_classes(tiny / "train", random_images(200, 24, 20), labels, [f"{wnid}/images" for wnid in WNIDS])
    write_classes(tiny / "val", random_images(200, 24, 20), 0 * labels, ["images"])
    (tiny / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (tiny / "words.txt").write_text(f"{WNIDS[0]}\tgoldfish, Carassius auratus\n")
    (tiny / NOTES).write_text("".join(f"{n:04}.png\t{WNIDS[n]}\t0\t0\t19\t15\n" for n in reversed(labels)))
    return tiny


def error_of(name, root, *words):
    """The one line of a data set that cannot be read."""
    with pytest.raises(UserError) as caught:
        build(name, "--data_path", root, *words)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    "num_classes, per_class, height, width, kind, test_name",
    [(2, 1, 16, 16, "png", "test"), (3, 4, 24, 40, "jpg", "val"), (11, 2, 32, 32, "png", "val")],
)
def test_folder_of_classes(tmp_path, num_classes, per_class, height, width, kind, test_name):
    names, labels = [f"class {n}" for n in range(num_classes)], np.arange(num_classes * per_class) % num_classes
    for folder in ("train", test_name):
        write_classes(tmp_path / folder, random_images(len(labels), height, width), labels, names, kind)
    files = sorted(tmp_path.glob("train/*/*"))
    (tmp_path / "train" / names[0] / ".hidden").touch()
    train, test, class_names = readers.read_folder(tmp_path, 2, False)
    assert class_names == sorted(names) and len(test.labels) == len(labels)  # "class 10" before "class 2"
    assert [class_names[label] for label in train.labels] == [file.parent.name for file in files]
    assert (train.images == np.stack([np.asarray(Image.open(file)) for file in files])).all()
    _, val = build("folder", "--data_path", tmp_path, "--classes", 2)
    pixels = train.images[: 2 * per_class] / 255
    np.testing.assert_allclose([val.mean, val.std], [pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))], rtol=1e-6)
    assert "--classes 12: folder has" in error_of("folder", tmp_path, "--classes", 12)


def test_tiny_imagenet_archive_is_unpacked_and_read_in_order(root, tiny, monkeypatch):
    archive = Path(shutil.make_archive(root / "new" / tiny.name, "zip", root, tiny.name))
    monkeypatch.setattr(readers, "TINY_IMAGENET_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    train, val, names = readers.read_tiny_imagenet(root / "new", 2, False)
    assert train.labels.tolist() == list(range(200)) and val.labels.tolist() == list(reversed(range(200)))
    assert (train.images == random_images(200, 24, 20)).all() and (val.images[::-1] == train.images).all()
    assert names == ["goldfish", *WNIDS[1:]]
    shutil.rmtree(root / "new" / tiny.name)
    archive.write_bytes(b"half")
    assert f"the checksum of {archive} is wrong" in error_of("tinyimagenet", root / "new")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda r: (r / "train/d").mkdir(), "train/d holds no image"),
        (lambda r: shutil.rmtree(r / "test/b"), "class b has no folder in test/"),
        (lambda r: shutil.rmtree(r / "train/b"), "class b has no folder in train/"),
        (lambda r: (r / "train/x").touch(), "train/x cannot be read as a folder (Not a directory)"),
        (lambda r: IMAGE.save(r / "test/c/x.JPEG", "bmp"), "test/c/x.JPEG is not an intact JPEG or PNG"),
        (lambda r: Image.new("I;16", (20, 24)).save(r / "test/c/x", "png"), "test/c/x is not an intact"),
        (lambda r: IMAGE.resize((24, 20)).save(r / "test/c/x", "png"), "test/c/x is 24 x 20 pixels"),
        (lambda r: [IMAGE.save(r / "test/c/x", "jpeg"), os.truncate(r / "test/c/x", 500)], "test/c/x is not an intact"),
        (lambda r: (r / "train/a/x").symlink_to("nothing"), "train/a/x cannot be read"),
        (lambda r: os.mkfifo(r / "train/a/x"), "train/a/x is not a regular file"),
    ],
)
def test_bad_folder_is_named(root, damage, words):
    damage(root)
    assert words in error_of("folder", root) and not (root / readers.CACHE).exists()


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("wnids.txt", None, "wnids.txt is not a regular file"),
        ("wnids.txt", "\n".join(WNIDS[1:]), "wnids.txt does not list 200 class ids"),
        ("wnids.txt", "\n".join(["n\0", *WNIDS[1:]]), "wnids.txt does not list 200 class ids"),
        (NOTES, "0007.png\tn5\n", f"{NOTES} gives '0007.png' the class 'n5'"),
        (NOTES, f"../0007.png\t{WNIDS[7]}\n", "gives '../0007.png' the class"),
        (NOTES, f"\0\t{WNIDS[7]}\n", "gives '\\x00' the class"),
        (NOTES, f"0007.png\t{WNIDS[7]}\n" * 2, "gives '0007.png' the class"),
        (NOTES, f"0007.png\t{WNIDS[7]}\n", "val/images/0000.png is missing, or has no class in"),
    ],
)
def test_bad_tiny_imagenet_is_named(tiny, file, text, words):
    (tiny / file).unlink()
    (tiny / file).write_text(text) if text else os.mkfifo(tiny / file)
    assert words in error_of("tinyimagenet", tiny.parent)


def write_cifar(root, kind, monkeypatch):
    """The same images, 3 + 1 per class, as torchvision's files and, under `folders`, as folders of classes."""
    classes = 10 if kind is CIFAR10 else 100
    names = [f"name {n:02}" for n in range(classes)]
    contents = {"meta": {kind.meta["key"]: names}}
    for part, num in (("train", 3 * classes), ("test", classes)):
        images, labels = random_images(num), np.random.RandomState(0).permutation(num) % classes
        write_classes(root / "folders" / part, images, labels, names)
        contents[part] = {"data": images.transpose(0, 3, 1, 2).reshape(num, -1), "labels": labels.tolist()}
    (root / kind.base_folder).mkdir()
    for name, content in contents.items():
        (root / kind.base_folder / name).write_bytes(pickle.dumps(content))
        md5 = hashlib.md5(pickle.dumps(content)).hexdigest()
        value = {**kind.meta, "filename": name, "md5": md5} if name == "meta" else [(name, md5)]
        monkeypatch.setattr(kind, name if name == "meta" else f"{name}_list", value)
    monkeypatch.setattr(readers, "CIFAR_SIZES", (3 * classes, classes))


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar_pickles_and_folders_give_the_same_batches(root, monkeypatch, kind):
    write_cifar(root, kind, monkeypatch)
    rows = []
    for folder in (root, root / "folders"):
        train, val = build(kind.__name__.lower(), "--data_path", folder)
        parts = [(train.images, train.labels), epoch_of(val)[:2]]
        rows.append([sorted((i.numpy().tobytes(), int(n)) for i, n in zip(*part, strict=True)) for part in parts])
        assert train.class_names[-1] == f"name {train.num_classes - 1:02}" and train.mean == [0.4914, 0.4822, 0.4465]
    assert rows[0] == rows[1]


def test_data_that_is_damaged_or_missing_is_named_and_leaves_no_empty_folders(root, monkeypatch):
    write_cifar(root, CIFAR10, monkeypatch)
    for file in sorted((root / CIFAR10.base_folder).iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b"?")
        assert f"the checksum of {file} is wrong" in error_of("cifar10", root)
        file.write_bytes(content)
    shutil.copytree(root / "folders/train/name 03", root / "folders/train/name 04", dirs_exist_ok=True)
    assert "10 classes of 3 to 6 training and 1 test images of 32 x 32" in error_of("cifar10", root / "folders")
    for name in ("cifar10", "cifar100", "tinyimagenet"):
        assert "could not be fetched" in error_of(name, root / "new" / "er") and not (root / "new").exists()


def test_cache_is_used_unless_a_file_changed_or_it_is_damaged(root, monkeypatch, capsys):
    opened, original, cache = [], Image.open, root / readers.CACHE
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    before = readers.read_folder(root, 1, False).train.images
    assert len(opened) >= 12 and not opened.clear()
    assert (readers.read_folder(root, 1, False).train.images == before).all() and not opened
    file, facts = root / "train/a/0000.png", (root / "train/a/0000.png").stat()
    shutil.copyfile(root / "train/b/0001.png", file)  # of the same size, and given the same time
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    expected = readers.read_folder(root, 1, False).train.images
    assert file.stat().st_size == facts.st_size and (expected[0] == before[3]).all()

    good = cache.read_bytes()
    damaged = [b"", good[:-1], good[: len(good) // 2], bytes(len(good)), b"\x93NUMPY\1\0"]
    for i in (*range(400), *range(400, len(good) - 400, 997), *range(len(good) - 400, len(good))):
        damaged.append(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
    for content in damaged:
        cache.write_bytes(content)
        assert (readers.read_folder(root, 1, read_only=True).train.images == expected).all()
        assert cache.read_bytes() == content
    cache.unlink()
    cache.mkdir()  # so that it cannot be written
    (root / "decoded-other.npz").touch()
    assert (readers.read_folder(root, 1, False).train.images == expected).all()
    assert f"note: {cache} cannot be written" in capsys.readouterr().err
    assert sorted(os.listdir(root)) == [readers.CACHE, "decoded-other.npz", "test", "train"]


def test_two_runs_start_at_once_in_a_directory_with_packages_of_the_same_names(root, tmp_path):
    for package in ("data", "utils", "models", "loss"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('imported from the working directory')")
    main = Path(data.__file__).resolve().parents[1] / "main.py"
    command = [sys.executable, main, "--data_type=folder", "--data_path=set", "--width=1", "--end_epoch=1"]
    runs = [subprocess.Popen([*command, "--device=cpu", f"--run_name={n}"], cwd=tmp_path) for n in (1, 2)]
    assert [run.wait(300) for run in runs] == [0, 0]
    assert sorted(os.listdir(root)) == [readers.CACHE, "test", "train"]
