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
from data.images import ReadOptions, note
from data.loader import Loader, generator
from data.readers import Images, Split
from utils import distributed
from utils.errors import UserError, first_line, first_names, is_out_of_memory
from utils.parser import add_flag, add_number, add_path
from utils.records import DataRecord, SplitRecord


class Dataset(NamedTuple):
    """Mean and std are of RGB in 0..1, None to measure them on the training images."""

    num_classes: int | None  # None: as many as the files have
    mean: list[float] | None
    std: list[float] | None
    augmentation: str  # a key of augment.KINDS
    read: Callable[[Path, ReadOptions], Images]  # as data/readers.py describes it
    stored_size: int | None = None  # pixels to which image files are brought; None: --image_size


# The published script's; CIFAR-10's stand for both.
CIFAR_MEAN, CIFAR_STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

GREY = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def _cifar(name: str) -> Dataset:
    read = partial(readers.read_cifar, name)
    return Dataset(readers.CIFAR_CLASSES[name], CIFAR_MEAN, CIFAR_STD, "crop", read, stored_size=32)


DATASETS = {
    "cifar100": _cifar("CIFAR100"),
    "cifar10": _cifar("CIFAR10"),
    "tinyimagenet": Dataset(
        readers.TINY_IMAGENET_CLASSES,
        IMAGENET_MEAN,
        IMAGENET_STD,
        "resized_crop",
        readers.read_tiny_imagenet,
        stored_size=64,
    ),
    "folder": Dataset(None, None, None, "crop", readers.read_folder),
    "synthetic": Dataset(synthetic.CLASSES, *GREY, "crop", synthetic.read, stored_size=synthetic.SIZE),
}


def add_flags(parser) -> None:
    group = parser.add_argument_group("data")
    number = partial(add_number, group)
    text = (
        f"one of {', '.join(DATASETS)} (default: %(default)s, the paper's; folder reads train/<class>/* and"
        " test/<class>/*, selects on val/<class>/* where there are all three, or with --val_split reads <class>/*"
        " alone; synthetic needs no files)"
    )
    options = {"default": "cifar100", "metavar": "NAME", "help": text}
    add_flag(group, "--data_type", choices=list(DATASETS), also="data dataset", **options)
    text = "where data sets are or are downloaded to (default: %(default)s, below the working directory)"
    add_path(group, "--data_path", "machine", text, default="./datasets", metavar="DIR", also="data data_dir root")
    text = "pixels, a multiple of 8; an image's shorter side is resized to it, and the centre is cut out"
    number("--image_size", int, 32, 16, 512, text, "paper")
    text = "threads for decoding image files"
    number("--workers", int, 8, 0, 1024, text, "used only at the first start", kind="machine", also="num_workers")
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
    """(training loader, validation loader); with a split's name, its loader alone, `test` being `val` where there is no
    other. Raises as `load_splits`."""
    loaders = load_splits(args, device)
    loaders.setdefault("test", loaders["val"])
    return loaders[split] if split else (loaders["train"], loaders["val"])


