"""Files to uint8 arrays: CIFAR, Tiny-ImageNet, a folder of classes.

Every reader is `read(root, options) -> Images`: `root` is `--data_path`, the options are `ReadOptions`
(data/images.py).
"""

import contextlib
import hashlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images import CACHE, ReadOptions, list_images, load_images, note_skipped
from utils.errors import UserError, first_line, first_names

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
CIFAR_SIZES = (50_000, 10_000)  # training and test images of both


class Split(NamedTuple):
    """Decoded images in file order: images uint8 (M, H, W, 3), RGB; labels int64 (M,)."""

    images: np.ndarray
    labels: np.ndarray

    def select(self, rows: np.ndarray) -> "Split":
        """A copy of the rows at these positions, or where a mask (M,) is true."""
        return Split(np.ascontiguousarray(self.images[rows]), self.labels[rows])

    def first_of_each_class(self, limit: int | None) -> "Split":
        """At most `limit` images (None: all), in file order: the first of every class, then the second of every class,
        and so on, so that classes are as even as the number allows."""
        if limit is None or limit >= len(self.labels):
            return self
        rank_in_class = np.zeros(len(self.labels), dtype=np.int64)
        for label in np.unique(self.labels):
            of_class = self.labels == label
            rank_in_class[of_class] = np.arange(of_class.sum())
        order = np.lexsort((self.labels, rank_in_class))  # by rank, then label
        return self.select(np.sort(order[:limit]))

    def digest(self) -> str:
        """Of sizes, pixels, labels and their order: 32 hexadecimal digits. A gigabyte of pixels takes a second."""
        digest = hashlib.blake2b(repr(self.images.shape).encode(), digest_size=16)
        digest.update(self.labels.astype("<i8"))
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()


class Samples(NamedTuple):
    """Image files and their labels."""

    files: list[str]
    labels: list[int]


class Images(NamedTuple):
    """A data set: its splits, None where it was not read or there is no test split, and the classes' names in the
    labels' order."""

    train: Split | None
    test: Split | None
    class_names: list[str]


def read_cifar(name: str, root: Path, options: ReadOptions) -> Images:
    """CIFAR-10 or CIFAR-100, 50,000 training and 10,000 test images (M, 32, 32, 3), from torchvision's files or, where
    those are missing, from folders of classes, whose sorted names are its label order; else downloaded.

    name: "CIFAR10" or "CIFAR100", as torchvision calls them.

    Raises:
        UserError: damaged files by name, files that are missing and cannot be fetched, or folders of something else.
    """
    from torchvision import datasets  # here: importing it takes as long as PyTorch, and --help does not need it

    kind = getattr(datasets, name)
    folder, archive = root / kind.base_folder, root / kind.filename
    has_folders = (root / "train").is_dir() or (root / "test").is_dir()
    if has_folders and not folder.is_dir():
        images = read_folder(root, options)
        _check_is_cifar(name, root, images)
        return images
    checksums = {folder / name: md5 for name, md5 in kind.train_list + kind.test_list}
    checksums |= {folder / kind.meta["filename"]: kind.meta["md5"], archive: kind.tgz_md5}
    splits = {}
    names = ("train", "test") if options.train else ("test",)
    with _fetching(archive, checksums, options.read_only):
        for split in names:
            part = kind(root, train=split == "train", download=not options.read_only)
            pixels = np.ascontiguousarray(part.data)
            labels = np.array(part.targets)
            splits[split] = Split(pixels, labels)
    return Images(splits.get("train"), splits["test"], part.classes)


def _check_is_cifar(name: str, root: Path, images: Images) -> None:
    """Raises UserError where a folder of classes is not this data set; a test split alone may be another one of its
    classes."""
    num_classes = {"CIFAR10": 10, "CIFAR100": 100}[name]
    facts = [("classes", len(images.class_names), num_classes)]
    if images.train is not None:
        num_train, num_test = CIFAR_SIZES
        height, width = images.train.images.shape[1:3]
        found_test = 0 if images.test is None else len(images.test.labels)
        facts.append(("training images", len(images.train.labels), num_train))
        facts.append(("test images", found_test, num_test))
        facts.append(("rows of pixels per image", height, 32))
        facts.append(("columns of pixels per image", width, 32))
    for what, found, expected in facts:
        if found != expected:
            raise UserError(f"{root} is not {name}, for it has {found} {what}, not {expected}; use --data_type folder")


