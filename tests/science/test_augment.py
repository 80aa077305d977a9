"""Crops and flips against torchvision's: pixels for given draws, and the distribution of the draws."""

import helpers
import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from data import augment


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_images(*shape):
    return torch.from_numpy(helpers.random_images(*shape))


def flip_if(flip, image):
    """(3, S, S) -> (S, S, 3), mirrored or not."""
    if flip:
        image = reference.horizontal_flip(image)
    return image.permute(1, 2, 0)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_crop_has_torchvisions_pixels(size):
    padding = size // 8
    offsets = torch.arange(2 * padding + 1)
    draws = torch.cartesian_prod(offsets, offsets, torch.arange(2))
    images = random_images(len(draws), size, size)
    result = augment.crop(images, draws, size)
    assert result.shape == images.shape
    assert result.dtype == torch.uint8
    padded = reference.pad(images.permute(0, 3, 1, 2), [padding] * 4)
    for i, (top, left, flip) in enumerate(draws.tolist()):
        cropped = reference.crop(padded[i], top, left, size, size)
        assert torch.equal(result[i], flip_if(flip, cropped))


def test_crop_offsets_and_flips_are_uniform_and_independent():
    draws = augment.draw_crops(90_000, 32, 32, seeded(1))
    top, left, flip = draws.unbind(dim=1)
    outcome = top * 18 + left * 2 + flip
    counts = torch.bincount(outcome, minlength=162)
    assert len(counts) == 162  # 9 x 9 offsets, 0 to 2 x 4, with and without a flip
    expected = 90_000 / 162
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 231  # 161 degrees of freedom: exceeded by chance once in 4,000


def boxes_with_extremes(height, width):
    """60 draws, the complete image, the last pixel and the first row."""
    draws = augment.draw_boxes(60, height, width, seeded(2))
    whole = [0, 0, height, width, 0]
    pixel = [height - 1, width - 1, 1, 1, 1]
    row = [0, 0, 1, width, 1]
    return torch.cat([draws, torch.tensor([whole, pixel, row])])


@pytest.mark.parametrize(
    ("height", "width", "size"), [(64, 64, 32), (64, 64, 64), (24, 40, 32), (50, 30, 16), (1, 1, 16)]
)
def test_resized_crop_has_torchvisions_pixels(height, width, size):
    draws = boxes_with_extremes(height, width)
    images = random_images(len(draws), height, width)
    result = augment.resized_crop(images, draws, size)
    assert result.shape == (len(draws), size, size, 3)
    for i, (top, left, box_height, box_width, flip) in enumerate(draws.tolist()):
        image = images[i].permute(2, 0, 1).float()
        cropped = reference.resized_crop(image, top, left, box_height, box_width, [size, size], antialias=True)
        expected = flip_if(flip, cropped)
        torch.testing.assert_close(result[i], expected, rtol=0, atol=2e-3)


def test_resized_crop_stays_float32_under_autocast():
    images = random_images(8, 64, 64)
    draws = augment.draw_boxes(8, 64, 64, seeded(3))
    outside = augment.resized_crop(images, draws, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment.resized_crop(images, draws, 32)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


# In the elongated images often no box fits, and the central crop is taken.
IMAGE_SIZES = pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 64), (20, 90), (90, 20)])


@IMAGE_SIZES
def test_boxes_lie_within_the_image_and_half_are_flipped(height, width):
    draws = augment.draw_boxes(8000, height, width, seeded(5))
    top, left, box_height, box_width, flip = draws.unbind(dim=1)
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + box_height).max() <= height
    assert (left + box_width).max() <= width
    assert abs(flip.double().mean() - 0.5) < 0.025


def features(boxes, height, width):
    """Numbers that show how boxes (4, num) of top, left, height and width are distributed, jointly as well."""
    top, left, box_height, box_width = boxes
    area = box_height * box_width
    ratio = box_width / box_height
    place = (top + 1) / (height - box_height + 2)
    mixture = top + 3 * box_width - left
    return [top, left, area, ratio, place, mixture]


def kolmogorov_smirnov(a, b):
    """The largest difference between the two samples' distribution functions."""
    values = np.concatenate([a, b])
    below_a = np.searchsorted(np.sort(a), values, "right")
    below_b = np.searchsorted(np.sort(b), values, "right")
    return np.abs(below_a - below_b).max() / len(a)


@IMAGE_SIZES
def test_boxes_are_distributed_as_torchvisions(height, width):
    num = 8000
    draws = augment.draw_boxes(num, height, width, seeded(5))
    ours = features(draws[:, :4].T.numpy(), height, width)
    torch.manual_seed(4)
    image = torch.empty(3, height, width)
    boxes = [RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(num)]
    theirs = features(np.transpose(boxes), height, width)
    limit = 1.95 * (2 / num) ** 0.5  # exceeded by chance once in 1,000
    for a, b in zip(ours, theirs, strict=True):
        assert kolmogorov_smirnov(a, b) < limit
