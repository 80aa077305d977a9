"""Which images the loaders give, in which order, and how they share them among processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build, random_images
from torchvision.transforms.v2 import functional as reference

import data
from data import augment, loader, readers, synthetic
from data.images import ReadOptions
from utils.errors import UserError


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
    for part, sizes in zip(build("--image_size", size), ([16, 16, 16, 16, 6], [30]), strict=True):
        images, labels, index = epoch_of(part)
        assert [len(labels) for _, labels, _ in part] == sizes and part.num_samples == sum(sizes)
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _, _ in part)
        assert images.dtype == torch.float32 and images.shape == (sum(sizes), 3, size, size)
        assert part.images.shape[1] == (32 if part.augmentation == "resized_crop" else size)  # crops before resizing
        assert torch.equal(index.sort().values, torch.arange(sum(sizes))) and torch.equal(labels, part.labels[index])
        torch.testing.assert_close(images[:, :, 8, 8], (part.images[index, 0, 0] / 255 - 0.5) / 0.25)
        assert torch.equal(part.denormalise(images)[:, :, 8, 8], part.raw_images(index)[:, :, 8, 8])
    assert torch.equal(index, torch.arange(30))  # validation is in file order


def test_order_and_augmentation_stay_as_they_were(small_set):
    train, _ = build("--seed", 4)
    train.set_epoch(3)
    images, _, index = epoch_of(train)
    assert index[:8].tolist() == [41, 22, 39, 48, 29, 64, 31, 51]  # recorded, for published results depend on it
    levels = {"crop": [72, 227, 168, 84, 103, 243, 88, 122], "resized_crop": [33, 146, 93, 166, 30, 231, 83, 24]}
    assert train.denormalise(images)[:8, 0, 9, 9].tolist() == pytest.approx(levels[train.augmentation], abs=1)


def test_order_and_augmentation_are_functions_of_seed_and_epoch(small_set):
    def last_of(*epochs, seed=4, chunk_pixels=0):
        train, _ = build("--seed", seed)
        train.chunk_pixels = chunk_pixels  # augmented at once
        for epoch in epochs:
            train.set_epoch(epoch)
            batches = epoch_of(train)
        return batches

    small_set.train.images[:] = small_set.train.images[:1]  # so that an image shows how it was augmented
    first, other = last_of(0), last_of(3)
    assert all(map(torch.equal, other, last_of(0, 1, 3))) and len(first[0].unique(dim=0)) > 40
    for chunk_pixels in (3 * 16 * 32 * 32, loader.CHUNK_PIXELS):
        torch.testing.assert_close(last_of(3, chunk_pixels=chunk_pixels), other, rtol=0, atol=1e-4)
    for different in (other, last_of(0, seed=5)):
        assert not torch.equal(first[2], different[2])
        by_row = [images[index.argsort()] for images, _, index in (first, different)]
        for a, b in (by_row, (first[0], different[0])):
            assert (a == b).flatten(1).all(dim=1).float().mean() < 0.2


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_of_the_processes_make_up_every_batch(small_set, monkeypatch, world_size):
    single, shards = [list(part) for part in build()], []
    monkeypatch.setattr("utils.distributed.local_rank_0_first", lambda make: make())
    monkeypatch.setattr("utils.distributed.world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr("utils.distributed.rank", lambda rank=rank: rank)
        shards.append([list(part) for part in build()])
    for part in (0, 1):  # training and validation
        for number, batch in enumerate(single[part]):
            parts = [shard[part][number] for shard in shards]
            torch.testing.assert_close(epoch_of(parts), list(batch), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=f"holds 1 of 49 images, fewer than the {world_size} processes"):
        build("--limit_train", 49)


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
    for part in (*build(*words), build(*words, split="test")):
        rows.append([row_of[image.numpy().tobytes()] for image in part.images])
        assert rows[-1] == sorted(rows[-1]) and part.labels.tolist() == labels[rows[-1]].tolist()
        counts = torch.bincount(part.labels)
        assert len(counts) == part.num_classes == len(part.class_names) and counts.max() - counts.min() <= 1
    train, val, test = rows
    assert (len(train), len(val), len(test)) == sizes and not set(train) & set(val) and min(test) >= 70
    assert max(val) < 70 if "--val_split" in words else val == test


def test_limit_takes_the_first_of_each_class():
    labels = np.array([2, 2, 0, 1, 2, 0, 2])
    images = np.arange(7, dtype=np.uint8)[:, None, None, None]
    split = readers.Split(images, labels)
    for limit, rows in {1: [2], 2: [2, 3], 3: [0, 2, 3], 4: [0, 2, 3, 5], 5: [0, 1, 2, 3, 5], 9: [*range(7)]}.items():
        assert split.first_of_each_class(limit).images[:, 0, 0, 0].tolist() == rows


def test_held_out_images_depend_on_the_seed(small_set):
    one, same, other = (build("--val_split", 0.3, "--seed", seed)[1].images for seed in (4, 4, 5))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_synthetic_set_is_fixed_balanced_and_learnable(monkeypatch):
    monkeypatch.setattr(synthetic, "TRAIN_PER_CLASS", 20)
    train, test, names = synthetic.read(Path(), ReadOptions(32))
    assert len(set(names)) == 100 and np.bincount(test.labels).tolist() == [20] * 100
    means = [split.images.mean(axis=(0, 1, 2)) / 255 for split in (train, test)]  # recorded from another process
    recorded = [[0.491848325, 0.497606051, 0.498882531], [0.502224489, 0.500864252, 0.500336045]]
    np.testing.assert_allclose(means, recorded, atol=1e-6)
    spectra = [np.abs(np.fft.fft(split.images.mean(axis=3) - 128)).mean(axis=1)[:, :17] for split in (train, test)]
    weights = np.linalg.lstsq(spectra[0], np.eye(10)[train.labels % 10], rcond=None)[0]
    assert ((spectra[1] @ weights).argmax(axis=1) == test.labels % 10).mean() > 0.3  # rings' widths; chance is 0.1