def read_folder(root: Path, options: ReadOptions) -> Images:
    """`train/<class>/*` and `test/` or `val/<class>/*`, or without a test split `<class>/*` alone: JPEG, PNG or WebP
    files. Sorted class names are the labels, sorted file names the order; hidden files, and files without the suffix
    of an image, are left out.

    Raises:
        UserError: a folder that is missing, a class that is empty or in one split only, or files that are not images.
    """
    folders = _find_splits(root, options)
    classes, samples, others = {}, {}, []
    for name, folder in folders.items():
        classes[name], samples[name], skipped = _list_classes(folder)
        others += skipped
    note_skipped(root, others)
    if len(folders) == 2:
        _check_same_classes(folders, classes)
    return _load(root, next(iter(classes.values())), samples, options)


def _find_splits(root: Path, options: ReadOptions) -> dict[str, Path]:
    """The folders of the splits that are to be read, by name: `train`, `test`."""
    if not root.is_dir():
        raise UserError(f"{root} is not a directory: give one to --data_path")
    test = root / "test" if (root / "test").is_dir() else root / "val"
    if not test.is_dir():
        test = None
    if test is None and options.needs_test:
        remedy = ", or give --val_split to hold out a part of the training images" if options.train else ""
        raise UserError(f"{root} has no folder test/ or val/: add one{remedy}")
    train = root / "train" if options.train else None
    if train is not None and not train.is_dir():
        if test is not None and not options.read_only:
            raise UserError(f"{root} has a folder {test.name}/ but none of the name train/")
        # one folder of classes; or a test set by itself, for --val_only
        train = root if test is None else None
    folders = {"train": train, "test": test}
    return {name: folder for name, folder in folders.items() if folder is not None}


def _check_same_classes(folders: dict[str, Path], classes: dict[str, list[str]]) -> None:
    """Raises UserError, which names the classes that a split lacks, and the split."""
    for here, there in (("train", "test"), ("test", "train")):
        missing = [name for name in classes[here] if name not in classes[there]]
        if missing:
            names = first_names(missing)
            raise UserError(f"{folders[there]} lacks classes that {folders[here]} has: {names}")


def read_tiny_imagenet(root: Path, options: ReadOptions) -> Images:
    """Tiny-ImageNet in its official layout, 200 classes, images (M, H, W, 3) at the files' own size, usually 64 x 64:

        words.txt                        class id, tab, names; not needed
        train/<class id>/images/*.JPEG
        val/images/*.JPEG
        val/val_annotations.txt          file, tab, class id, ...

    `root` is the folder `tiny-imagenet-200` or its parent. Classes are sorted by id, training files by name,
    validation files in the annotations' order.

    Raises:
        UserError: files that are missing, damaged or unexpected.
    """
    name = "tiny-imagenet-200"
    is_folder = root.name == name or (root / "wnids.txt").exists()
    folder = root if is_folder else root / name
    archive = folder.with_name(f"{name}.zip")
    if not folder.is_dir():
        with _fetching(archive, {archive: TINY_IMAGENET_MD5}, options.read_only):
            if options.read_only:
                raise FileNotFoundError
            from torchvision.datasets.utils import download_url, extract_archive

            download_url(TINY_IMAGENET_URL, folder.parent, archive.name, TINY_IMAGENET_MD5)
            # Renamed when complete, so that a folder of that name is never half of one.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as unpacked:
                extract_archive(archive, unpacked)
                os.rename(Path(unpacked) / name, folder)

    remedy = f"unpack {archive.name} again"
    class_ids, train, others = _list_classes(folder / "train")
    if len(class_ids) != 200:
        raise UserError(f"{folder / 'train'} has {len(class_ids)} classes, not 200: {remedy}")
    val, skipped = _read_annotations(folder / "val", class_ids, remedy)
    others = [file for file in others if not file.endswith("_boxes.txt")]
    note_skipped(folder, others + skipped)
    samples = {"test": val}
    if options.train:
        samples = {"train": train, "test": val}
    return _load(folder, _read_words(folder / "words.txt", class_ids), samples, options)


