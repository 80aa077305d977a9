"""Files to uint8 arrays: CIFAR, Tiny-ImageNet, a folder of classes.

Every reader is `read(root, options) -> Images`: `root` is `--data_path`, the options are `ReadOptions`
(data/images.py). `load_splits` (data/__init__.py) checks what it returns.
"""

import contextlib
import glob
import hashlib
import io
import operator
import os
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images import ReadOptions, is_cache, list_images, load_images, note, note_skipped
from utils.errors import UserError, first_line, first_names

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_IMAGENET_CLASSES = 200
CIFAR_CLASSES = {"CIFAR10": 10, "CIFAR100": 100}
CIFAR_IMAGES = {"train": 50_000, "test": 10_000}  # of both

VALIDATION = ("val", "valid", "validation")  # names of a folder for it
SPLITS = {"train", "training", "test", "testing", *VALIDATION}


class Split(NamedTuple):
    """Decoded images in file order: images uint8 (M, H, W, 3), RGB; labels int64 (M,); of image files that may be
    stored in several sizes also digests uint8 (M, 16) of the files."""

    images: np.ndarray
    labels: np.ndarray
    file_digests: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> "Split":
        """A copy of the rows at these positions, or where a mask (M,) is true."""
        file_digests = None if self.file_digests is None else self.file_digests[rows]
        return Split(np.ascontiguousarray(self.images[rows]), self.labels[rows], file_digests)

    def first_of_each_class(self, limit: int | None) -> "Split":
        """At most `limit` images (None: all), in file order: the first of every class, then the second of every class,
        and so on, so that classes are as even as the number allows."""
        if limit is None or limit >= len(self.labels):
            return self
        by_class = np.argsort(self.labels, kind="stable")
        labels = self.labels[by_class]
        rank_in_class = np.arange(len(labels)) - np.searchsorted(labels, labels)
        order = np.lexsort((labels, rank_in_class))  # by rank, then label
        return self.select(np.sort(by_class[order[:limit]]))

    def digest(self) -> str:
        """Of sizes and pixels, or of the files where they have digests, of labels, and of their order: 32 hexadecimal
        digits. A gigabyte of pixels takes a second."""
        content = self.images if self.file_digests is None else self.file_digests
        digest = hashlib.blake2b(repr(content.shape).encode(), digest_size=16)
        digest.update(self.labels.astype("<i8"))
        digest.update(np.ascontiguousarray(content))
        return digest.hexdigest()


class Images(NamedTuple):
    """A data set: those of its splits `train`, `val` and `test` that there are and that were to be read, `val` only
    beside a `test`; and the classes' names in the labels' order."""

    splits: dict[str, Split]
    class_names: list[str]
    side: float | None = None  # of image files: the median of their shorter sides, pixels


Sample = tuple[str, str]  # class, image file


def read_cifar(name: str, root: Path, options: ReadOptions) -> Images:
    """CIFAR-10 or CIFAR-100, 50,000 training and 10,000 test images (M, 32, 32, 3), from torchvision's files or, where
    those are missing, from folders of classes, whose sorted names are its label order; else downloaded. A test split
    alone may be another one of its classes.

    name: "CIFAR10" or "CIFAR100", as torchvision calls them.

    Raises:
        UserError: files that are missing or damaged and cannot be fetched, or folders of something else.
    """
    from torchvision import datasets  # here: importing it takes as long as PyTorch, and --help does not need it

    kind = getattr(datasets, name)
    has_folders = (root / "train").is_dir() or (root / "test").is_dir()
    if has_folders and not (root / kind.base_folder).is_dir():
        images = read_folder(root, options)
        counts = {split: len(part.labels) for split, part in images.splits.items()}
        is_complete = counts == CIFAR_IMAGES or "train" not in counts
        if not is_complete or (len(images.class_names), images.side) != (CIFAR_CLASSES[name], 32):
            raise UserError(f"{root} is not {name}, in number or size of images or in classes: use --data_type folder")
        return images
    splits = {}
    names = ("train", "test") if options.train else ("test",)
    with _fetching(root / kind.filename, options):
        for split in names:
            part = kind(root, train=split == "train", download=not options.val_only)
            splits[split] = Split(np.ascontiguousarray(part.data), np.array(part.targets))
    return Images(splits, part.classes)


