"""Random crops and flips: drawn per image, applied to complete batches on the images' device.

Each kind is a pair. `draw` makes all the random numbers of an epoch on the CPU, one int64 row per image, so that they
are the same on every device and processes can slice them; `apply` does the pixels and has no randomness left.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

ATTEMPTS = 10  # tries for a box that fits, then the central crop: torchvision's RandomResizedCrop
SCALE = (0.08, 1.0)  # fraction of the image's area in a box, uniform; torchvision's default, as the script
RATIO = (3 / 4, 4 / 3)  # width / height of a box, log-uniform; the same


def draw_crops(num: int, height: int, width: int, generator: Generator) -> Tensor:
    """(num, 3) int64 rows of top, left, flip: top and left in 0..2p within the image padded by p = height // 8 (4 at
    32 px, as the script), flip with probability 1/2."""
    padding = height // 8
    offsets = torch.randint(2 * padding + 1, (num, 2), generator=generator)
    flip = torch.randint(2, (num, 1), generator=generator)
    return torch.cat([offsets, flip], dim=1)


def crop(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """images (N, S, S, 3) uint8 -> (N, S, S, 3) uint8: zero-padded by S // 8, cropped to S, flipped.

    The same pixels as torchvision's RandomCrop(S, padding=S // 8) and RandomHorizontalFlip.
    """
    padding = size // 8
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    top, left, flip = draws[:, :, None].unbind(dim=1)
    position = torch.arange(size, device=images.device)
    mirrored = size - 1 - position
    rows = top + position
    columns = left + torch.where(flip.bool(), mirrored, position)
    image = torch.arange(len(images), device=images.device)
    # (N, S, S) positions in `padded`
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def draw_boxes(num: int, height: int, width: int, generator: Generator) -> Tensor:
    """(num, 5) int64 rows of top, left, box height, box width, flip, by RandomResizedCrop's rule: the first of ten
    boxes that fits the image; where none fits, the largest central box of a ratio within bounds."""
    # ten boxes per image: area uniform, ratio log-uniform; (num, ATTEMPTS) each
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    area, ratio = uniform(2, num, ATTEMPTS)
    smallest, largest = SCALE
    area = height * width * (smallest + (largest - smallest) * area)
    narrowest, widest = RATIO
    log_ratio = math.log(narrowest) + math.log(widest / narrowest) * ratio
    ratio = torch.exp(log_ratio)
    sizes = torch.stack([area / ratio, area * ratio], dim=2)
    sizes = sizes.sqrt().round()

    # the first of them that fits, anywhere in the image
    image_size = torch.tensor([height, width])
    fits = (sizes > 0) & (sizes <= image_size)
    fits = fits.all(dim=2)
    first = fits.byte().argmax(dim=1)
    size = sizes[torch.arange(num), first]
    corner = uniform(num, 2) * (image_size - size + 1)
    corner = corner.floor()

    # or the largest central box
    central_height = min(height, round(width / narrowest))
    central_width = min(width, round(height * widest))
    central_size = torch.tensor([central_height, central_width])
    central_corner = (image_size - central_size) // 2

    found = fits.any(dim=1, keepdim=True)
    box = torch.cat([corner, size], dim=1)
    central_box = torch.cat([central_corner, central_size])
    boxes = torch.where(found, box, central_box.double()).long()
    flip = torch.randint(2, (num, 1), generator=generator)
    return torch.cat([boxes, flip], dim=1)


def resized_crop(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """images (N, H, W, 3) uint8 -> (N, S, S, 3) float32 in 0..255: boxes resized to S, and flipped.

    Antialiased bilinear as torchvision's resized_crop, less its rounding to integer levels. Resizing is
    linear and separable, so it is two batched matrix products with weights of each image's own.
    """
    num, height, width, channels = images.shape
    top, left, box_height, box_width, flip = draws.unbind(dim=1)
    # Half precision would round pixels and weights to 8 bits. (TF32's 11 bits cost an eighth of a level.)
    with torch.autocast(images.device.type, enabled=False):
        vertical = _resize_weights(top, box_height, torch.zeros_like(flip), size, height)
        horizontal = _resize_weights(left, box_width, flip, size, width)
        pixels = images.float().view(num, height, width * channels)
        rows = vertical @ pixels
        rows = rows.view(num, size, width, channels).transpose(1, 2)
        rows = rows.reshape(num, width, size * channels)
        columns = horizontal @ rows
        return columns.view(num, size, size, channels).transpose(1, 2)


def _resize_weights(start, length, flip, size: int, source: int) -> Tensor:
    """(N, size, source) float32, rows adding up to 1: output pixel i of image n as a mean of its source pixels
    start[n] .. start[n] + length[n] - 1, in reverse where flip[n].

    A triangle around the output's centre, one output pixel wide each side and never less than one source pixel, cut
    off at the box.
    """
    start = start.float()[:, None, None]
    length = length.float()[:, None, None]
    flip = flip.bool()[:, None, None]
    step = length / size
    output = torch.arange(size, device=start.device)[:, None]
    centre = (output + 0.5) * step
    centre = start + torch.where(flip, length - centre, centre)
    position = torch.arange(source, device=start.device) + 0.5
    distance = (position - centre).abs()
    half_width = step.clamp(min=1)
    weights = (1 - distance / half_width).clamp(min=0)
    is_inside = (position > start) & (position < start + length)
    weights = weights * is_inside
    return weights / weights.sum(dim=2, keepdim=True)


# kind: (draw(num, height, width, generator) -> (num, C), apply(images, draws, size) -> (N, S, S, 3))
KINDS = {"crop": (draw_crops, crop), "resized_crop": (draw_boxes, resized_crop)}
