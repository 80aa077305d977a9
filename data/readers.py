"""Files to uint8 arrays: CIFAR, Tiny-ImageNet, a folder of classes; decoded once, into one cache file with checksums.

Every reader is `read(root, workers, read_only) -> Images`. `root` is `--data_path`, `workers` the number of threads
that decode, and with `read_only` nothing is downloaded or written.
"""

import contextlib
import hashlib
import io
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from tqdm import tqdm

from utils.errors import UserError, first_line
from utils.files import write_atomic

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
CIFAR_SIZES = (50_000, 10_000)  # training and test images of both
CACHE = "decoded-images.npz"
Samples = list[tuple[str, int]]  # (file, label) pairs, as torchvision's make_dataset lists them


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
        return self.select(np.sort(np.lexsort((self.labels, rank_in_class))[:limit]))

    def digest(self) -> str:
        """Of sizes, pixels, labels and their order: 32 hexadecimal digits. A gigabyte of pixels takes a second."""
        digest = hashlib.blake2b(repr(self.images.shape).encode(), digest_size=16)
        digest.update(self.labels.astype("<i8"))
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()


class Images(NamedTuple):
    """A data set: the training split, the test split, and the class names in label order."""

    train: Split
    test: Split
    class_names: list[str]


def read_cifar(kind: type[CIFAR10], root: Path, workers: int, read_only: bool) -> Images:
    """CIFAR-10 or CIFAR-100, 50,000 training and 10,000 test images (M, 32, 32, 3), from torchvision's files or, where
    those are missing, from folders of classes, whose sorted names are its label order; else downloaded.

    Raises:
        UserError: damaged files by name, files that are missing and cannot be fetched, or folders of something else.
    """
    folder, archive = root / kind.base_folder, root / kind.filename
    if not folder.is_dir() and (root / "train").is_dir():
        images = read_folder(root, workers, read_only)
        found = (len(images.class_names), len(images.train.labels), *images.test.images.shape[:3])
        expected = (100 if kind is CIFAR100 else 10, *CIFAR_SIZES, 32, 32)
        if found != expected:
            text = f"{root} is not {kind.__name__}: its classes, training images, test images, height and width are"
            raise UserError(f"{text} {found}, not {expected}; use --data_type folder")
        return images
    checksums = {folder / name: md5 for name, md5 in kind.train_list + kind.test_list}
    checksums |= {folder / kind.meta["filename"]: kind.meta["md5"], archive: kind.tgz_md5}
    with _fetching(archive, checksums, read_only):
        train, test = (kind(root, train=is_train, download=not read_only) for is_train in (True, False))
    splits = [Split(part.data, np.array(part.targets)) for part in (train, test)]
    return Images(*splits, train.classes)


def read_folder(root: Path, workers: int, read_only: bool) -> Images:
    """`train/<class>/*` and `test/` or `val/<class>/*`, JPEG or PNG files of one size; sorted class names are the
    labels, sorted file names the order; what is hidden is left out.

    Raises:
        UserError: a class that is empty or in one split only, a file that is not an image, or images of two sizes.
    """
    test_name = "test" if (root / "test").is_dir() else "val"
    class_names, train = _list_images(root / "train")
    test_class_names, test = _list_images(root / test_name)
    in_one = set(class_names) ^ set(test_class_names)
    if in_one:
        raise UserError(f"{root}: class {min(in_one)} has no folder in one of train/ and {test_name}/")
    return _load(root, class_names, train, test, workers, read_only)


def read_tiny_imagenet(root: Path, workers: int, read_only: bool) -> Images:
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
    folder = root if root.name == name or (root / "wnids.txt").exists() else root / name
    archive = folder.with_name(f"{name}.zip")
    if not folder.is_dir():
        with _fetching(archive, {archive: TINY_IMAGENET_MD5}, read_only):
            if read_only:
                raise FileNotFoundError
            download_url(TINY_IMAGENET_URL, folder.parent, archive.name, TINY_IMAGENET_MD5)
            # Renamed when complete, so that a folder of that name is never half of one.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as unpacked:
                extract_archive(archive, unpacked)
                os.rename(Path(unpacked) / name, folder)

    class_ids, train = _list_images(folder / "train")
    if len(class_ids) != 200:
        raise UserError(f"{folder / 'train'} has {len(class_ids)} classes, not 200: unpack {archive.name} again")
    _, val_files = _list_images(folder / "val")
    annotations = folder / "val" / "val_annotations.txt"
    try:
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
        val = [(str(folder / "val" / "images" / file), class_ids.index(class_id)) for file, class_id in rows]
    except (OSError, ValueError) as e:
        raise UserError(f"{annotations} is damaged ({first_line(e)}): unpack {archive.name} again") from None
    if sorted(file for file, _ in val) != [file for file, _ in val_files]:
        raise UserError(f"{annotations} does not list each file of val/images once: unpack {archive.name} again")
    words = folder / "words.txt"
    lines = words.read_text(errors="replace").splitlines() if words.exists() else []
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    class_names = [names.get(class_id, class_id).split(",")[0] for class_id in class_ids]
    return _load(folder, class_names, train, val, workers, read_only)


