"""A learnable image set that needs no files: 100 classes of rings on a background, for tests and first runs.

A class is one of ten hues and one of ten ring widths. Position, phase, background and noise vary, so that a mirror
image is equally likely in every class and flipping is a fair augmentation.
"""

import functools
from pathlib import Path

import numpy as np

from data.images import ReadOptions
from data.readers import Images, Split

HUES, WIDTHS = 10, 10
CLASSES = HUES * WIDTHS
TRAIN_PER_CLASS, TEST_PER_CLASS = 100, 20
SIZE = 32


def read(root: Path, options: ReadOptions) -> Images:
    """10,000 training and 2,000 test images (M, 32, 32, 3), always the same; the arguments are not used."""
    return _draw_splits(TRAIN_PER_CLASS, TEST_PER_CLASS)


@functools.cache  # a process may ask twice, for training and for the test split
def _draw_splits(train_per_class: int, test_per_class: int) -> Images:
    random = np.random.RandomState(0)  # its stream, unlike Generator's, is the same in every version of numpy
    names = [f"hue {hue}, width {width}" for hue in range(HUES) for width in range(WIDTHS)]
    labels = np.arange(CLASSES)
    train = _draw(np.repeat(labels, train_per_class), random)
    test = _draw(np.repeat(labels, test_per_class), random)
    return Images({"train": train, "test": test}, names)


def _draw(labels: np.ndarray, random: np.random.RandomState) -> Split:
    """labels (M,) -> their images, rings of cosine profile around a random centre."""
    num = len(labels)

    def uniform(low, high, channels=1):
        return random.uniform(low, high, (num, 1, 1, channels)).astype(np.float32)

    hue, width = np.divmod(labels[:, None, None, None], WIDTHS)

    # rings around a centre that may lie anywhere in the middle half, in the class's colour, on any background
    row, column = uniform(8, 24), uniform(8, 24)
    wavelength = 3 * 1.2 ** (width + uniform(-0.3, 0.3))  # pixels, 3 to 16
    phase = uniform(0, 2 * np.pi)
    turn = (hue + uniform(-0.3, 0.3)) / HUES
    angle = 2 * np.pi * (turn + np.arange(3) / 3)
    colour = 0.5 + 0.4 * np.cos(angle)
    background = uniform(0.1, 0.9, 3)

    grid = np.arange(SIZE, dtype=np.float32)[:, None]
    images = np.empty((num, SIZE, SIZE, 3), np.uint8)
    for start in range(0, num, 100):  # a hundred at a time: their arrays stay in the processor's cache
        part = slice(start, start + 100)
        distance = np.hypot(grid[:, None] - row[part], grid - column[part])
        rings = 0.5 + 0.5 * np.cos(2 * np.pi * distance / wavelength[part] + phase[part])
        pixels = rings * colour[part] + (1 - rings) * background[part]
        noise = random.standard_normal(pixels.shape).astype(np.float32)
        images[part] = np.rint(255 * (pixels + 0.1 * noise)).clip(0, 255)
    return Split(images, labels)
