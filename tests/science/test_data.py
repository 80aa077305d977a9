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
from utils.launch import World


def split_of(num):
    labels = np.arange(num) * 3 % 10
    return readers.Split(random_images(num), labels)


@pytest.fixture(params=augment.KINDS)
def small_set(request, monkeypatch):
    """70 + 30 images of 10 classes in the place of the synthetic ones, with each kind of augmentation."""
    names = [f"class {label}" for label in range(10)]
    images = readers.Images({"train": split_of(70), "test": split_of(30)}, names)
    row = data.DATASETS["synthetic"]
    row = row._replace(num_classes=10, augmentation=request.param, read=lambda *_: images)
    monkeypatch.setitem(data.DATASETS, "synthetic", row)
    return images


def join(batches):
    """Images, labels and index of all batches."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("size", [16, 32, 64])
def test_resize_has_torchvisions_pixels(size):
    images = torch.from_numpy(random_images(30))
    resized = loader.resize(images, size).permute(0, 3, 1, 2)
    expected = reference.resize(images.permute(0, 3, 1, 2), [size, size])
    difference = resized.int() - expected.int()
    assert difference.abs().max() <= 1  # PyTorch 2.4 does not round


@pytest.fixture(params=[16, 32, 64])
def size(request):
    return request.param


@pytest.fixture
def one_colour(small_set, size):
    """Loaders of images that are of one colour each, which cropping and flipping leave in the middle."""
    for split in small_set.splits.values():
        split.images[:] = split.images[:, :1, :1]
    return build("--image_size", size)


def test_batches_hold_every_row_once_under_its_index(one_colour):
    for part, sizes in zip(one_colour, ([16, 16, 16, 16, 6], [30]), strict=True):
        _, labels, index = join(part)
        rows, order = index.sort()
        assert [len(labels) for _, labels, _ in part] == sizes
        assert torch.equal(rows, torch.arange(part.num_samples))
        assert torch.equal(labels[order], part.labels)


def test_images_are_normalised_float32_in_channels_last(one_colour, size):
    for part in one_colour:
        for images, _, index in part:
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.dtype == torch.float32
            assert images.shape == (len(index), 3, size, size)
            colour = part.images[index, 0, 0] / 255
            torch.testing.assert_close(images[:, :, 8, 8], (colour - 0.5) / 0.25)


def test_resized_crops_are_taken_from_the_files_own_size(small_set, size):
    train, val = build("--image_size", size)
    stored = 32 if train.augmentation == "resized_crop" else size
    assert train.images.shape == (70, stored, stored, 3)
    assert val.images.shape == (30, size, size, 3)


def test_validation_is_in_file_order(small_set):
    _, val = build()
    _, _, index = join(val)
    assert index.tolist() == list(range(30))


def test_order_and_augmentation_stay_as_they_were(small_set):
    """Recorded, because published results depend on them."""
    levels = {"crop": [72, 227, 168, 84, 103, 243, 88, 122], "resized_crop": [33, 146, 93, 166, 30, 231, 83, 24]}
    train, _ = build("--seed", 4)
    train.set_epoch(3)
    images, _, index = join(train)
    assert index[:8].tolist() == [41, 22, 39, 48, 29, 64, 31, 51]
    pixels = (images[:8, 0, 9, 9] - train.shift[0]) / train.scale[0]
    assert pixels.tolist() == pytest.approx(levels[train.augmentation], abs=1)


@pytest.fixture
def equal_images(small_set):
    """The same training image in every row, so that it shows how it was augmented."""
    images = small_set.splits["train"].images
    images[:] = images[:1]


def join_epoch(epoch, seed=4):
    """Images, labels and index."""
    train, _ = build("--seed", seed)
    train.set_epoch(epoch)
    return join(train)


def test_images_of_an_epoch_are_augmented_differently(equal_images):
    images, _, _ = join_epoch(0)
    assert len(images.unique(dim=0)) > 40


@pytest.mark.parametrize(("epoch", "seed"), [(3, 4), (0, 5)])
def test_order_and_augmentation_change_with_epoch_and_seed(equal_images, epoch, seed):
    images, _, index = join_epoch(0)
    other_images, _, other_index = join_epoch(epoch, seed)
    assert not torch.equal(index, other_index)
    by_row = images[index.argsort()]
    other_by_row = other_images[other_index.argsort()]
    assert fraction_equal(images, other_images) < 0.2
    assert fraction_equal(by_row, other_by_row) < 0.2


def fraction_equal(images, others):
    is_equal = (images == others).flatten(1).all(dim=1)
    return is_equal.double().mean()


@pytest.fixture
def set_process(monkeypatch):
    """set_process(rank, world_size): the loaders built next are that process's."""

    def call(rank, world_size):
        monkeypatch.setattr("utils.distributed.local_rank_0_first", lambda make: make())
        monkeypatch.setattr("utils.launch.WORLD", World(rank, world_size))

    return call