def _list_images(folder: Path) -> tuple[list[str], Samples]:
    """The classes, subfolders of `folder`, and the files in them, all sorted by name."""

    def is_image(path: str) -> bool:  # neither hidden nor Tiny-ImageNet's bounding boxes
        return "/." not in path.removeprefix(str(folder)) and not path.endswith("_boxes.txt")

    try:
        classes = [name for name in find_classes(folder)[0] if not name.startswith(".")]
        labels = {name: label for label, name in enumerate(classes)}
        return classes, make_dataset(folder, labels, is_valid_file=is_image)
    except (OSError, ValueError) as e:  # no such folder, no class in it, or a class without files
        raise UserError(f"{folder}/<class>/ must hold the images of each class: {first_line(e)}") from None


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
        damaged = [str(path) for path, md5 in checksums.items() if path.exists() and not check_integrity(path, md5)]
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


def _load(folder: Path, class_names: list[str], train: Samples, test: Samples, workers: int, read_only: bool) -> Images:
    """The images of both splits' files, from the cache in `folder`, or decoded and then cached there.

    The cache is used if its checksum is right and it was made of files of these names, sizes and times.
    """
    samples = train + test
    facts = []
    for file, _ in samples:
        info = os.stat(file)
        if not stat.S_ISREG(info.st_mode):  # reading a pipe might never end
            raise UserError(f"{file} is not a regular file")
        facts.append((os.path.relpath(file, folder), info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    cache = folder / CACHE
    images = None
    # Missing, or damaged, for which every part of the format has an exception of its own: made again.
    with contextlib.suppress(Exception), np.load(cache) as arrays:  # reading verifies the zip's checksums
        if str(arrays["key"]) == key:
            images = arrays["images"]
    if images is None:
        images = _decode([file for file, _ in samples], workers)
        if not read_only:
            content = io.BytesIO()
            np.savez(content, key=key, images=images)
            try:
                write_atomic(cache, content.getbuffer())
            except UserError:
                print(f"note: {cache} cannot be written: every start decodes the images again", file=sys.stderr)
    labels = np.array([label for _, label in samples])
    num = len(train)
    return Images(Split(images[:num], labels[:num]), Split(images[num:], labels[num:]), class_names)


def _decode(files: list[str], workers: int) -> np.ndarray:
    """(len(files), H, W, 3) uint8, RGB, decoded in `workers` threads: they share memory and import nothing."""
    height, width, _ = read_pixels(files[0]).shape
    images = np.empty((len(files), height, width, 3), dtype=np.uint8)
    # Closing the results cancels what has not begun, after an error or a signal.
    with ThreadPoolExecutor(max(1, workers)) as pool, contextlib.closing(pool.map(read_pixels, files)) as results:
        for i, pixels in enumerate(tqdm(results, "decoding", len(files), unit="img", leave=False, disable=None)):
            if pixels.shape != images.shape[1:]:
                raise UserError(f"{files[i]} and {files[0]} are not of one size: resize the images")
            images[i] = pixels
    return images


def read_pixels(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8, RGB, of a JPEG or PNG file; transparency is dropped.

    A JPEG whose bytes were altered in the middle decodes to other pixels without an error: Pillow does not report it.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.mode.startswith("I"):  # conversion would cut it off at level 255
                raise ValueError("16-bit grey; convert it to 8 bits")
            return np.asarray(image.convert("RGB"))
    except Exception as e:  # each file format has exceptions of its own
        raise UserError(f"{path} is not an intact JPEG or PNG image ({first_line(e)})") from None