def read_folder(root: Path, options: ReadOptions) -> Images:
    """`train/<class>/*`, `test/<class>/*` and `val/<class>/*` (or `valid`, `validation`), one of the last two being the
    test split where there is no other, or without a test split `<class>/*` alone: JPEG, PNG or WebP files. Sorted class
    names, in Unicode's form NFC, are the labels, sorted file names the order; hidden files, and files without the
    suffix of an image, are left out.

    Raises:
        UserError: a folder that is missing, a class that has images in one split only, fewer than two classes, or
            files that are not images.
    """
    folders = _find_splits(root, options)
    samples, others = {}, []
    for split, folder in folders.items():
        samples[split], skipped = _list_samples(folder)
        others += skipped
    if "test" not in folders and not options.holds_out:
        remedy = ", or give --val_split to hold out a part of the training images" if options.train else ""
        raise UserError(f"{root} has no folder test/ or val/ with folders of images: add one{remedy}")
    note_skipped(root, others)
    return _load(root, samples, options)


def _find_splits(root: Path, options: ReadOptions) -> dict[str, Path]:
    """The folders of the splits that are to be read, by name; a line about what lies beside them."""
    if not root.is_dir():
        raise UserError(f"{root} is not a directory: give one to --data_path")
    found = {}
    for name in ("train", "test", *VALIDATION):
        if _subfolders(root / name):
            found.setdefault("val" if name in VALIDATION else name, root / name)
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")
    if not found and options.train:
        return {"train": root}  # one folder of classes
    used = {folder.name for folder in found.values()}
    others = {name for name in os.listdir(root) if name[0] != "." and not is_cache(name)} - used
    if others:
        note(f"not used: {first_names(sorted(others))} in {root}")
    if not options.train:
        found.pop("train", None)
    elif "train" not in found and not options.val_only:
        raise UserError(f"{root} has no folder train/ with folders of images")
    return found


def _subfolders(folder: Path) -> list[str]:
    """Names, with a slash behind each; without hidden ones."""
    return glob.glob("*/", root_dir=folder)


def _list_samples(folder: Path) -> tuple[list[Sample], list[str]]:
    """The images in subfolders of `folder`, whose names are the classes, sorted; and the files left out."""
    images, others = list_images(folder)
    samples = []
    for image in images:
        name, _, file = image.removeprefix(f"{folder}/").partition("/")
        if file:
            samples.append((unicodedata.normalize("NFC", name), image))
        else:
            others.append(image)
    samples.sort(key=operator.itemgetter(0))  # one class may have several folders, of names that look alike
    classes = sorted({name for name, _ in samples})
    splits = [name for name in classes if name.lower() in SPLITS]
    if len(classes) < 2 or len(splits) > 1:  # one may be a class, as CIFAR-100's train is
        raise UserError(
            f"{folder} holds {first_names(splits or classes) or 'no folder of images'} in place of several classes: it"
            f" must be {folder}/<class>/<image>; move folders of classes up, and name splits train, val and test"
        )
    return samples, others