def _read_annotations(folder: Path, class_ids: list[str], remedy: str) -> tuple[Samples, list[str]]:
    """Tiny-ImageNet's validation images, in the order of `val_annotations.txt`, and the files beside them.

    Raises:
        UserError: the annotations are damaged, or do not list each image once; names an image.
    """
    annotations = folder / "val_annotations.txt"
    files, labels = [], []
    try:
        for line in annotations.read_text().splitlines():
            file, class_id = line.split("\t")[:2]
            files.append(str(folder / "images" / file))
            labels.append(class_ids.index(class_id))
    except (OSError, ValueError) as e:
        raise UserError(f"{annotations} is damaged ({first_line(e)}): {remedy}") from None
    images, others = list_images(folder / "images")
    if missing := Counter(files) - Counter(images):
        number = f" (one of {len(missing)})" if len(missing) > 1 else ""
        raise UserError(f"{min(missing)} is missing{number}, or listed twice in {annotations}: {remedy}")
    if unlisted := Counter(images) - Counter(files):
        raise UserError(f"{min(unlisted)} is not listed in {annotations}: {remedy}")
    return Samples(files, labels), others


def _read_words(path: Path, class_ids: list[str]) -> list[str]:
    """The first name of each class in `words.txt`; its id where there is none."""
    names = {class_id: class_id for class_id in class_ids}
    content = path.read_text(errors="replace") if path.exists() else ""
    for line in content.splitlines():
        class_id, _, words = line.partition("\t")
        first_name = words.split(",")[0]
        if class_id in names and first_name:
            names[class_id] = first_name
    return list(names.values())


def _list_classes(folder: Path) -> tuple[list[str], Samples, list[str]]:
    """The classes, subfolders of `folder`, and the images in them, both sorted by name; and all files left out."""
    try:
        entries = list(os.scandir(folder))
    except OSError as e:
        raise UserError(f"{folder} cannot be read ({e.strerror})") from None
    others = sorted(entry.path for entry in entries if entry.is_file() and entry.name != CACHE)
    classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} holds no folder of images: it must be {folder}/<class>/<image>")
    samples = Samples([], [])
    for label, name in enumerate(classes):
        images, skipped = list_images(folder / name)
        if not images:
            raise UserError(f"{folder / name} holds no image")
        samples.files.extend(images)
        samples.labels.extend([label] * len(images))
        others += skipped
    return classes, samples, others


def _load(folder: Path, class_names: list[str], samples: dict[str, Samples], options: ReadOptions) -> Images:
    files = {name: part.files for name, part in samples.items()}
    images = load_images(folder, files, options)
    splits = {}
    for name, part in samples.items():
        labels = np.array(part.labels)
        splits[name] = Split(images[name], labels)
    return Images(splits.get("train"), splits.get("test"), class_names)


@contextlib.contextmanager
def _fetching(archive: Path, checksums: dict[Path, str], read_only: bool) -> Iterator[None]:
    """Around torchvision's downloads, which print, and raise a dozen types for network, disk and archive.

    Raises:
        UserError: for all of them; the files whose checksum is wrong, and the remedy, the archive by hand.
    """
    folder = archive.parent
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as e:
        from torchvision.datasets.utils import check_integrity

        found = {path: md5 for path, md5 in checksums.items() if path.exists()}
        damaged = [str(path) for path, md5 in found.items() if not check_integrity(path, md5)]
        problem = f"{folder} lacks files of the data set"
        if damaged:
            problem = f"the checksum of {', '.join(damaged)} is wrong"
        reason = "--val_only downloads nothing" if read_only else first_line(e)
        raise UserError(
            f"{problem}, and {archive.name} could not be fetched ({reason}): put that file into {folder}, or use"
            " --data_type synthetic, which needs no files"
        ) from None
    finally:
        for path in missing:  # leave no empty folder behind
            with contextlib.suppress(OSError):
                path.rmdir()
