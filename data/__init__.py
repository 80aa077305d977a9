"""The data sets, one row each, their flags, and the loaders of their splits."""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from data import readers, synthetic
from data.loader import Loader, generator
from data.readers import Images, Split
from utils import distributed
from utils.flags import add_number
from utils.runtime import UserError


class Dataset(NamedTuple):
    """`read` as data/readers.py describes it; `augmentation` is a key of `augment.KINDS`; image_size is in pixels; mean
    and std are of RGB in 0..1, None to measure them on the training images."""

    num_classes: int | None  # None: as many as the files have
    image_size: int
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    augmentation: str
    read: Callable[[Path, int, bool], Images]


CIFAR_MEAN, CIFAR_STD = (
    (0.4914, 0.4822, 0.4465),
    (0.2023, 0.1994, 0.2010),
)  # CIFAR-10's, the published script's for both
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the published script's

read_cifar10 = functools.partial(readers.read_cifar, CIFAR10)
read_cifar100 = functools.partial(readers.read_cifar, CIFAR100)
DATASETS = {
    "cifar100": Dataset(100, 32, CIFAR_MEAN, CIFAR_STD, "crop", read_cifar100),
    "cifar10": Dataset(10, 32, CIFAR_MEAN, CIFAR_STD, "crop", read_cifar10),
    "tinyimagenet": Dataset(200, 32, IMAGENET_MEAN, IMAGENET_STD, "resized_crop", readers.read_tiny_imagenet),
    "folder": Dataset(None, 32, None, None, "crop", readers.read_folder),
    "synthetic": Dataset(100, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "crop", synthetic.read),
}


def add_flags(parser) -> None:
    group = parser.add_argument_group("data")
    number = functools.partial(add_number, group)
    group.add_argument(
        "--data_type",
        choices=list(DATASETS),
        default="cifar100",
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)} (default: %(default)s, the paper's; folder reads train/<class>/* and"
        " test/<class>/*; synthetic needs no files)",
    )
    group.add_argument(
        "--data_path",
        default="./datasets",
        metavar="DIR",
        help="where data sets are or are downloaded to (default: %(default)s)",
    )
    text = "pixels, a multiple of 8; images of another size are resized"
    number("--image_size", int, None, 16, 512, text, "32 for every data set, as in the paper")
    number("--workers", int, 8, 0, 1024, "threads that decode image files, once", "training needs none")
    number("--classes", int, None, 2, 10**6, "use only the first N classes", "all")
    text = "use only N training images, the first of each class, after --val_split"
    number("--limit_train", int, None, 1, 10**9, text, "all")
    number("--limit_val", int, None, 1, 10**9, "the same for the validation images and for the test split", "all")
    text = "hold out this part of the training images, select on it, and fit temperatures on it"
    number("--val_split", float, None, 0.001, 0.9, text, "none: as in the paper, validation is the test split")


def check_flags(args: Namespace, fail) -> None:
    """Resolve the image size, check the classes; `fail(message)` reports an error and does not return."""
    dataset = DATASETS[args.data_type]
    args.image_size = args.image_size or dataset.image_size
    if args.image_size % 8:
        fail(f"argument --image_size: {args.image_size} is not a multiple of 8")
    if args.classes is not None and args.classes > (dataset.num_classes or args.classes):
        fail(f"argument --classes: {args.classes} is more than the {dataset.num_classes} of {args.data_type}")


def build_loaders(args: Namespace, device: torch.device | str, split: str | None = None):
    """(training loader, validation loader); with split="val" or "test", that split's loader alone.

    Validation is the test split, as in the paper, or with `--val_split` a part of the training split. `--classes`,
    `--val_split` and `--limit_train` or `--limit_val` apply in this order, and rows keep file order; `--limit_val`
    holds for the validation and for the test split.

    Raises:
        UserError: files that are missing or damaged, or flags that the data cannot meet.
    """
    row = DATASETS[args.data_type]
    data = distributed.local_main_first(lambda: row.read(Path(args.data_path), args.workers, args.val_only))
    num_classes = args.classes or len(data.class_names)
    if num_classes > len(data.class_names):
        raise UserError(f"--classes {num_classes}: {args.data_type} has {len(data.class_names)} classes")
    train_rows, test_rows = (np.flatnonzero(part.labels < num_classes) for part in (data.train, data.test))
    val, val_rows = data.test, test_rows
    if args.val_split is not None:
        held_out = hold_out(data.train.labels[train_rows], args.val_split, args.seed)
        val, val_rows, train_rows = data.train, train_rows[held_out], train_rows[~held_out]
    mean, std = row.mean, row.std
    if mean is None:
        mean, std = channel_statistics(data.train.images, train_rows)

    def loader(source: Split, rows: np.ndarray, limit: int | None, **training) -> Loader:
        rows = rows[first_of_each_class(source.labels[rows], limit)]
        if len(rows) == 0:
            raise UserError(f"no image is left of {args.data_type} with --classes {num_classes}")
        chosen = Split(np.ascontiguousarray(source.images[rows]), source.labels[rows])
        names = data.class_names[:num_classes]
        return Loader(chosen, names, mean, std, args.image_size, torch.device(device), **training)

    if split == "test":
        return loader(data.test, test_rows, args.limit_val)
    val_loader = loader(val, val_rows, args.limit_val)
    if split == "val":
        return val_loader
    training = {"augmentation": row.augmentation, "batch_size": args.batch_size, "seed": args.seed}
    return loader(data.train, train_rows, args.limit_train, **training), val_loader


def channel_statistics(images: np.ndarray, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of RGB in 0..1 over the pixels of images[rows], (M, H, W, 3) uint8."""
    counts = np.zeros((3, 256))
    for some in np.array_split(rows, len(rows) // 500 + 1):  # at once, it would take many times the images' memory
        counts += [np.bincount(images[some, :, :, c].ravel(), minlength=256) for c in range(3)]
    levels = np.arange(256) / 255
    mean = (counts * levels).sum(axis=1) / counts.sum(axis=1)
    variance = (counts * levels**2).sum(axis=1) / counts.sum(axis=1) - mean**2
    return mean.tolist(), np.sqrt(np.maximum(variance, 1e-4)).tolist()  # of images of one colour it would be 0


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
            raise UserError(
                f"--val_split {fraction} leaves no image to train on of class {label}, which has {len(rows)}"
            )
        held_out[rows[torch.randperm(len(rows), generator=random)[:num].numpy()]] = True
    return held_out


def first_of_each_class(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Rows, in order, of at most `limit` images out of labels (M,): the first of every class, then the
    second of every class, and so on, so that classes are as even as the number allows."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    turn = np.zeros(len(labels), dtype=np.int64)  # 0 for the first image of its class, 1 for the second ...
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        turn[rows] = np.arange(len(rows))
    return np.sort(np.lexsort((labels, turn))[:limit])
