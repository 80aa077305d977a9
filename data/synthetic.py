"""An image set that needs no files: 100 classes of textured shapes, for tests and first runs.

Twenty groups, one for each pair of an outline and a texture (which comes with a range of hues); the five
classes of a group differ in how fine the texture is and overlap, so that a network's mistakes are graded
and no network can be certain. An image and its mirror image are equally likely in every class, so flipping
is a fair augmentation.
"""

import functools
from pathlib import Path

import numpy as np

from data.files import Split

OUTLINES = ("disc", "triangle", "square", "star")
TEXTURES = ("stripes", "checks", "rings", "rays", "dots")
GRADES = 5
TRAIN_PER_CLASS, TEST_PER_CLASS = 100, 20
SIZE = 32
SEED = 0
CHUNK = 500  # images drawn at once: 2 MB an array, which a processor's cache holds

# A texture is finer by this factor from one class of a group to the next ...
STEP = 1.3
# ... and within a class its log has a normal deviation of this many steps: whoever reads the fineness off
# perfectly still errs on one image in ten (2 x 4/5 of the normal beyond 0.5 / OVERLAP).
OVERLAP = 0.33


def read(root: Path, workers: int) -> tuple[Split, Split, list[str]]:
    """(train of 10,000, test of 2,000, class names), images (M, 32, 32, 3); always the same.

    `root` and `workers` are not used: nothing is read.
    """
    return _draw_all(TRAIN_PER_CLASS, TEST_PER_CLASS)


@functools.cache  # a process may ask twice, for training and for the test split
def _draw_all(train_per_class: int, test_per_class: int) -> tuple[Split, Split, list[str]]:
    # RandomState's streams, unlike Generator's, are the same in every version of numpy.
    random = np.random.RandomState(SEED)
    names = [
        f"{outline} of {texture} {grade}"
        for outline in OUTLINES
        for texture in TEXTURES
        for grade in range(1, GRADES + 1)
    ]
    train, test = (_split(len(names), per_class, random) for per_class in (train_per_class, test_per_class))
    return train, test, names


def _split(num_classes: int, per_class: int, random: np.random.RandomState) -> Split:
    labels = np.tile(np.arange(num_classes), per_class)
    parts = [labels[start : start + CHUNK] for start in range(0, len(labels), CHUNK)]
    return Split(np.concatenate([_draw(part, random) for part in parts]), labels)


def _draw(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """labels (n,) -> images (n, SIZE, SIZE, 3) uint8."""

    def uniform(low, high):  # one number an image, to broadcast against (n, SIZE, SIZE)
        return random.uniform(low, high, (len(labels), 1, 1)).astype(np.float32)

    group, grade = np.divmod(labels[:, None, None], GRADES)
    outline, texture = np.divmod(group, len(TEXTURES))

    # Each pixel in the shape's own frame: moved, turned, and with a radius of about 1.
    radius, turn = uniform(9, 13), uniform(-np.pi, np.pi)
    grid = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    across, down = grid[None, None, :] - uniform(-4, 4), grid[None, :, None] - uniform(-4, 4)
    x = (np.cos(turn) * across + np.sin(turn) * down) / radius
    y = (np.cos(turn) * down - np.sin(turn) * across) / radius
    distance, angle = np.hypot(x, y), np.arctan2(y, x)

    # Outlines by their edge's distance from the middle: a circle, two regular polygons, a wavy circle.
    def polygon(sides):
        return np.cos(np.pi / sides) / np.cos(angle % (2 * np.pi / sides) - np.pi / sides)

    edge = np.choose(outline, [np.float32(0.9), 1.25 * polygon(3), 1.15 * polygon(4), 0.85 + 0.25 * np.cos(5 * angle)])
    inside = np.clip((edge - distance) * radius + 0.5, 0, 1)[..., None]  # a blurred edge of one pixel

    # Textures as waves between -1 and 1; fineness is in waves per unit of the shape's own length.
    fineness = STEP ** (grade + OVERLAP * random.standard_normal(grade.shape)).astype(np.float32)
    phase, wave = uniform(-np.pi, np.pi), 2 * np.pi * 0.75 * fineness
    along, aside = np.sin(wave * x + phase), np.sin(wave * y + phase)
    spokes = np.sin(np.rint(2 + 2 * fineness) * angle + phase)
    mixed = np.choose(
        texture,
        [
            along,
            np.sign(along * aside) * np.sqrt(np.abs(along * aside)),
            np.sin(wave * distance + phase),
            spokes,
            along + aside - 0.5,
        ],
    )
    light = (0.5 + 0.5 * np.clip(2 * mixed, -1, 1))[..., None]

    # Colours: the bright part's hue follows the texture loosely, the rest is anyone's.
    hue = texture / len(TEXTURES) + uniform(-0.15, 0.15)
    bright = _colour(hue, uniform(0.5, 1), uniform(0.7, 1))
    dark = _colour(uniform(0, 1), uniform(0, 1), uniform(0.1, 0.4))
    slope = uniform(-0.3, 0.3) * across / SIZE + uniform(-0.3, 0.3) * down / SIZE
    behind = _colour(uniform(0, 1), uniform(0, 0.6), uniform(0.2, 0.8)) + slope[..., None]

    picture = inside * (light * bright + (1 - light) * dark) + (1 - inside) * behind
    picture += 0.05 * random.standard_normal(picture.shape)
    return np.clip(np.rint(255 * picture), 0, 255).astype(np.uint8)


def _colour(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Hue (a turn is 1), saturation and value (n, 1, 1) -> RGB in 0..1 (n, 1, 1, 3)."""
    sector = (hue[..., None] + np.array([0, 2, 1]) / 3) % 1 * 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(2 - np.abs(sector - 3), 0, 1))
