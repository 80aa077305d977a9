"""Files to uint8 arrays: CIFAR, Tiny-ImageNet, a folder of classes.

Every reader is `read(root, options) -> Images`: `root` is `--data_path`, the options are `ReadOptions`
(data/images.py). `load_splits` (data/__init__.py) checks what it returns.
"""

import contextlib
import hashlib
import io
import itertools
import os
import tempfile
import unicodedata
from collections import Counter
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


class Samples(NamedTuple):
    """Image files and their labels."""

    files: list[str]
    labels: list[int]


class Images(NamedTuple):
    """A data set: those of its splits `train`, `val` and `test` that there are and that were to be read, `val` only
    beside a `test`; and the classes' names in the labels' order."""

    splits: dict[str, Split]
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
    with _fetching(archive, checksums, options.val_only):
        for split in names:
            part = kind(root, train=split == "train", download=not options.val_only)
            pixels = np.ascontiguousarray(part.data)
            labels = np.array(part.targets)
            splits[split] = Split(pixels, labels)
    return Images(splits, part.classes)


def _check_is_cifar(name: str, root: Path, images: Images) -> None:
    """Raises UserError where a folder of classes is not this data set; a test split alone may be another one of its
    classes."""
    facts = [("classes", len(images.class_names), CIFAR_CLASSES[name])]
    if "train" in images.splits:
        for split, num in CIFAR_IMAGES.items():
            part = images.splits.get(split)
            facts.append((f"{split} images", len(part.labels) if part else 0, num))
    for what, found, expected in facts:
        if found != expected:
            raise UserError(f"{root} is not {name}, for it has {found} {what}, not {expected}; use --data_type folder")


def read_folder(root: Path, options: ReadOptions) -> Images:
    """`train/<class>/*`, `test/<class>/*` and `val/<class>/*` (or `valid`, `validation`), one of the last two being the
    test split where there is no other, or without a test split `<class>/*` alone: JPEG, PNG or WebP files. Sorted class
    names, in Unicode's form NFC, are the labels, sorted file names the order; hidden files, and files without the
    suffix of an image, are left out.

    Raises:
        UserError: a folder that is missing, a class that is empty or in one split only, fewer than two classes, or
            files that are not images.
    """
    folders = _find_splits(root, options)
    classes = {split: _list_classes(folder) for split, folder in folders.items()}
    if "test" not in folders and not options.holds_out:
        remedy = ", or give --val_split to hold out a part of the training images" if options.train else ""
        raise UserError(f"{root} has no folder test/ or val/ with folders of images: add one{remedy}")
    for here, there in itertools.permutations(folders, 2):
        if missing := [name for name in classes[here] if name not in classes[there]]:
            names = first_names(missing)
            raise UserError(f"{folders[there]} lacks classes that {folders[here]} has: {names}")
    samples, others = {}, []
    for split, folder in folders.items():
        samples[split], skipped = _list_samples(folder, classes[split])
        others += skipped
    note_skipped(root, others)
    class_names = list(next(iter(classes.values())))
    return _load(root, class_names, samples, options)


def _find_splits(root: Path, options: ReadOptions) -> dict[str, Path]:
    """The folders of the splits that are to be read, by name; a line about what lies beside them."""
    if not root.is_dir():
        raise UserError(f"{root} is not a directory: give one to --data_path")
    found = {}
    for name in ("train", "test", *VALIDATION):
        if (root / name).is_dir():
            found.setdefault("val" if name in VALIDATION else name, root / name)
    if "test" in found and not _subfolders(found["test"]) and ("val" in found or options.holds_out):
        note(f"{found.pop('test')} holds no folder of images: there is no test split")
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")
    if not options.train:
        found.pop("train", None)
    elif not found:
        return {"train": root}  # one folder of classes
    elif "train" not in found and not options.val_only:
        raise UserError(f"{root} has a folder {found['test'].name}/ but none of the name train/")
    used = {"train", "test", *(folder.name for folder in found.values())}
    others = {name for name in os.listdir(root) if name[0] != "." and not is_cache(name)} - used
    if others:
        note(f"not used: {first_names(sorted(others))} in {root}")
    return found


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """The subfolders of `folder` by the class that they are, sorted. One class may have several, of one name that
    Unicode writes in several ways."""
    names = [(unicodedata.normalize("NFC", name), name) for name in _subfolders(folder)]
    classes = {}
    for class_name, name in sorted(names):
        classes.setdefault(class_name, []).append(folder / name)
    splits = [name for name in classes if name.lower() in SPLITS]
    if not classes:
        raise UserError(f"{folder} holds no folder of images: it must be {folder}/<class>/<image>")
    if len(splits) > 1:  # one may be a class, as CIFAR-100's train is
        names = ", ".join(splits)
        raise UserError(f"{folder} holds {names} in place of classes: name them train and test, or give one of them")
    if len(classes) == 1:
        [name] = classes
        inner = " (are the folders in it the classes? move them up)" if _subfolders(folder / name) else ""
        raise UserError(f"{folder} holds one class, {name}{inner}: it must be {folder}/<class>/<image>")
    return classes


