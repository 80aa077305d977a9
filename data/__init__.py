"""The data sets, one row each, their flags, and the loaders of their splits."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from data import readers, synthetic
from data.loader import Loader, generator
from data.readers import Images, Split
from utils import distributed
from utils.errors import UserError
from utils.flags import add_number


class Dataset(NamedTuple):
    """Mean and std are of RGB in 0..1, None to measure them on the training images."""

    num_classes: int | None  # None: as many as the files have
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    augmentation: str  # a key of augment.KINDS
    read: Callable[[Path, int, bool], Images]  # as data/readers.py describes it


# The published script's; CIFAR-10's stand for both.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    "cifar100": Dataset(100, CIFAR_MEAN, CIFAR_STD, "crop", partial(readers.read_cifar, CIFAR100)),
    "cifar10": Dataset(10, CIFAR_MEAN, CIFAR_STD, "crop", partial(readers.read_cifar, CIFAR10)),
    "tinyimagenet": Dataset(200, IMAGENET_MEAN, IMAGENET_STD, "resized_crop", readers.read_tiny_imagenet),
    "folder": Dataset(None, None, None, "crop", readers.read_folder),
    "synthetic": Dataset(100, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "crop", synthetic.read),
}


def add_flags(parser) -> None:
    group = parser.add_argument_group("data")
    number = partial(add_number, group)
    text = f"one of {', '.join(DATASETS)} (default: %(default)s, the paper's; folder reads train/<class>/* and"
    text += " test/<class>/*; synthetic needs no files)"
    group.add_argument("--data_type", choices=list(DATASETS), default="cifar100", metavar="NAME", help=text)
    text = "where data sets are or are downloaded to (default: %(default)s)"
    group.add_argument("--data_path", default="./datasets", metavar="DIR", help=text)
    text = "pixels, a multiple of 8; images of another size are resized"
    number("--image_size", int, 32, 16, 512, text, "paper")
    number("--workers", int, 8, 0, 1024, "threads that decode image files, once", "training needs none")
    number("--classes", int, None, 2, 10**6, "use only the first N classes", "all")
    text = "use only N training images, the first of each class, after --val_split"
    number("--limit_train", int, None, 1, 10**9, text, "all")
    number("--limit_val", int, None, 1, 10**9, "the same for the validation images and for the test split", "all")
    text = "hold out this part of the training images, select on it, and fit temperatures on it"
    number("--val_split", float, None, 0.001, 0.9, text, "none: as in the paper, validation is the test split")


def check_flags(args: Namespace, fail) -> None:
    """Check image size and classes; `fail(message)` reports an error and does not return."""
    if args.image_size % 8:
        fail(f"argument --image_size: {args.image_size} is not a multiple of 8")
    num_classes = DATASETS[args.data_type].num_classes
    if args.classes is not None and num_classes is not None and args.classes > num_classes:
        fail(f"argument --classes: {args.classes} is more than the {num_classes} of {args.data_type}")


def build_loaders(args: Namespace, device: torch.device | str, split: str | None = None):
    """(training loader, validation loader); with split="val" or "test", that split's loader alone.

    Validation is the test split, as in the paper, or with `--val_split` a part of the training split. `--classes`,
    `--val_split` and `--limit_train` or `--limit_val` apply in this order, and rows keep file order; `--limit_val`
    holds for the validation and for the test split.

    Raises:
        UserError: files that are missing or damaged, or flags that the data cannot meet.
    """
    dataset = DATASETS[args.data_type]
    read = partial(dataset.read, Path(args.data_path), args.workers, args.val_only)
    train, test, class_names = distributed.local_main_first(read)
    if args.classes is not None:
        if args.classes > len(class_names):
            raise UserError(f"--classes {args.classes}: {args.data_type} has {len(class_names)} classes")
        class_names = class_names[: args.classes]
        train, test = (part.select(part.labels < args.classes) for part in (train, test))
    val = test
    if args.val_split is not None:
        held_out = hold_out(train.labels, args.val_split, args.seed)
        train, val = train.select(~held_out), train.select(held_out)
    mean, std = dataset.mean, dataset.std
    if mean is None:
        mean, std = channel_statistics(train.images)

    def loader(part: Split, limit: int | None, **training) -> Loader:
        part = part.select(first_of_each_class(part.labels, limit))
        return Loader(part, class_names, mean, std, args.image_size, torch.device(device), **training)

    if split is not None:
        return loader({"val": val, "test": test}[split], args.limit_val)
    training = {"augmentation": dataset.augmentation, "batch_size": args.batch_size, "seed": args.seed}
    return loader(train, args.limit_train, **training), loader(val, args.limit_val)


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of RGB in 0..1 over the pixels of images (M, H, W, 3) uint8."""
    num_pixels = images[..., 0].size
    mean = np.einsum("mhwc -> c", images, dtype=np.float64) / num_pixels / 255
    square = np.einsum("mhwc, mhwc -> c", images, images, dtype=np.float64) / num_pixels / 255**2
    variance = np.maximum(square - mean**2, 1e-4)  # of images of one colour it would be 0
    return mean.tolist(), np.sqrt(variance).tolist()


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(M,) bool: `fraction` of each class of labels (M,), to the nearest image but at least one, drawn from the seed.

    Raises:
        UserError: a class would have nothing left to train on.
    """
    random = generator(seed, "val_split")
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        num = max(1, round(fraction * len(rows)))
        if num >= len(rows):
            raise UserError(f"--val_split {fraction} leaves no image to train on of class {label} ({len(rows)} images)")
        held_out[rows[torch.randperm(len(rows), generator=random)[:num].numpy()]] = True
    return held_out


def first_of_each_class(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Rows, in order, of at most `limit` images (None: all) out of labels (M,): the first of every class, then the
    second of every class, and so on, so that classes are as even as the number allows."""
    turn = np.zeros(len(labels), dtype=np.int64)  # 0 for the first image of its class, 1 for the second ...
    for label in np.unique(labels):
        of_class = labels == label
        turn[of_class] = np.arange(of_class.sum())
    return np.sort(np.lexsort((labels, turn))[:limit])