def read_tiny_imagenet(root: Path, options: ReadOptions) -> Images:
    """Tiny-ImageNet in its official layout, 200 classes, images (M, S, S, 3):

        words.txt                        class id, tab, names; not needed
        train/<class id>/images/*.JPEG
        val/images/*.JPEG
        val/val_annotations.txt          file, tab, class id, ...

    or with val/<class id>/ as in train/. `root` is the folder `tiny-imagenet-200` or its parent. Classes are sorted by
    id, files by class and name, validation files in the annotations' order. `val` is the split `test`, since the files
    of test/ have no labels.

    Raises:
        UserError: files that are missing, damaged or unexpected.
    """
    name = "tiny-imagenet-200"
    is_folder = root.name == name or (root / "wnids.txt").exists()
    folder = root if is_folder else root / name
    archive = folder.with_name(f"{name}.zip")
    if not folder.is_dir() and not options.val_only:
        with _fetching(archive, options):
            from torchvision.datasets.utils import download_and_extract_archive

            archive.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when complete, so that a folder of that name is never half of one.
            with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f".{name}-") as unpacked:
                download_and_extract_archive(
                    TINY_IMAGENET_URL, archive.parent, unpacked, archive.name, TINY_IMAGENET_MD5
                )
                os.rename(Path(unpacked) / name, folder)

    train, val = folder / "train", folder / "val"
    samples = {}
    if options.train:
        num = len(_subfolders(train))
        if num != TINY_IMAGENET_CLASSES:
            raise UserError(f"{train} has {num} classes, not {TINY_IMAGENET_CLASSES}: unpack {archive.name} again")
        samples["train"], _ = _list_samples(train)
    if len(_subfolders(val)) > 1:
        samples["test"], _ = _list_samples(val)
    else:
        samples["test"] = _read_annotations(val)
    images = _load(folder, samples, options)
    return images._replace(class_names=_read_words(folder / "words.txt", images.class_names))


def _read_annotations(folder: Path) -> list[Sample]:
    """Tiny-ImageNet's validation images, in the order of `val_annotations.txt`.

    Raises:
        UserError: the annotations are damaged, or do not list the images that are there; names an image.
    """
    annotations = folder / "val_annotations.txt"
    classes = {}
    try:
        for line in annotations.read_text().splitlines():
            file, class_id = line.split("\t")[:2]
            classes[str(folder / "images" / file)] = class_id
    except (OSError, ValueError) as e:
        raise UserError(f"{annotations} is damaged ({first_line(e)}): unpack the archive again") from None
    images, _ = list_images(folder / "images")
    if odd := classes.keys() ^ set(images):
        raise UserError(f"{min(odd)} must be there, and be listed in {annotations}: unpack the archive again")
    return [(class_id, file) for file, class_id in classes.items()]


def _read_words(path: Path, class_ids: list[str]) -> list[str]:
    """The first name of each class in `words.txt`; its id where there is none."""
    content = path.read_text(errors="replace") if path.exists() else ""
    names = {}
    for line in content.splitlines():
        class_id, _, words = line.partition("\t")
        names[class_id] = words.split(",")[0]
    return [names.get(class_id) or class_id for class_id in class_ids]


def _load(root: Path, samples: dict[str, list[Sample]], options: ReadOptions) -> Images:
    """Raises UserError where a class is in one split only."""
    splits, sides = {}, []
    classes = {split: {name for name, _ in part} for split, part in samples.items()}
    every = set().union(*classes.values())
    for split, found in classes.items():
        if found != every:
            names = first_names(sorted(every - found))
            raise UserError(f"the {split} images in {root} lack classes of another split: {names}")
    labels = {name: label for label, name in enumerate(sorted(every))}
    for split, part in samples.items():
        decoded = load_images(root, split, [file for _, file in part], options)
        splits[split] = Split(decoded.images, np.array([labels[name] for name, _ in part]), decoded.file_digests)
        sides.append(decoded.sides)
    size, side = options.size, np.median(np.concatenate(sides))
    if side > 2 * size:
        note(f"images in {root} are brought to {size} x {size} pixels; half are {side:.0f} or more high and wide")
    return Images(splits, list(labels), side)


@contextlib.contextmanager
def _fetching(archive: Path, options: ReadOptions) -> Iterator[None]:
    """Around torchvision's downloads, which print, verify checksums, and raise a dozen types for network, disk and
    archive.

    Raises:
        UserError: for all of them; the remedy, the archive by hand.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as e:
        reason = "--val_only downloads nothing" if options.val_only else first_line(e)
        raise UserError(
            f"{archive.parent} lacks files of the data set, or they are damaged, and {archive.name} could not be"
            f" fetched ({reason}): put that file there, or use --data_type synthetic, which needs no files"
        ) from None