@pytest.mark.parametrize("number", [0, 1], ids=["train", "val"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_the_processes_make_up_every_batch(small_set, set_process, world_size, number):
    single = list(build()[number])
    shards = []
    for rank in range(world_size):
        set_process(rank, world_size)
        shards.append(list(build()[number]))
    for batch, *parts in zip(single, *shards, strict=True):
        torch.testing.assert_close(join(parts), list(batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_fewer_images_in_a_batch_than_processes_are_refused(small_set, set_process, world_size):
    set_process(0, world_size)
    with pytest.raises(UserError, match=f"holds 1 of 49 images, fewer than the {world_size} processes"):
        build("--limit_train", 49)


FLAGS_AND_SIZES = {
    "": (70, 30, 30),
    "--classes 4": (28, 12, 12),
    "--limit_train 25 --limit_val 11": (25, 11, 11),
    "--val_split 0.3": (50, 20, 30),  # 2.1 of 7 is 2
    "--val_split 0.01 --limit_val 999": (60, 10, 30),  # at least one of each class
    "--classes 4 --val_split 0.3 --limit_train 17 --limit_val 7": (17, 7, 7),
}


@pytest.fixture(params=FLAGS_AND_SIZES)
def words(request):
    return request.param


def build_three(words):
    """The loaders for training, for validation and of the test split."""
    train, val = build(*words.split())
    test = build(*words.split(), split="test")
    return train, val, test


def rows_of(part, small_set):
    """A loader's images as rows of the training split, followed by the test split."""
    pixels = [image.tobytes() for split in small_set.splits.values() for image in split.images]
    return [pixels.index(image.numpy().tobytes()) for image in part.images]


def test_flags_choose_that_many_images(small_set, words):
    sizes = [part.num_samples for part in build_three(words)]
    assert sizes == list(FLAGS_AND_SIZES[words])


def test_chosen_images_are_in_file_order_with_their_labels(small_set, words):
    labels = np.concatenate([split.labels for split in small_set.splits.values()])
    for part in build_three(words):
        rows = rows_of(part, small_set)
        assert rows == sorted(rows)
        assert part.labels.tolist() == labels[rows].tolist()


def test_chosen_images_are_of_all_classes_evenly(small_set, words):
    for part in build_three(words):
        counts = torch.bincount(part.labels)
        assert len(counts) == part.num_classes == len(part.record.class_names)
        assert counts.max() - counts.min() <= 1


def test_validation_images_are_held_out_or_the_test_split(small_set, words):
    train, val, test = (rows_of(part, small_set) for part in build_three(words))
    assert set(train).isdisjoint(val)
    assert min(test) >= 70
    if "--val_split" in words:
        assert max(val) < 70
    else:
        assert val == test


@pytest.mark.parametrize(
    ("limit", "rows"), [(2, [2, 3]), (4, [0, 2, 3, 5]), (5, [0, 1, 2, 3, 5]), (9, [0, 1, 2, 3, 4, 5, 6])]
)
def test_limit_takes_the_first_of_each_class(limit, rows):
    numbers = np.arange(7)
    split = readers.Split(numbers, labels=np.array([2, 2, 0, 1, 2, 0, 2]))
    assert split.first_of_each_class(limit).images.tolist() == rows


def test_held_out_images_depend_on_the_seed(small_set):
    one, same, other = (build("--val_split", 0.3, "--seed", seed)[1].images for seed in (4, 4, 5))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_synthetic_set_is_always_the_same(monkeypatch):
    """Mean colours of 20 images of each class per split, recorded from another process."""
    monkeypatch.setattr(synthetic, "TRAIN_PER_CLASS", 20)
    train, test = synthetic.read(Path(), ReadOptions(32)).splits.values()
    train_colour = train.images.mean(axis=(0, 1, 2)) / 255
    test_colour = test.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(train_colour, [0.491848325, 0.497606051, 0.498882531], atol=1e-6)
    np.testing.assert_allclose(test_colour, [0.502224489, 0.500864252, 0.500336045], atol=1e-6)
