"""Crops and flips against torchvision's: pixels for given draws, and the distribution of the draws."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from data import augment


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_images(num, height, width):
    images = torch.randint(256, (num, height, width, 3), dtype=torch.uint8, generator=seeded(0))
    images[:, : height // 2] = images[:, : height // 2, :1]  # flat areas beside the noise
    return images


@pytest.mark.parametrize("size", [16, 32, 64])
def test_crop_has_torchvisions_pixels(size):
    padding = size // 8
    offsets = torch.arange(2 * padding + 1)
    draws = torch.cartesian_prod(offsets, offsets, torch.arange(2))
    images = random_images(len(draws), size, size)
    result = augment.crop(images, draws, size)
    assert result.dtype == torch.uint8
    for image, (top, left, flip), got in zip(images, draws.tolist(), result, strict=True):
        expected = reference.crop(reference.pad(image.permute(2, 0, 1), [padding] * 4), top, left, size, size)
        assert torch.equal(got.permute(2, 0, 1), reference.horizontal_flip(expected) if flip else expected)


def test_crop_offsets_and_flips_are_uniform_and_independent():
    draws = augment.draw_crops(90_000, 32, 32, seeded(1))
    counts = torch.bincount(draws[:, 0] * 18 + draws[:, 1] * 2 + draws[:, 2], minlength=162)
    assert len(counts) == 162  # 9 x 9 offsets, 0 to 2 x 4, with and without a flip
    chi_squared = ((counts - 90_000 / 162) ** 2 / (90_000 / 162)).sum()
    assert chi_squared < 231  # 161 degrees of freedom: exceeded by chance once in 4,000


@pytest.mark.parametrize("height, width, size", [(64, 64, 32), (64, 64, 64), (24, 40, 32), (50, 30, 16), (1, 1, 16)])
def test_resized_crop_has_torchvisions_pixels(height, width, size):
    draws = augment.draw_boxes(60, height, width, seeded(2))
    extremes = [[0, 0, height, width, 0], [height - 1, width - 1, 1, 1, 1], [0, 0, 1, width, 1]]
    draws = torch.cat([draws, torch.tensor(extremes)])
    images = random_images(len(draws), height, width)
    result = augment.resized_crop(images, draws, size)
    assert result.shape == (len(draws), size, size, 3) and result.dtype == torch.float32
    for image, (top, left, tall, wide, flip), got in zip(images, draws.tolist(), result, strict=True):
        for dtype, level in ((torch.float32, 2e-3), (torch.uint8, 1.01)):  # of 255; torchvision rounds uint8 twice
            image_chw = image.permute(2, 0, 1).to(dtype)
            expected = reference.resized_crop(image_chw, top, left, tall, wide, [size, size], antialias=True)
            expected = reference.horizontal_flip(expected) if flip else expected
            torch.testing.assert_close(got.permute(2, 0, 1), expected.float(), rtol=0, atol=level)


def test_resized_crop_stays_float32_under_autocast():
    images, draws = random_images(8, 64, 64), augment.draw_boxes(8, 64, 64, seeded(3))
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment.resized_crop(images, draws, 32)
    assert torch.equal(inside, augment.resized_crop(images, draws, 32))


@pytest.mark.parametrize("height, width", [(64, 64), (40, 64), (20, 90), (90, 20)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    """Two-sample Kolmogorov-Smirnov tests; in the elongated images often no box fits and the central crop is taken."""
    num = 8000
    torch.manual_seed(4)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(num)]).T
    draws = augment.draw_boxes(num, height, width, seeded(5)).numpy().T
    assert abs(draws[4].mean() - 0.5) < 0.025  # flips
    assert draws[:2].min() >= 0 and (draws[0] + draws[2]).max() <= height and (draws[1] + draws[3]).max() <= width
    for feature in (
        lambda top, left, h, w: top,
        lambda top, left, h, w: left,
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: (top + 1) / (height - h + 2),
        lambda top, left, h, w: top + 3 * w - left,
    ):
        a, b = (np.sort(feature(*boxes)) for boxes in (draws[:4], theirs))
        at = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max() / num
        assert gap < 1.95 * (2 / num) ** 0.5  # exceeded by chance once in 1,000


def test_box_is_central_where_none_fits():
    # 100 x 8: a box of a ratio up to 4/3 has at most 11 x 8 of its 800 pixels, 14 %; few attempts succeed
    draws = augment.draw_boxes(3000, 8, 100, seeded(6))
    assert (draws[:, :4] == torch.tensor([0, 44, 8, 11])).all(dim=1).float().mean() > 0.3
