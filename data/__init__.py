"""The data sets, one row each, their flags, and the loaders of their splits."""

import contextlib
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import readers, synthetic
from data.images import LARGEST, ReadOptions
from data.loader import Loader, generator
from data.readers import Images, Split
from utils import distributed
from utils.errors import UserError, first_line, first_names, is_out_of_memory
from utils.parser import add_flag, add_number, add_path
from utils.records import DataRecord, SplitRecord


class Dataset(NamedTuple):
    """Mean and std are of RGB in 0..1, None to measure them on the training images."""

    num_classes: int | None  # None: as many as the files have
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    augmentation: str  # a key of augment.KINDS
    read: Callable[[Path, ReadOptions], Images]  # as data/readers.py describes it


# The published script's; CIFAR-10's stand for both.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    "cifar100": Dataset(100, CIFAR_MEAN, CIFAR_STD, "crop", partial(readers.read_cifar, "CIFAR100")),
    "cifar10": Dataset(10, CIFAR_MEAN, CIFAR_STD, "crop", partial(readers.read_cifar, "CIFAR10")),
    "tinyimagenet": Dataset(200, IMAGENET_MEAN, IMAGENET_STD, "resized_crop", readers.read_tiny_imagenet),
    "folder": Dataset(None, None, None, "crop", readers.read_folder),
    "synthetic": Dataset(100, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "crop", synthetic.read),
}


def add_flags(parser) -> None:
    group = parser.add_argument_group("data")
    number = partial(add_number, group)
    text = f"one of {', '.join(DATASETS)} (default: %(default)s, the paper's; folder reads train/<class>/* and"
    text += " test/<class>/*, or with --val_split <class>/* alone; synthetic needs no files)"
    names = {"choices": list(DATASETS), "default": "cifar100", "metavar": "NAME"}
    add_flag(group, "--data_type", **names, help=text, also="data dataset")
    text = "where data sets are or are downloaded to (default: %(default)s, below the working directory)"
    add_path(group, "--data_path", "machine", text, default="./datasets", metavar="DIR", also="data data_dir root")
    text = "pixels, a multiple of 8; images of another size are resized, of several sizes also cut to a square"
    number("--image_size", int, 32, 16, LARGEST, text, "paper")
    text, reason = "threads for decoding image files", "used only at the first start"
    number("--workers", int, 8, 0, 1024, text, reason, kind="machine", also="num_workers")
    number("--classes", int, None, 2, 10**6, "use only the first N classes, in the data set's order", "all")
    text = "use at most N training images, the first of each class, after --val_split"
    number("--limit_train", int, None, 1, 10**9, text, "all")
    number("--limit_val", int, None, 1, 10**9, "the same for the validation images and for the test split", "all")
    text = "hold out this part of the training images, drawn by --seed, to select the model and fit temperatures on"
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

    Raises:
        UserError: files that are missing or damaged, or flags that the data cannot meet.
    """
    if split is None:
        loaders = load_splits(args, device)
        return loaders["train"], loaders["val"]
    if args.val_split is None:
        split = "val"  # which is the test split
    return load_splits(args, device, names=(split,))[split]


@contextlib.contextmanager
def _describing_memory():
    """Around the loading of images: too little memory becomes an error that says what helps there."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        remedy = "use fewer (--classes, --limit_train, --limit_val) or a lower --image_size"
        raise UserError(f"too little memory for the images ({first_line(e)}): {remedy}") from None


