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
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from tqdm import tqdm

from utils import distributed
from utils.runtime import UserError, first_line

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
CIFAR_SIZES = (50_000, 10_000)  # training and test images of both
CACHE = "decoded-images.npz"


class Split(NamedTuple):
    """Decoded images in file order: images uint8 (M, H, W, 3), RGB; labels int64 (M,)."""

    images: np.ndarray
    labels: np.ndarray


class Images(NamedTuple):
    """A data set: the training split, the test split, and the class names in label order."""

    train: Split
    test: Split
    class_names: list[str]


def read_cifar(kind: type[CIFAR10], root: Path, workers: int, read_only: bool) -> Images:
    """CIFAR-10 or CIFAR-100, 50,000 training and 10,000 test images (M, 32, 32, 3), from torchvision's files or, where
    those are missing, from folders of classes; else downloaded.

    Raises:
        UserError: damaged files by name, or files that are missing and cannot be fetched.
    """
    folder = root / kind.base_folder
    if not folder.is_dir() and (root / "train").is_dir():
        return _cifar_of_folders(kind, root, workers, read_only)
    try:
        parts = [kind(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError):
        files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        damaged = [str(folder / name) for name, md5 in files if _is_damaged(folder / name, md5)]
        problem = f"the checksum of {damaged[0]} is wrong" if damaged else f"{folder} is missing or not complete"
        with fetching(root / kind.filename, kind.tgz_md5, problem, read_only):
            parts = [kind(root, train=train, download=True) for train in (True, False)]
    train, test = (Split(part.data, np.array(part.targets, dtype=np.int64)) for part in parts)
    return Images(train, test, parts[0].classes)


def _cifar_of_folders(kind: type[CIFAR10], root: Path, workers: int, read_only: bool) -> Images:
    """The same images from folders of classes; sorted class names are both sets' label order."""
    images = read_folder(root, workers, read_only)
    classes = 100 if kind is CIFAR100 else 10
    height, width = images.train.images.shape[1:3]
    counts = [np.bincount(split.labels) for split in (images.train, images.test)]
    train, test = (" to ".join(map(str, sorted({count.min(), count.max()}))) for count in counts)
    contents = "{} classes of {} training and {} test images of {} x {} pixels".format
    found = contents(len(images.class_names), train, test, width, height)
    expected = contents(classes, *(num // classes for num in CIFAR_SIZES), 32, 32)
    if found != expected:
        raise UserError(f"{root} is not {kind.__name__}: it has {found}, not {expected}; use --data_type folder")
    return images


def read_folder(root: Path, workers: int, read_only: bool) -> Images:
    """`train/<class>/*` and `test/` or `val/<class>/*`, JPEG or PNG files of one size; sorted class names are the
    labels, sorted file names the order.

    Raises:
        UserError: a class that is empty or in one split only, a file that is not an image, or images of two sizes.
    """
    test_name = "test" if (root / "test").is_dir() else "val"
    listed = [_list_classes(root / name) for name in ("train", test_name)]
    for one, other, name in ((0, 1, test_name), (1, 0, "train")):
        if only := sorted(listed[one].keys() - listed[other].keys()):
            raise UserError(f"{root}: class {only[0]} has no folder in {name}/")
    files = [file for classes in listed for of_class in classes.values() for file in of_class]
    images = _decode(root, files, workers, read_only)
    labels = [np.repeat(np.arange(len(classes)), [len(f) for f in classes.values()]) for classes in listed]
    train, test = images[: len(labels[0])], images[len(labels[0]) :]
    return Images(Split(train, labels[0]), Split(test, labels[1]), list(listed[0]))


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its files, both sorted; hidden files are left out."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory; --data_type folder needs train/<class>/ and test/<class>/")
    return {entry.name: _list_files(entry) for entry in _list_files(folder, "class folder")}


def _list_files(folder: Path, kind: str = "image") -> list[Path]:
    """What a folder holds, sorted, less what is hidden; `kind` is what it should hold."""
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as e:
        raise UserError(f"{folder} cannot be read as a folder ({e.strerror})") from None
    if not files:
        raise UserError(f"{folder} holds no {kind}")
    return files


def read_tiny_imagenet(root: Path, workers: int, read_only: bool) -> Images:
    """Tiny-ImageNet in its official layout, 200 classes, images (M, H, W, 3) at the files' own size, usually 64 x 64:

        wnids.txt                        one class id per line
        words.txt                        class id, tab, names; not needed
        train/<wnid>/images/*.JPEG
        val/images/*.JPEG
        val/val_annotations.txt          file, tab, class id, ...

    `root` is the folder `tiny-imagenet-200` or its parent. Classes are sorted by id, training files by name,
    validation files in the annotations' order.

    Raises:
        UserError: the first file that is missing, damaged or unexpected, by name.
    """
    name = "tiny-imagenet-200"
    folder = root if root.name == name or (root / "wnids.txt").exists() else root / name
    if not folder.is_dir():
        archive = folder.with_name(f"{name}.zip")
        with fetching(archive, TINY_IMAGENET_MD5, f"{folder} is missing", read_only):
            download_url(TINY_IMAGENET_URL, folder.parent, archive.name, TINY_IMAGENET_MD5)
            # Renamed when complete, so that a folder of that name is never half of one.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as unpacked:
                extract_archive(archive, unpacked)
                os.rename(Path(unpacked) / name, folder)
    wnids = sorted(set(_lines(folder / "wnids.txt")))
    if len(wnids) != 200 or not all(wnid.isalnum() for wnid in wnids):
        raise UserError(f"{folder / 'wnids.txt'} does not list 200 class ids: unpack {name}.zip again")
    train = [_list_files(folder / "train" / wnid / "images") for wnid in wnids]
    annotations, val_images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    label_of, val = {wnid: label for label, wnid in enumerate(wnids)}, {}
    for line in _lines(annotations):
        file, wnid = [*line.split("\t"), ""][:2]
        if wnid not in label_of or "/" in file or not file.isprintable() or val_images / file in val:
            raise UserError(f"{annotations} gives {file!r} the class {wnid!r}: not one name and one id of wnids.txt")
        val[val_images / file] = label_of[wnid]
    if unlisted := sorted(set(_list_files(val_images)) ^ val.keys()):
        raise UserError(f"{unlisted[0]} is missing, or has no class in {annotations}: unpack {name}.zip again")
    images = _decode(folder, [file for files in train for file in files] + list(val), workers, read_only)
    labels = np.repeat(np.arange(200), [len(files) for files in train])
    words = folder / "words.txt"
    names = dict(line.split("\t", 1) for line in _lines(words) if "\t" in line) if words.is_file() else {}
    return Images(
        Split(images[: len(labels)], labels),
        Split(images[len(labels) :], np.array(list(val.values()))),
        [names.get(wnid, wnid).split(",")[0][:80] for wnid in wnids],  # a caption, however long the file's line
    )


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    _stat(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None
    return [line.strip() for line in lines if line.strip()]


def _stat(path: Path) -> os.stat_result:
    """Size and times of a regular file; of a pipe or a device, reading might never end."""
    try:
        facts = path.stat()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None
    if not stat.S_ISREG(facts.st_mode):
        raise UserError(f"{path} is not a regular file")
    return facts


def _is_damaged(path: Path, md5: str) -> bool:
    return path.exists() and not check_integrity(str(path), md5)


@contextlib.contextmanager
def fetching(archive: Path, md5: str, problem: str, read_only: bool) -> Iterator[None]:
    """Around torchvision's download helpers, which raise a dozen types for network, disk and archive.

    Raises:
        UserError: for all of them; the remedy is the same, the archive by hand.
    """
    folder = archive.parent
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if read_only:
            raise OSError("--val_only downloads nothing; give --data_path")
        folder.mkdir(parents=True, exist_ok=True)
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with quiet:
            yield
    except Exception as e:
        if _is_damaged(archive, md5):
            problem += f", the checksum of {archive} is wrong"
        raise UserError(
            f"{problem}, and {archive.name} could not be fetched ({first_line(e)}): put that file into {folder}, or use"
            " --data_type synthetic, which needs no files"
        ) from None
    finally:
        for path in missing:  # leave no empty folder behind
            with contextlib.suppress(OSError):
                path.rmdir()


def _decode(folder: Path, files: list[Path], workers: int, read_only: bool) -> np.ndarray:
    """(len(files), H, W, 3) uint8, from the cache in `folder`, or decoded and then cached there.

    The cache is used if its checksum is right and it was made of files of these names, sizes and times.
    """
    facts = [
        (str(file.relative_to(folder)), info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        for file, info in zip(files, map(_stat, files), strict=True)
    ]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    cache = folder / CACHE
    try:
        with np.load(cache) as arrays:  # reading verifies the zip's checksums
            if str(arrays["key"]) == key:
                return arrays["images"]
    except Exception:  # missing, or damaged, for which every part of the format has an exception of its own
        pass  # made again
    height, width = read_pixels(files[0]).shape[:2]
    images = np.empty((len(files), height, width, 3), dtype=np.uint8)

    def decode(i: int) -> None:
        pixels = read_pixels(files[i])
        if pixels.shape[:2] != (height, width):
            raise UserError(
                f"{files[i]} is {pixels.shape[1]} x {pixels.shape[0]} pixels, {files[0]} {width} x {height}: resize the"
                " images to one size"
            )
        images[i] = pixels

    hidden = not (distributed.is_main() and sys.stderr.isatty())
    with ThreadPoolExecutor(max(1, min(workers, os.cpu_count() or 1))) as pool:
        tasks = pool.map(decode, range(len(files)))
        try:
            for _ in tqdm(tasks, f"decoding {folder.name}", len(files), unit="img", leave=False, disable=hidden):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not read_only:
        _store(cache, key, images)
    return images


def _store(cache: Path, key: str, images: np.ndarray) -> None:
    part = cache.with_name(f".{cache.name}.{uuid.uuid4().hex}")  # process ids recur in containers
    try:
        with open(part, "xb") as f:
            np.savez(f, key=key, images=images)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, cache)
    except OSError as e:
        print(f"note: {cache} cannot be written ({e.strerror}): every start decodes the images again", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_pixels(path: Path) -> np.ndarray:
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
