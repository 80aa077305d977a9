"""The loaders' contract on small arrays, and the readers on small trees of files, good and bad."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import urllib.error
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as reference

import data
from data import augment, cifar100, files, loader, synthetic, tiny_imagenet
from data.files import Split
from utils import distributed
from utils.errors import UserError


def options(**changes):
    """What the parser gives: the defaults, on a data set of this file's own."""
    plain = dict(
        data_type="synthetic",
        data_path="unused",
        image_size=None,
        batch_size=16,
        seed=4,
        workers=1,
        classes=None,
        val_split=None,
        limit_train=None,
        limit_val=None,
    )
    return SimpleNamespace(**plain | changes)


def some_images(num, height=32, width=32, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (num, height, width, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    """Both are 70 + 30 images of 10 classes, those of `tinyimagenet` with 48 x 64 pixels."""

    def replace(name, height, width, seed):
        train = Split(some_images(70, height, width, seed), np.arange(70) * 3 % 10)
        test = Split(some_images(30, height, width, seed + 1), np.arange(30) * 7 % 10)
        names = [f"class {label}" for label in range(10)]
        monkeypatch.setitem(
            data.DATASETS,
            name,
            data.DATASETS[name]._replace(num_classes=10, read=lambda root, workers: (train, test, names)),
        )
        return train, test

    replace("tinyimagenet", 48, 64, 2)
    return replace("synthetic", 32, 32, 0)


def normalised(pictures, name="synthetic"):
    """(n, 3, S, S) uint8 -> what the network sees, by the definition."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in data.DATASETS[name][2:4])
    return (pictures / 255 - mean) / std


def whole(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


# ---- what iterating gives


@pytest.mark.parametrize("name", ["synthetic", "tinyimagenet"])
def test_batches_keep_the_contract(name):
    for part in data.build_loaders(options(data_type=name), "cpu"):
        num = {True: 70, False: 30}[part.augmentation is not None]
        batches = list(part)
        assert [len(labels) for _, labels, _ in batches] == ([30] if num == 30 else [16, 16, 16, 16, 6])
        assert len(batches) == len(part) and part.num_samples == num and part.num_classes == 10
        assert part.class_names == [f"class {label}" for label in range(10)]
        for images, labels, index in batches:
            assert images.shape == (len(index), 3, 32, 32) and images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.dtype == index.dtype == torch.int64 and labels.shape == index.shape
            assert torch.equal(labels, part.labels[index])
        assert torch.equal(whole(batches)[2].sort().values, torch.arange(num))  # each once, the last ones too


def test_validation_is_the_test_split_in_order_without_augmentation(small_sets):
    _, test = small_sets
    _, val = data.build_loaders(options(), "cpu")
    images, labels, index = whole(val)
    assert torch.equal(index, torch.arange(30)) and torch.equal(labels, torch.from_numpy(test.labels))
    torch.testing.assert_close(images, normalised(torch.from_numpy(test.images).permute(0, 3, 1, 2)))


@pytest.mark.parametrize("size, batches", [(32, [512, 88]), (64, [128] * 4 + [88]), (16, [600])])
def test_evaluation_batches_have_equal_areas(monkeypatch, size, batches):
    split = Split(some_images(600, 8, 8), np.zeros(600, dtype=np.int64))
    part = loader.Loader(split, ["one"], (0, 0, 0), (1, 1, 1), size, torch.device("cpu"))
    assert [len(index) for *_, index in part] == batches


def test_training_images_are_crops_of_their_own_rows():
    train, _ = data.build_loaders(options(), "cpu")
    places = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    seen = set()
    for images, _, index in train:
        for image, row in zip(train.denormalise(images), index, strict=True):
            every = augment.crop(train.images[row].expand(162, 32, 32, 3), places, 32)
            match = (every.permute(0, 3, 1, 2) == image).flatten(1).all(dim=1).nonzero()
            seen.add(match.item())  # one place, of the 162 that there are
    assert len(seen) > 40


def test_resized_crops_see_the_files_own_pixels():
    train, val = data.build_loaders(options(data_type="tinyimagenet"), "cpu")
    assert train.images.shape == (70, 48, 64, 3) and val.images.shape == (30, 32, 32, 3)
    # With the box being the whole image, training shows it as validation would.
    box = torch.tensor([[0, 0, 48, 64, 0]]).expand(70, 5)
    shown = augment.resized_crop(train.images, box, 32).permute(0, 3, 1, 2)
    torch.testing.assert_close(train.pictures(torch.arange(70)).float(), shown, rtol=0, atol=1.01)


@pytest.mark.parametrize("name", ["synthetic", "tinyimagenet"])
def test_an_epoch_is_a_function_of_seed_and_number(name):
    def epoch(number, seed=4, warm_up=0):
        train, _ = data.build_loaders(options(data_type=name, seed=seed), "cpu")
        for other in range(warm_up):
            train.set_epoch(other)
            list(train)
        if number is not None:
            train.set_epoch(number)
        return whole(train)

    first = epoch(0)
    assert all(map(torch.equal, first, epoch(None)))  # no call means epoch 0
    assert all(map(torch.equal, epoch(3), epoch(3, warm_up=2)))  # whatever came before
    for other in (epoch(1), epoch(0, seed=5)):
        assert not torch.equal(first[2], other[2])
        undo, undo_other = first[2].argsort(), other[2].argsort()
        assert not torch.equal(first[0][undo], other[0][undo_other])  # the augmentation, not just the order
    train, _ = data.build_loaders(options(data_type=name), "cpu")
    assert all(map(torch.equal, whole(train), whole(train)))  # twice the same


@pytest.mark.parametrize("name", ["synthetic", "tinyimagenet"])
def test_the_size_of_a_chunk_changes_nothing(name):
    train, _ = data.build_loaders(options(data_type=name), "cpu")
    together = whole(train)
    for pixels in (3 * 16 * 32 * 32, loader.CHUNK_PIXELS):
        train.chunk_pixels = pixels
        for one, other in zip(together, whole(train), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["synthetic", "tinyimagenet"])
def test_iterating_never_waits_for_the_device(monkeypatch, name):
    # The meta device has shapes and no values: whatever needs a value on the host fails there.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    for part in data.build_loaders(options(data_type=name), "meta"):
        assert sum(len(index) for *_, index in part) == part.num_samples


@pytest.mark.parametrize("size", [16, 48])
def test_another_image_size_is_a_resized_split(small_sets, size):
    _, test = small_sets
    train, val = data.build_loaders(options(image_size=size), "cpu")
    pictures = torch.from_numpy(test.images).permute(0, 3, 1, 2)
    expected = reference.resize(pictures, [size, size], antialias=True)
    found = val.pictures(torch.arange(30))
    # Within a level: of bytes, PyTorch 2.4 cuts off what its torchvision rounds.
    assert (found.int() - expected.int()).abs().max() <= 1
    torch.testing.assert_close(whole(val)[0], normalised(found))
    assert whole(train)[0].shape == (70, 3, size, size)


def test_pictures_and_denormalise_are_uint8(small_sets):
    _, test = small_sets
    _, val = data.build_loaders(options(), "cpu")
    images, *_ = next(iter(val))
    chosen = torch.tensor([5, 2])
    expected = torch.from_numpy(test.images).permute(0, 3, 1, 2)
    assert torch.equal(val.pictures(chosen), expected[chosen])
    assert val.denormalise(images).dtype == torch.uint8 and torch.equal(val.denormalise(images), expected)


# ---- which images


def test_first_of_each_class_takes_turns():
    labels = np.array([2, 2, 0, 1, 2, 0, 2])
    for limit, rows in {
        1: [2],
        2: [2, 3],
        3: [0, 2, 3],
        4: [0, 2, 3, 5],
        5: [0, 1, 2, 3, 5],
        6: [0, 1, 2, 3, 4, 5],
        7: [*range(7)],
        8: [*range(7)],
        None: [*range(7)],
    }.items():
        assert data.first_of_each_class(labels, limit).tolist() == rows, limit


@pytest.mark.parametrize(
    "changes, num_train, num_val, num_test",
    [
        ({}, 70, 30, 30),
        ({"classes": 4}, 28, 12, 12),
        ({"limit_train": 25, "limit_val": 11}, 25, 11, 11),
        ({"limit_train": 999, "limit_val": 999}, 70, 30, 30),
        ({"val_split": 0.3}, 50, 20, 30),  # 2.1 of 7 is 2
        ({"val_split": 0.01}, 60, 10, 30),  # at least one of each class
        ({"classes": 4, "val_split": 0.3, "limit_train": 17, "limit_val": 7}, 17, 7, 7),
    ],
)
def test_options_choose_the_images(small_sets, changes, num_train, num_val, num_test):
    train_split, test_split = small_sets
    num_classes = changes.get("classes", 10)
    train, val = data.build_loaders(options(**changes), "cpu")
    test = data.build_loaders(options(**changes), "cpu", split="test")
    origin = {image.tobytes(): row for row, image in enumerate(train_split.images)}
    origin |= {image.tobytes(): 100 + row for row, image in enumerate(test_split.images)}
    rows = {}
    for name, part, num in (("train", train, num_train), ("val", val, num_val), ("test", test, num_test)):
        rows[name] = [origin[image.numpy().tobytes()] for image in part.images]
        counts = torch.bincount(part.labels, minlength=num_classes)
        assert part.num_samples == len(rows[name]) == num and part.num_classes == num_classes
        assert len(counts) == num_classes and counts.max() - counts.min() <= 1
        assert rows[name] == sorted(rows[name])  # file order
        split, first = (train_split, 0) if rows[name][0] < 100 else (test_split, 100)
        assert part.labels.tolist() == [split.labels[row - first] for row in rows[name]]
        assert part.class_names == [f"class {label}" for label in range(num_classes)]
    assert not set(rows["train"]) & set(rows["val"])
    assert min(rows["test"]) >= 100 and (
        max(rows["val"]) < 100 if "val_split" in changes else rows["val"] == rows["test"]
    )


def test_held_out_images_follow_the_seed_alone():
    labels = np.arange(1000) % 10
    first = data.hold_out(labels, 0.1, seed=4)
    assert np.bincount(labels[first]).tolist() == [10] * 10
    assert (first == data.hold_out(labels, 0.1, seed=4)).all()
    assert (first != data.hold_out(labels, 0.1, seed=5)).any()
    assert len(set(np.flatnonzero(first) // 10)) > 40  # not the same images of every class
    whole_set = data.build_loaders(options(val_split=0.3), "cpu")[0]
    limited = data.build_loaders(options(val_split=0.3, limit_train=20, limit_val=5), "cpu")[0]
    assert torch.equal(limited.images[0], whole_set.images[0])  # limits choose among what is held out before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"classes": 11}, ["--classes 11", "synthetic", "10 classes"]),
        ({"val_split": 0.95}, ["--val_split 0.95", "class 0"]),
    ],
)
def test_options_that_the_data_cannot_meet(changes, words):
    with pytest.raises(UserError) as caught:
        data.build_loaders(options(**changes), "cpu")
    assert all(word in str(caught.value) for word in words)


# ---- several processes


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


def test_processes_share_every_batch_and_draw_the_same_numbers(monkeypatch):
    alone = [list(part) for part in data.build_loaders(options(), "cpu")]
    shares = []
    for rank in range(4):
        as_rank(monkeypatch, rank, 4)
        parts = data.build_loaders(options(), "cpu")
        assert [part.num_samples for part in parts] == [70, 30]
        shares.append([list(part) for part in parts])
        assert [len(part) for part in parts] == [len(batches) for batches in shares[-1]]
    for number, batch in enumerate(alone[0]):  # training: every batch, cut in four
        parts = [share[0][number] for share in shares]
        assert all(map(torch.equal, whole(parts), batch))
        assert {len(index) for *_, index in parts} == ({4} if number < 4 else {2, 1})
    parts = [whole(share[1]) for share in shares]  # validation: the split, cut in four
    assert all(map(torch.equal, whole(parts), whole(alone[1])))
    assert [len(index) for *_, index in parts] == [8, 8, 7, 7]


def test_a_batch_with_fewer_images_than_processes(monkeypatch):
    as_rank(monkeypatch, 0, 8)
    with pytest.raises(UserError, match=r"holds 6 of 70 .* 8 processes: .*--batch_size \(16\) or --limit_tr"):
        data.build_loaders(options(), "cpu")
    data.build_loaders(options(limit_train=64), "cpu")


# ---- synthetic


@pytest.fixture(scope="session")
def synthetic_set():
    return synthetic.read(Path("unused"), 1)


def test_synthetic_is_balanced_and_fixed(synthetic_set):
    train, test, names = synthetic_set
    for split, num in ((train, 100), (test, 20)):
        assert split.images.shape == (100 * num, 32, 32, 3) and split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64 and np.bincount(split.labels).tolist() == [num] * 100
    assert len(set(names)) == 100
    again = synthetic._draw(train.labels[: synthetic.CHUNK], np.random.RandomState(synthetic.SEED))
    assert (again == train.images[: synthetic.CHUNK]).all()
    assert len({image.tobytes() for split in (train, test) for image in split.images}) == 12_000
    row = data.DATASETS["synthetic"]
    np.testing.assert_allclose(train.images.mean((0, 1, 2)) / 255, row.mean, atol=0.002)
    np.testing.assert_allclose(train.images.std((0, 1, 2)) / 255, row.std, atol=0.002)


def test_synthetic_does_not_know_left_from_right(synthetic_set):
    train, _, _ = synthetic_set
    mean = train.images.mean(axis=(0, 3))  # each place has a deviation of about 45 / sqrt(10,000) levels
    assert np.abs(mean - mean[:, ::-1]).mean() < 0.6


# ---- CIFAR-100


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    for name in ("_get_redirect_url", "_urlretrieve"):
        monkeypatch.setattr(torchvision.datasets.utils, name, refuse)


@contextlib.contextmanager
def read_only(folder):
    """A copy of `folder` that this process cannot write in, as root neither."""
    top = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(folder, top / folder.name)
        for path in [top, *top.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            os.seteuid(65534)
        yield top / folder.name
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for path in [top, *top.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(top)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """Files in CIFAR-100's format, of 6 + 4 images, whose checksums torchvision is told to expect."""
    folder = tmp_path / "cifar" / "cifar-100-python"
    folder.mkdir(parents=True)
    meta = {"fine_label_names": [f"name {label}" for label in range(100)]}
    train = {"data": some_images(6).reshape(6, -1), "fine_labels": [5, 4, 3, 2, 1, 99]}
    test = {"data": some_images(4).reshape(4, -1), "fine_labels": [0] * 4}
    for name, content in {"train": train, "test": test, "meta": meta}.items():
        (folder / name).write_bytes(pickle.dumps(content))
        entry = [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
        if name == "meta":
            monkeypatch.setattr(
                cifar100.CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": entry[1]}
            )
        else:
            monkeypatch.setattr(cifar100.CIFAR100, f"{name}_list", [entry])
    return folder.parent


def test_cifar_is_read_where_nothing_can_be_written(small_cifar, no_network):
    with read_only(small_cifar) as folder:
        train, test, names = cifar100.read(folder, 1)
    assert train.images.shape == (6, 32, 32, 3) and test.images.shape == (4, 32, 32, 3)
    assert (train.images.transpose(0, 3, 1, 2).reshape(6, -1) == some_images(6).reshape(6, -1)).all()
    assert train.labels.tolist() == [5, 4, 3, 2, 1, 99] and train.labels.dtype == np.int64
    assert names[99] == "name 99"


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: shutil.rmtree(root),
        lambda root: (root / "cifar-100-python" / "test").unlink(),
        lambda root: (root / "cifar-100-python" / "train").write_bytes(b"half"),
        lambda root: (root / "cifar-100-python").rename(root / "cifar-100-python.tar.gz"),
        lambda root: [shutil.rmtree(root), root.write_text("a file where the folder should be")],
    ],
    ids=["nothing", "no test file", "damaged train file", "no archive", "not a folder"],
)
def test_cifar_that_cannot_be_fetched(small_cifar, no_network, capfd, damage):
    damage(small_cifar)
    with pytest.raises(UserError) as caught:
        cifar100.read(small_cifar, 1)
    message = str(caught.value)
    assert "cifar-100-python.tar.gz" in message and str(small_cifar) in message and "\n" not in message
    assert "--data_type synthetic" in message
    assert capfd.readouterr() == ("", "")  # the one line is all there is to read


# ---- Tiny-ImageNet

WNIDS = [f"n{number:08d}" for number in range(1000, 1200)]
TRAIN, VAL = f"train/{WNIDS[7]}/images/{WNIDS[7]}_2.JPEG", "val/images/val_7.JPEG"
NOTES = "val/val_annotations.txt"


def colour(*numbers):
    """One colour for each tuple of numbers."""
    return tuple(hashlib.md5(repr(numbers).encode()).digest()[:3])


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The official layout: 2 + 1 plain images of 20 x 16 for each class, stored without loss."""
    top = tmp_path_factory.mktemp("data") / "tiny-imagenet-200"
    (top / "val" / "images").mkdir(parents=True)
    (top / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (top / "words.txt").write_text("".join(f"{wnid}\tname {wnid}, other name\n" for wnid in WNIDS[:-1]))
    for label, wnid in enumerate(WNIDS):
        folder = top / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for number in (10, 2):
            Image.new("RGB", (20, 16), colour(label, number)).save(folder / f"{wnid}_{number}.JPEG", "png")
        (folder.parent / f"{wnid}_boxes.txt").write_text(
            "".join(f"{wnid}_{number}.JPEG\t0\t0\t19\t15\n" for number in (10, 2))
        )
        Image.new("RGB", (20, 16), colour(label)).save(top / "val" / "images" / f"val_{label}.JPEG", "png")
    (top / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{label}.JPEG\t{WNIDS[label]}\t0\t0\t19\t15\n" for label in reversed(range(200)))
    )
    return top


@pytest.fixture
def own_tree(tree, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(tree, tmp_path / "tiny-imagenet-200"))


def caches(folder):
    return sorted(path.name for path in folder.glob("*decoded*"))


@pytest.mark.parametrize("inside", [True, False])
def test_tiny_imagenet_is_read_in_order(own_tree, inside):
    train, val, names = tiny_imagenet.read(own_tree if inside else own_tree.parent, 1)
    assert train.images.shape == (400, 16, 20, 3) and val.images.shape == (200, 16, 20, 3)
    assert train.labels.tolist() == [label for label in range(200) for _ in range(2)]
    assert val.labels.tolist() == list(reversed(range(200)))  # the annotations' order
    for row in (0, 1, 2, 399):  # 2 before 10
        assert (train.images[row] == colour(row // 2, 10 if row % 2 else 2)).all()
    assert (val.images[0] == colour(199)).all() and (val.images[199] == colour(0)).all()
    assert names[0] == f"name {WNIDS[0]}" and names[199] == WNIDS[199]
    assert train.labels.dtype == val.labels.dtype == np.int64


def test_optional_files_and_strangers_do_not_matter(own_tree):
    before = tiny_imagenet.read(own_tree, 1)
    (own_tree / "words.txt").unlink()
    (own_tree / "train" / WNIDS[3] / f"{WNIDS[3]}_boxes.txt").unlink()
    (own_tree / "train" / WNIDS[3] / "images" / ".hidden.JPEG").write_text("not an image")
    (own_tree / "train" / "n99999999").mkdir()
    after = tiny_imagenet.read(own_tree, 1)
    assert (before[0].images == after[0].images).all() and after[2] == WNIDS


def test_processes_decode_as_one_does(own_tree):
    files_ = sorted(str(path) for path in own_tree.rglob("*.JPEG"))
    assert (tiny_imagenet._decode(files_, 2) == tiny_imagenet._decode(files_, 0)).all()
    Path(files_[300]).write_text("no image")
    with pytest.raises(UserError, match=Path(files_[300]).name):
        tiny_imagenet._decode(files_, 2)
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, context, tiny_imagenet._start_worker) as pool:  # interrupts are the parent's
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def decodes(monkeypatch):
    """A list that grows by one with each decoding."""
    calls, decode = [], tiny_imagenet._decode
    monkeypatch.setattr(tiny_imagenet, "_decode", lambda *args: calls.append(1) or decode(*args))
    return calls


@pytest.mark.parametrize(
    "change, anew",
    [
        (lambda folder, cache: None, False),
        (lambda folder, cache: os.utime(folder / TRAIN, (1, 1)), True),
        (lambda folder, cache: (folder / "train" / WNIDS[5] / f"{WNIDS[5]}_boxes.txt").unlink(), False),
        (
            lambda folder, cache: shutil.copy(
                folder / "val" / "images" / "val_1.JPEG", folder / "train" / WNIDS[5] / "images" / "new.JPEG"
            ),
            True,
        ),
        (
            lambda folder, cache: [
                (folder / TRAIN).parent.with_name(f"{WNIDS[7]}_boxes.txt").unlink(),
                (folder / TRAIN).rename((folder / TRAIN).with_name("3.JPEG")),
            ],
            True,
        ),
        (lambda folder, cache: cache.write_bytes(cache.read_bytes()[:-1]), True),
        (lambda folder, cache: cache.write_bytes(b""), True),
        (lambda folder, cache: cache.write_bytes(b"x" * 10 + cache.read_bytes()[10:]), True),
        (lambda folder, cache: cache.write_bytes(cache.read_bytes().replace(b"'shape'", b"'sh(pe'")), True),
        (lambda folder, cache: np.save(cache, some_images(599, 16, 20)), True),
        (lambda folder, cache: np.save(cache, np.zeros((600, 16, 20, 3))), True),
        (lambda folder, cache: np.save(cache, np.zeros((600, 3), np.uint8)), True),
    ],
    ids=["same", "time", "boxes", "image", "name", "short", "empty", "magic", "header", "count", "type", "axes"],
)
def test_cache_is_used_while_it_is_good(own_tree, monkeypatch, change, anew):
    calls = decodes(monkeypatch)
    first = tiny_imagenet.read(own_tree, 1)
    (cache,) = (own_tree / name for name in caches(own_tree))
    images = [np.array(first[0].images), np.array(first[1].images)]
    change(own_tree, cache)
    again = tiny_imagenet.read(own_tree.parent, 1)
    assert len(calls) == 1 + anew and len(caches(own_tree)) == 1  # older ones are gone
    assert (again[0].images[:2] == images[0][:2]).all() and (again[1].images == images[1]).all()


def test_data_that_cannot_be_written_is_decoded_in_memory(tree, capfd):
    with read_only(tree) as folder:
        train, _, _ = tiny_imagenet.read(folder, 1)
        assert caches(folder) == []
    assert (train.images[0] == colour(0, 2)).all()
    (line,) = capfd.readouterr().err.splitlines()
    assert str(folder) in line and "cache" in line


def test_a_full_disk_leaves_no_half_cache(own_tree, monkeypatch, capfd):
    def save(file, images):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    train, _, _ = tiny_imagenet.read(own_tree, 1)
    assert len(train.images) == 400 and caches(own_tree) == []
    assert "No space left" in capfd.readouterr().err


def test_of_two_runs_one_decodes_and_the_other_waits(own_tree, monkeypatch):
    calls, lines, waits = decodes(monkeypatch), [], threading.Event()
    tiny_imagenet.read(own_tree, 1)
    (cache,) = (own_tree / name for name in caches(own_tree))
    cache.rename(own_tree / "hidden")
    monkeypatch.setattr(files, "say", lambda line: (lines.append(line), waits.set()))
    second = threading.Thread(target=tiny_imagenet.read, args=(own_tree, 1))
    with files.alone(own_tree):  # as the first run does while it decodes
        second.start()
        assert waits.wait(30)
        second.join(0.5)  # time enough to go wrong in
        assert second.is_alive()
        (own_tree / "hidden").rename(cache)
    second.join(30)
    assert not second.is_alive() and len(calls) == 1
    assert len(lines) == 1 and "waiting" in lines[0] and str(own_tree) in lines[0]


GREY16 = Image.fromarray(np.full((16, 20), 0x8000, dtype=np.uint16))


@pytest.mark.parametrize(
    "image, kind, expected",
    [
        (Image.new("L", (20, 16), 77), "png", (77, 77, 77)),
        (Image.new("L", (20, 16), 77), "jpeg", (77, 77, 77)),
        (Image.new("1", (20, 16), 1), "png", (255, 255, 255)),
        (Image.new("LA", (20, 16), (77, 255)), "png", (77, 77, 77)),
        (Image.new("RGBA", (20, 16), (10, 20, 30, 255)), "png", (10, 20, 30)),
        (Image.new("RGB", (20, 16), (10, 20, 30)).quantize(4), "png", (10, 20, 30)),
        (Image.new("CMYK", (20, 16), (0, 255, 255, 0)), "jpeg", (255, 0, 0)),
        (GREY16, "png", (128, 128, 128)),
        (Image.new("RGB", (1, 1), (10, 20, 30)), "png", (10, 20, 30)),
        (Image.new("RGB", (57, 3), (10, 20, 30)), "png", (10, 20, 30)),
    ],
    ids=["grey", "jpeg", "bilevel", "grey alpha", "alpha", "palette", "cmyk", "16 bit", "1 x 1", "57 x 3"],
)
def test_images_of_every_kind_become_rgb(tmp_path, image, kind, expected):
    image.save(tmp_path / "image.JPEG", kind)
    pixels = tiny_imagenet._pixels(str(tmp_path / "image.JPEG"), 20, 16)
    assert pixels.shape == (16, 20, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 2  # JPEG's rounding


def rewrite(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda t: (t / "wnids.txt").unlink(), ["wnids.txt"]),
        (lambda t: rewrite(t / "wnids.txt", WNIDS[7] + "\n", ""), ["wnids.txt", "199", "200"]),
        (lambda t: rewrite(t / "wnids.txt", WNIDS[7], WNIDS[8]), ["wnids.txt", "199"]),
        (lambda t: shutil.rmtree(t / "train"), ["train"]),
        (lambda t: shutil.rmtree(t / "val"), ["val"]),
        (lambda t: shutil.rmtree(t / "train" / WNIDS[7]), [WNIDS[7]]),
        (lambda t: [path.unlink() for path in (t / TRAIN).parent.iterdir()], [WNIDS[7], "no image"]),
        (lambda t: (t / TRAIN).unlink(), [TRAIN, "boxes"]),
        (lambda t: (t / TRAIN).write_text("no image"), [TRAIN]),
        (lambda t: (t / TRAIN).write_bytes((t / TRAIN).read_bytes()[:45]), [TRAIN]),
        (lambda t: (t / TRAIN).write_bytes(b""), [TRAIN]),
        (lambda t: (t / VAL).unlink(), [VAL]),
        (lambda t: (t / NOTES).unlink(), [NOTES]),
        (lambda t: (t / NOTES).write_text(""), ["val_0.JPEG", NOTES]),
        (lambda t: rewrite(t / NOTES, "val_7.J", "val_8.J"), ["val_8.JPEG", "twice"]),
        (lambda t: rewrite(t / NOTES, f"\t{WNIDS[7]}", "\tn12345678"), ["val_7.JPEG", "n12345678"]),
        (lambda t: rewrite(t / NOTES, f"\t{WNIDS[7]}\t0\t0\t19\t15", ""), ["val_7.JPEG", "''"]),
        (lambda t: shutil.copy(t / VAL, t / "val" / "images" / "val_200.JPEG"), ["val_200.JPEG", "no class"]),
    ],
)
def test_a_damaged_tree_is_named(own_tree, no_network, damage, words):
    damage(own_tree)
    with pytest.raises(UserError) as caught:
        tiny_imagenet.read(own_tree, 1)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert caches(own_tree) == []


@pytest.fixture
def archive(tree, tmp_path, monkeypatch):
    """The tree as an archive that a patched network delivers; its checksum is the expected one."""
    path = Path(shutil.make_archive(tmp_path / "archive", "zip", tree.parent, tree.name))
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    network = torchvision.datasets.utils
    monkeypatch.setattr(network, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(network, "_urlretrieve", lambda url, target: shutil.copy(path, target))
    return path


@pytest.mark.parametrize("where", ["new", "new/tiny-imagenet-200"])
def test_tiny_imagenet_is_fetched_where_there_is_none(archive, tmp_path, where):
    train, _, _ = tiny_imagenet.read(tmp_path / where, 1)
    assert len(train.images) == 400
    assert sorted(os.listdir(tmp_path / "new")) == [".lock", "tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_an_interrupted_extraction_leaves_no_folder(archive, tmp_path, monkeypatch):
    def half(archive, target):
        (Path(target) / "tiny-imagenet-200" / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_imagenet, "extract_archive", half)
    with pytest.raises(KeyboardInterrupt):
        tiny_imagenet.read(tmp_path / "new", 1)
    assert sorted(os.listdir(tmp_path / "new")) == [".lock", "tiny-imagenet-200.zip"]


@pytest.mark.parametrize("half", [False, True])
def test_tiny_imagenet_that_cannot_be_fetched(archive, no_network, tmp_path, capfd, half):
    root = tmp_path / "new"
    root.mkdir()
    if half:
        (root / "tiny-imagenet-200.zip").write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        tiny_imagenet.read(root, 1)
    message = str(caught.value)
    assert "tiny-imagenet-200.zip" in message and str(root) in message and "\n" not in message
    assert "no route to host" in message and "--data_type synthetic" in message
    assert capfd.readouterr() == ("", "") and not (root / "tiny-imagenet-200").exists()


def test_an_archive_put_there_by_hand_is_unpacked(archive, no_network, tmp_path):
    (tmp_path / "new").mkdir()
    archive.rename(tmp_path / "new" / "tiny-imagenet-200.zip")
    assert len(tiny_imagenet.read(tmp_path / "new", 1)[1].images) == 200


def test_downloads_are_quiet_unless_watched_and_fail_in_one_line(tmp_path, monkeypatch):
    for watched, expected in ((True, "bar"), (False, "")):
        terminal = io.StringIO()
        terminal.isatty = lambda watched=watched: watched
        monkeypatch.setattr(sys, "stderr", terminal)
        with files.fetching(tmp_path, "archive", "put it there"):
            print("bar", end="", file=sys.stderr)
        assert terminal.getvalue() == expected
    with (
        pytest.raises(UserError, match=r"archive .* \(two lines\): put it there"),
        files.fetching(tmp_path, "archive", "put it there"),
    ):
        raise RuntimeError("two\nlines")