def _subfolders(folder: Path) -> list[str]:
    """Names, without hidden ones."""
    try:
        return [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as e:
        raise UserError(f"{folder} cannot be read ({e.strerror})") from None


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
    if not folder.is_dir():
        with _fetching(archive, {archive: TINY_IMAGENET_MD5}, options.val_only):
            if options.val_only:
                raise FileNotFoundError
            from torchvision.datasets.utils import download_and_extract_archive

            # Renamed when complete, so that a folder of that name is never half of one.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as unpacked:
                download_and_extract_archive(
                    TINY_IMAGENET_URL, folder.parent, unpacked, archive.name, TINY_IMAGENET_MD5
                )
                os.rename(Path(unpacked) / name, folder)

    remedy = f"unpack {archive.name} again"
    classes = _list_classes(folder / "train")
    class_ids = list(classes)
    if len(class_ids) != TINY_IMAGENET_CLASSES:
        raise UserError(f"{folder / 'train'} has {len(class_ids)} classes, not {TINY_IMAGENET_CLASSES}: {remedy}")
    samples, val = {}, folder / "val"
    train, others = _list_samples(folder / "train", classes)
    if options.train:
        samples["train"] = train
    if (val / class_ids[0]).is_dir():
        samples["test"], skipped = _list_samples(val, {name: [val / name] for name in class_ids})
    else:
        samples["test"], skipped = _read_annotations(val, class_ids, remedy)
    annotations = ("_boxes.txt", "val_annotations.txt")
    note_skipped(folder, [file for file in others + skipped if not file.endswith(annotations)])
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
    listed, there = Counter(files), Counter(images)
    if odd := (listed - there) | (there - listed):
        number = f" (one of {len(odd)})" if len(odd) > 1 else ""
        raise UserError(f"{min(odd)}{number} must be there, and be listed in {annotations}, once: {remedy}")
    return Samples(files, labels), others


def _read_words(path: Path, class_ids: list[str]) -> list[str]:
    """The first name of each class in `words.txt`; its id where there is none."""
    content = path.read_text(errors="replace") if path.exists() else ""
    names = {}
    for line in content.splitlines():
        class_id, _, words = line.partition("\t")
        names[class_id] = words.split(",")[0]
    return [names.get(class_id) or class_id for class_id in class_ids]


def _list_samples(folder: Path, classes: dict[str, list[Path]]) -> tuple[Samples, list[str]]:
    """The images of the classes in `folder`, sorted by name; and all files left out."""
    others = sorted(entry.path for entry in os.scandir(folder) if not entry.is_dir() and not is_cache(entry.name))
    samples = Samples([], [])
    for label, folders in enumerate(classes.values()):
        for of_class in folders:
            images, skipped = list_images(of_class)
            if not images:
                raise UserError(f"{of_class} holds no image")
            samples.files.extend(images)
            samples.labels.extend([label] * len(images))
            others += skipped
    return samples, others


def _load(folder: Path, class_names: list[str], samples: dict[str, Samples], options: ReadOptions) -> Images:
    splits, sides = {}, []
    for name, part in samples.items():
        decoded = load_images(folder, name, part.files, options)
        splits[name] = Split(decoded.images, np.array(part.labels), decoded.file_digests)
        sides.extend(decoded.sides)
    size, side = options.size, np.median(sides)
    if side > 2 * size:
        note(f"images in {folder} are brought to {size} x {size} pixels; half are {side:.0f} or more high and wide")
    return Images(splits, class_names)


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