@_describing_memory()
def load_splits(
    args: Namespace, device: torch.device | str, record: DataRecord | None = None, names=("train", "val", "test")
) -> dict[str, Loader]:
    """The loaders of the splits in `names`: `train` and `val`, and with `--val_split` also `test`, if there is one.

    Validation is the test split, as in the paper, or with `--val_split` a part of the training split. `--classes`,
    `--val_split` and `--limit_train` or `--limit_val` apply in this order, and rows keep file order; `--limit_val`
    holds for the validation and for the test split.

    Each loader's `record` says what the images are: `class_names` in the labels' order, `mean` and `std` (of RGB in
    0..1), `stored_size` (height and width to which image files are brought before they are resized to --image_size),
    and `splits`: of each, the number of `images` and their `digest`.

    Args:
        record: a trained network's, whose mean, std and stored size are used. Its classes must be these; the images may
            be others, as of another test set: `check_same_images` is for a run that goes on.

    Raises:
        UserError: files that are missing or damaged, flags that the data cannot meet, or other classes.
    """
    dataset = DATASETS[args.data_type]
    read = partial(dataset.read, Path(args.data_path), _read_options(args, record))
    splits, class_names = _divide(args, distributed.local_rank_0_first(read))
    if record is not None and (changes := _class_differences(record.class_names, class_names)):
        raise UserError(f"{args.data_path} has other classes than the network was trained on: {changes}")
    if record is not None:
        mean, std = record.mean, record.std
    elif dataset.mean is not None:
        mean, std = dataset.mean, dataset.std
    else:
        mean, std = channel_statistics(splits["train"].images)

    any_split = next(iter(splits.values()))
    height, width = any_split.images.shape[1:3]
    splits = {name: part for name, part in splits.items() if name in names}
    facts = {}
    for name, part in splits.items():
        limit = args.limit_train if name == "train" else args.limit_val
        part = splits[name] = part.first_of_each_class(limit)
        facts[name] = SplitRecord(len(part.labels), part.digest())
    found = DataRecord(list(class_names), list(mean), list(std), [height, width], facts)

    training = {"augmentation": dataset.augmentation, "batch_size": args.batch_size, "seed": args.seed}
    loaders = {}
    for name, part in splits.items():
        options = training if name == "train" else {}
        loaders[name] = Loader(part, found, args.image_size, torch.device(device), **options)
    return loaders


def _read_options(args: Namespace, record: DataRecord | None) -> ReadOptions:
    """With --val_split the images are the training split's, and a test split is welcome; without, --val_only needs the
    test split alone. What belongs to a trained network is brought to the size that it was trained on."""
    return ReadOptions(
        args.image_size,
        size=tuple(record.stored_size) if record is not None else None,
        train=args.val_split is not None or not args.val_only,
        needs_test=args.val_split is None,
        workers=args.workers,
        read_only=args.val_only,
    )


def _divide(args: Namespace, images: Images) -> tuple[dict[str, Split], list[str]]:
    """The splits by name, and the names of the classes, after --classes and --val_split. Nothing is copied without."""
    splits = {"train": images.train, "test": images.test}
    splits = {name: part for name, part in splits.items() if part is not None}
    class_names, num = images.class_names, args.classes
    if num is not None and num > len(class_names):
        raise UserError(f"--classes {num}: {args.data_type} has {len(class_names)} classes")
    if num is not None and num < len(class_names):
        class_names = class_names[:num]
        splits = {name: part.select(part.labels < num) for name, part in splits.items()}
    if args.val_split is None:
        splits["val"] = splits.pop("test")
    elif "train" in splits:
        train = splits["train"]
        held_out = hold_out(train.labels, args.val_split, args.seed)
        splits |= {"train": train.select(~held_out), "val": train.select(held_out)}
    return splits, class_names


def check_same_images(before: DataRecord, now: DataRecord, source) -> None:
    """For a run that goes on: two data records, the checkpoint's (`source`) and that of the images that were found.

    Raises:
        UserError: the images are not the same; says in what they differ.
    """
    changes = []
    none = SplitRecord(0, "")
    for name in now.splits | before.splits:
        found, recorded = (record.splits.get(name, none) for record in (now, before))
        if found.images != recorded.images:
            changes.append(f"{found.images} {name} images in place of {recorded.images}")
        elif found.digest != recorded.digest:
            changes.append(f"pixels or labels of the {found.images} {name} images")
    if changes:
        raise UserError(
            f"{source} was trained on other images; different are: {', '.join(changes)}. Restore them, or give another"
            " --run_name, or --overwrite to start over"
        )


def _class_differences(before: list[str], now: list[str]) -> str:
    """In words; empty where the classes are the same in the same order."""
    missing = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    if not missing and not new:
        return "" if before == now else "their order"
    changes = []
    if missing:
        changes.append(f"missing: {first_names(missing)}")
    if new:
        changes.append(f"new: {first_names(new)}")
    return "; ".join(changes)


def build_transform(args: Namespace, num_classes: int) -> Callable | None:
    """What changes a training batch before the step: `transform(images (N, 3, S, S), labels (N,)) -> (images, soft
    labels (N, K))`, or None, which leaves batches as they are. The place for MixUp and CutMix.

    It may draw from the global generators of torch, numpy and random: they are seeded at the start of every epoch.
    """
    return None


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
        order = torch.randperm(len(rows), generator=random)
        held_out[rows[order[:num].numpy()]] = True
    return held_out
