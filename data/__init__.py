"""The datasets, one row each, and the loaders of their splits."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import cifar100, synthetic, tiny_imagenet
from data.files import Split
from data.loader import Loader, generator
from utils.errors import UserError


class Dataset(NamedTuple):
    """`read(root, workers)` returns (train, test, class names in label order); `augmentation` names a
    kind in `augment.KINDS`; mean and std are of RGB in 0..1; image_size is in pixels."""

    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentation: str
    read: Callable[[Path, int], tuple[Split, Split, list[str]]]


# Mean and std are the published script's: CIFAR-10's for CIFAR-100, ImageNet's for Tiny-ImageNet; those of
# the synthetic images are measured. Tiny-ImageNet's 64 px images are trained on at 32 px in the paper.
DATASETS = {
    "cifar100": Dataset(100, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "crop", cifar100.read),
    "tinyimagenet": Dataset(200, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "resized_crop", tiny_imagenet.read),
    "synthetic": Dataset(100, 32, (0.401, 0.407, 0.401), (0.217, 0.219, 0.216), "crop", synthetic.read),
}


def build_loaders(args: Namespace, device: torch.device | str, split: str | None = None):
    """(training loader, validation loader); with split="val" or "test", that split's loader alone.

    Validation is the test split, as in the paper, or with `--val_split` a part of the training split.
    `--classes`, `--val_split` and `--limit_train` or `--limit_val` apply in this order, and rows keep
    file order; `--limit_val` holds for the validation and for the test split.

    Raises UserError for files that are missing or damaged, and for options that the data cannot meet.
    """
    row = DATASETS[args.data_type]
    num_classes = row.num_classes if args.classes is None else args.classes
    if num_classes > row.num_classes:
        raise UserError(f"--classes {num_classes}: {args.data_type} has {row.num_classes} classes")
    image_size = args.image_size or row.image_size
    train, test, class_names = row.read(Path(args.data_path), args.workers)

    def loader(source: Split, rows: np.ndarray, limit: int | None, **training) -> Loader:
        rows = rows[first_of_each_class(source.labels[rows], limit)]
        if len(rows) == 0:
            raise UserError(f"no image is left of {args.data_type} with --classes {num_classes}")
        chosen = Split(np.ascontiguousarray(source.images[rows]), source.labels[rows])
        return Loader(
            chosen, class_names[:num_classes], row.mean, row.std, image_size, torch.device(device), **training
        )

    test_rows = np.flatnonzero(test.labels < num_classes)
    if split == "test":
        return loader(test, test_rows, args.limit_val)
    train_rows = np.flatnonzero(train.labels < num_classes)
    if args.val_split is None:
        val, val_rows = test, test_rows
    else:
        held_out = hold_out(train.labels[train_rows], args.val_split, args.seed)
        val, val_rows, train_rows = train, train_rows[held_out], train_rows[~held_out]
    val_loader = loader(val, val_rows, args.limit_val)
    if split == "val":
        return val_loader
    training = {"augmentation": row.augmentation, "batch_size": args.batch_size, "seed": args.seed}
    return loader(train, train_rows, args.limit_train, **training), val_loader


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(M,) bool: `fraction` of each class of labels (M,), to the nearest image but at least one, drawn
    from the seed. Raises UserError where a class would have nothing left to train on."""
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