@contextlib.contextmanager
def _describing_memory():
    """Around the loading of images: too little memory becomes an error that says what helps there."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        remedy = "use fewer (files, or --classes, --limit_train, --limit_val), a lower --image_size or fewer --workers"
        raise UserError(f"too little memory for the images ({first_line(e)}): {remedy}") from None


@_describing_memory()
def load_splits(args: Namespace, device: torch.device | str, record: DataRecord | None = None) -> dict[str, Loader]:
    """The loaders of the splits `train` (without --val_only), `val` and `test`.

    Either `val`, the data set's own or held out by `--val_split`, selects the model, and `test` is the test split, if
    there is one; or there is no `test`, because validation is the test split, as in the paper. The loaders' data record
    says which: `record.selects_on_val`.

    `--classes`, `--val_split` and `--limit_train` or `--limit_val` apply in this order, and rows keep file order;
    `--limit_val` holds for the validation and for the test split.

    Args:
        record: a trained network's, whose mean and std are used. Its classes must be these; the images may be others,
            as of another test set: `check_same_images` is for a run that goes on.

    Raises:
        UserError: files that are missing or damaged, flags that the data cannot meet, or other classes.
    """
    dataset = DATASETS[args.data_type]
    read_options = ReadOptions(stored_size(args), args.workers, args.val_split is not None, args.val_only)
    read = partial(dataset.read, Path(args.data_path), read_options)
    images = distributed.local_rank_0_first(read)
    _check_images(args, images)
    splits, class_names = _select_classes(args, images)
    if record is not None and record.class_names != class_names:
        missing = [name for name in record.class_names if name not in class_names]
        new = [name for name in class_names if name not in record.class_names]
        changes = f"missing: {first_names(missing) or 'none'}; new: {first_names(new) or 'none'}"
        raise UserError(f"{args.data_path} has other classes than the network was trained on: {changes}")
    if dataset.stored_size is not None:  # its pixels are compared, whatever files they come from
        splits = {name: part._replace(file_digests=None) for name, part in splits.items()}
    split_records = _divide(args, splits, class_names, record)  # the loop below adds those of the splits
    normalisation = record or dataset
    mean, std = normalisation.mean, normalisation.std
    if mean is None:
        mean, std = channel_statistics(splits["train"].images)

    if args.val_only:
        splits.pop("train", None)
    data_record = DataRecord(list(class_names), mean, std, split_records)
    training = {"augmentation": dataset.augmentation, "batch_size": args.batch_size, "seed": args.seed}
    loaders = {}
    for name, part in splits.items():
        is_train = name == "train"
        part = part.first_of_each_class(args.limit_train if is_train else args.limit_val)
        split_records[name] = _record_of(part)
        options = training if is_train else {}
        loaders[name] = Loader(part, data_record, args.image_size, torch.device(device), **options)
    return loaders


def stored_size(args: Namespace) -> int:
    """Height and width to which image files are brought, before a loader resizes them to --image_size."""
    return DATASETS[args.data_type].stored_size or args.image_size


def _check_images(args: Namespace, images: Images) -> None:
    """Raises UserError where a reader does not return what data/readers.py describes."""
    num_classes, problem = len(images.class_names), None
    expected = DATASETS[args.data_type].num_classes or num_classes
    if num_classes != expected:
        problem = f"{num_classes} class names in place of {expected}"
    for split, (pixels, labels, _) in images.splits.items():
        num, side, *_ = pixels.shape
        found = pixels.dtype, pixels.shape, labels.dtype, labels.shape
        if found != (np.uint8, (num, side, side, 3), np.int64, (num,)):
            problem = (
                f"{split} images {pixels.dtype} {pixels.shape} and labels {labels.dtype} {labels.shape} in place of"
                " uint8 (M, S, S, 3) and int64 (M,)"
            )
        elif not set(labels.tolist()) <= set(range(num_classes)):
            problem = f"{split} labels from {labels.min()} to {labels.max()} for {num_classes} class names"
    if problem:
        raise UserError(f"the reader of --data_type {args.data_type} returns {problem}")


def _record_of(split: Split) -> SplitRecord:
    return SplitRecord(len(split.labels), split.digest())


def _select_classes(args: Namespace, images: Images) -> tuple[dict[str, Split], list[str]]:
    """The splits, and the names of the classes, after --classes. Nothing is copied without."""
    splits, class_names, num = images.splits, images.class_names, args.classes
    if num is None:
        return dict(splits), class_names
    if num > len(class_names):
        raise UserError(f"--classes {num}: {args.data_type} has {len(class_names)} classes")
    return {name: part.select(part.labels < num) for name, part in splits.items()}, class_names[:num]


def _divide(args: Namespace, splits: dict[str, Split], class_names: list[str], record: DataRecord | None) -> dict:
    """Make `val` of `splits`: held-out training images, the data set's own, or the test split; returns the record of
    the training images before any are held out, if some are."""
    if args.val_split is not None:
        if "train" not in splits:  # a test split by itself
            return {}
        if "val" in splits and not args.val_only:
            raise UserError(f"--val_split: {args.data_path} has validation images of its own: leave the flag out")
        train = splits["train"]
        held_out = hold_out(train.labels, args.val_split, args.seed)
        if not held_out.any():
            raise UserError(f"--val_split {args.val_split}: no class has two images")
        whole = np.setdiff1d(train.labels, train.labels[held_out])
        if len(whole):
            names = first_names([class_names[label] for label in whole])
            note(f"--val_split holds out no image of classes that have only one: {names}")
        splits |= {"train": train.select(~held_out), "val": train.select(held_out)}
        return {"train_and_val": _record_of(train)}
    selects_on_val = record.selects_on_val if record and args.val_only else "val" in splits
    if not selects_on_val:
        splits["val"] = splits.pop("test")
    return {}


def check_same_images(before: DataRecord, now: DataRecord, source) -> None:
    """For a run that goes on: two data records, the checkpoint's (`source`) and that of the images that were found.

    Raises:
        UserError: the images are not the same; says in what they differ.
    """
    changes = []
    none = SplitRecord(0, "")
    for name in ("train", "val", "test"):
        found, recorded = (record.splits.get(name, none) for record in (now, before))
        if found.images != recorded.images:
            changes.append(f"{found.images} {name} images in place of {recorded.images}")
        elif found != recorded:
            changes.append(f"pixels or labels of the {found.images} {name} images")
    if changes:
        raise UserError(
            f"{source} was trained on other images; different are: {', '.join(changes)}. Restore them, or give another"
            " --run_name, or --overwrite to start over"
        )


def build_transform(args: Namespace, num_classes: int) -> Callable | None:
    """What changes a training batch before the step: `transform(images (N, 3, S, S), labels (N,)) -> (images, soft
    labels (N, K))`, or None, which leaves batches as they are. The place for MixUp and CutMix.

    It may draw from the global generators of torch, numpy and random: they are seeded at the start of every epoch.
    """
    return None


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of RGB in 0..1 over the pixels of images (M, H, W, 3) uint8."""
    num_pixels = images.size / 3
    mean = np.einsum("mhwc -> c", images, dtype=np.float64) / num_pixels / 255
    square = np.einsum("mhwc, mhwc -> c", images, images, dtype=np.float64) / num_pixels / 255**2
    variance = np.maximum(square - mean**2, 1e-4)  # of images of one colour it would be 0
    return mean.tolist(), np.sqrt(variance).tolist()


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(M,) bool: `fraction` of each class of labels (M,), to the nearest image, but at least one and never all, drawn
    from the seed."""
    random = generator(seed, "val_split")
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        num = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        order = torch.randperm(len(rows), generator=random)
        held_out[rows[order[:num].numpy()]] = True
    return held_out
