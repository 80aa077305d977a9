"""Crops and flips against torchvision's: pixels on given numbers, and the distribution of the numbers."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from data import augment


def pictures(num, height, width):
    images = torch.randint(256, (num, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, : height // 2] = images[:, : height // 2, :1]  # flat areas beside the noise
    return images


def chw(image):
    return image.permute(2, 0, 1)


@pytest.mark.parametrize("size", [16, 32])
def test_crop_has_torchvisions_pixels(size):
    padding = size // 8
    offsets = torch.arange(2 * padding + 1)
    every = torch.cartesian_prod(offsets, offsets, torch.arange(2))
    images = pictures(len(every), size, size)
    result = augment.crop(images, every, size)
    assert result.dtype == torch.uint8
    for image, (top, left, flip), got in zip(images, every.tolist(), result, strict=True):
        expected = reference.crop(reference.pad(chw(image), [padding] * 4), top, left, size, size)
        assert torch.equal(chw(got), reference.horizontal_flip(expected) if flip else expected)


def test_crop_offsets_and_flips_are_uniform():
    draws = augment.draw_crops(90_000, 32, 32, torch.Generator().manual_seed(1))
    counts = torch.bincount(draws[:, 0] * 18 + draws[:, 1] * 2 + draws[:, 2], minlength=162)
    assert len(counts) == 162  # 9 x 9 offsets, 0 to 2 x 4, and flip or not, each independent of the others
    chi_squared = ((counts - 90_000 / 162) ** 2 / (90_000 / 162)).sum()
    assert chi_squared < 231  # 161 degrees of freedom: exceeded by chance once in 4,000


@pytest.mark.parametrize("height, width, size", [(64, 64, 32), (64, 64, 64), (24, 40, 32), (50, 30, 16), (1, 1, 16)])
def test_resized_crop_has_torchvisions_pixels(height, width, size):
    draws = augment.draw_boxes(60, height, width, torch.Generator().manual_seed(2))
    extremes = [[0, 0, height, width, 0], [height - 1, width - 1, 1, 1, 1], [0, 0, 1, width, 1]]
    draws = torch.cat([draws, torch.tensor(extremes)])
    images = pictures(len(draws), height, width)
    result = augment.resized_crop(images, draws, size)
    assert result.shape == (len(draws), size, size, 3) and result.dtype == torch.float32
    for image, (top, left, tall, wide, flip), got in zip(images, draws.tolist(), result, strict=True):
        box = chw(image).float(), top, left, tall, wide, [size, size]
        expected = reference.resized_crop(*box, antialias=True)
        expected = reference.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(chw(got), expected, rtol=0, atol=2e-3)  # of 255 levels


def test_resized_crop_stays_float32_under_autocast():
    images, draws = pictures(8, 64, 64), augment.draw_boxes(8, 64, 64, torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment.resized_crop(images, draws, 32)
    assert torch.equal(inside, augment.resized_crop(images, draws, 32))


def largest_gap(ours, theirs):
    """Two-sample Kolmogorov-Smirnov statistic: the largest distance between the distribution functions."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    at = np.concatenate([ours, theirs])
    return np.abs(
        np.searchsorted(ours, at, "right") / len(ours) - np.searchsorted(theirs, at, "right") / len(theirs)
    ).max()


@pytest.mark.parametrize("height, width", [(64, 64), (40, 64), (20, 90), (90, 20)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    num = 8000
    torch.manual_seed(4)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(num)]).T
    draws = augment.draw_boxes(num, height, width, torch.Generator().manual_seed(5)).numpy().T
    assert abs(draws[4].mean() - 0.5) < 0.025  # flips
    ours = draws[:4]
    assert (ours[:2] >= 0).all() and (ours[2:] >= 1).all()
    assert (ours[0] + ours[2] <= height).all() and (ours[1] + ours[3] <= width).all()
    features = {
        "top": lambda t, x, h, w: t,
        "left": lambda t, x, h, w: x,
        "height": lambda t, x, h, w: h,
        "width": lambda t, x, h, w: w,
        "area": lambda t, x, h, w: h * w,
        "ratio": lambda t, x, h, w: w / h,
        "place": lambda t, x, h, w: (t + 1) / (height - h + 2),
        "joint": lambda t, x, h, w: t + 3 * w - x,
    }
    for name, feature in features.items():
        # Chance alone exceeds 1.95 sqrt(2 / n) once in 1,000 continuous samples, and rarer with ties.
        assert largest_gap(feature(*ours), feature(*theirs)) < 1.95 * (2 / num) ** 0.5, name


def test_box_where_none_fits_is_central():
    # 100 x 8: a box of a ratio up to 4/3 has at most 11 x 8 of its 800 pixels, 14 %; few attempts succeed
    draws = augment.draw_boxes(3000, 8, 100, torch.Generator().manual_seed(6))
    central = (draws[:, :4] == torch.tensor([0, 44, 8, 11])).all(dim=1)
    assert central.float().mean() > 0.3


@pytest.mark.parametrize("kind", augment.KINDS)
def test_draws_come_from_the_generator_alone(kind):
    draw, _ = augment.KINDS[kind]
    first, again, other = (draw(50, 32, 32, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert first.dtype == torch.int64 and first.device.type == "cpu"
    assert torch.equal(first, again) and not torch.equal(first, other)
