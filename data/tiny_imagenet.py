"""Tiny-ImageNet in its official layout, read in place; pixels are decoded once, into one cache file.

tiny-imagenet-200/
    wnids.txt                      one class id a line
    words.txt                      class id, tab, names; not needed
    train/<wnid>/images/*.JPEG
    train/<wnid>/<wnid>_boxes.txt  a line an image; not needed
    val/images/*.JPEG
    val/val_annotations.txt        file, tab, class id, ...
"""

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.utils import download_url, extract_archive
from tqdm import tqdm

from data.files import Split, alone, fetching, say
from utils import distributed
from utils.errors import UserError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
NAME = "tiny-imagenet-200"
NUM_CLASSES = 200
ANEW = f"unpack {NAME}.zip anew"  # the remedy for a folder that is not as it should be
FILES_A_TASK = 256  # a fraction of a second: long beside the cost of a task, short for the progress bar


def read(root: Path, workers: int) -> tuple[Split, Split, list[str]]:
    """(train, validation, class names), images (M, H, W, 3) at the files' own size, usually 64 x 64.

    `root` is the folder `tiny-imagenet-200` or the one above it, and is downloaded to where there is
    neither. Classes are in order of their ids; training files class by class in natural order
    (2 before 10); validation files in the annotations' order. Up to `workers` processes decode.

    Raises UserError naming the first file that is missing, damaged or unexpected.
    """
    folder = _folder(root.absolute())
    wnids = sorted(set(_lines(folder / "wnids.txt")))
    if len(wnids) != NUM_CLASSES:
        raise UserError(f"{folder / 'wnids.txt'} names {len(wnids)} classes, not {NUM_CLASSES}: {ANEW}")
    train = [_class_files(folder / "train" / wnid) for wnid in wnids]
    val, val_labels = _val_files(folder / "val", {wnid: label for label, wnid in enumerate(wnids)})
    images = _images(folder, [file for files in train for file in files] + val, workers)

    num_train = len(images) - len(val)
    train_labels = np.repeat(np.arange(NUM_CLASSES), [len(files) for files in train])
    words = folder / "words.txt"
    names = dict(line.split("\t", 1) for line in _lines(words) if "\t" in line) if words.is_file() else {}
    return (
        Split(images[:num_train], train_labels),
        Split(images[num_train:], np.array(val_labels)),
        [names.get(wnid, wnid).split(",")[0] for wnid in wnids],
    )


def _folder(root: Path) -> Path:
    """The dataset's folder: `root` itself or the one in it, downloaded where there is neither."""
    inner = root / NAME
    if inner.is_dir():
        return inner
    if any((root / part).exists() for part in ("wnids.txt", "train", "val")):
        return root
    if root.name == NAME:
        inner, root = root, root.parent
    with fetching(root, f"{NAME}.zip", f"put that file there or unpack it there, from {URL}"):
        if not inner.is_dir():  # another process may have been first
            download_url(URL, root, f"{NAME}.zip", MD5)
            # Renamed when whole, so that a folder of that name is never half of one.
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{NAME}-") as unpacked:
                extract_archive(root / f"{NAME}.zip", unpacked)
                os.rename(Path(unpacked) / NAME, inner)
    return inner


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {ANEW}") from error


def _image_files(folder: Path) -> dict[str, os.DirEntry]:
    """name: entry of the images in `folder`, in natural order."""
    try:
        entries = [
            entry
            for entry in os.scandir(folder)
            if not entry.name.startswith(".") and entry.name.lower().endswith((".jpeg", ".jpg", ".png"))
        ]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): {ANEW}") from error
    by_name = {entry.name: entry for entry in entries}
    return {name: by_name[name] for name in sorted(sorted(by_name), key=_natural)}


def _natural(name: str) -> list[str | int]:
    """A key that compares runs of digits as numbers; re.split puts those at the odd places."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _class_files(folder: Path) -> list[os.DirEntry]:
    """The training images of the class in `folder`, all of those that its list of boxes names."""
    files = _image_files(folder / "images")
    if not files:
        raise UserError(f"{folder / 'images'} holds no image: {ANEW}")
    boxes = folder / f"{folder.name}_boxes.txt"
    for line in _lines(boxes) if boxes.is_file() else []:
        name = line.split("\t")[0]
        if name not in files:
            raise UserError(f"{folder / 'images' / name} is missing, {boxes.name} lists it: {ANEW}")
    return list(files.values())


def _val_files(folder: Path, label_of: dict[str, int]) -> tuple[list[os.DirEntry], list[int]]:
    """Images and labels in the order of `val_annotations.txt`, which must name every image once."""
    annotations, files = folder / "val_annotations.txt", _image_files(folder / "images")
    ordered, labels = [], []
    for line in _lines(annotations):
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in label_of:
            raise UserError(f"{annotations} gives {name} the class {wnid!r}, which wnids.txt does not name")
        if name not in files:
            raise UserError(f"{folder / 'images' / name} is missing, or named twice in {annotations}")
        ordered.append(files.pop(name))
        labels.append(label_of[wnid])
    if files:
        raise UserError(f"{folder / 'images' / next(iter(files))} has no class in {annotations}")
    if not labels:
        raise UserError(f"{annotations} names no image: {ANEW}")
    return ordered, labels


def _images(folder: Path, files: list[os.DirEntry], workers: int) -> np.ndarray:
    """(len(files), H, W, 3) uint8, from the cache in `folder` or decoded and then cached."""
    stats = [file.stat() for file in files]
    facts = [
        (file.path[len(str(folder)) :], stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)
    ]
    cache = folder / f"decoded-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.npy"
    images = _load(cache, len(files))
    if images is None:
        with alone(folder):
            images = _load(cache, len(files))  # another process may have been first
            if images is None:
                images = _decode([file.path for file in files], workers)
                _store(cache, images)
    return images


def _load(cache: Path, num: int) -> np.ndarray | None:
    """The cached images, mapped, or None where there is no whole cache of `num` images."""
    try:
        images = np.load(cache, mmap_mode="r")
    except Exception:  # a damaged header raises nearly anything, and a new cache mends all of it
        return None
    whole = images.dtype == np.uint8 and images.ndim == 4 and images.shape[::3] == (num, 3)
    return images if whole and images.flags.c_contiguous else None


def _store(cache: Path, images: np.ndarray) -> None:
    """Write the cache whole or not at all, and remove those of other states of the files."""
    part = cache.with_suffix(f".{os.getpid()}.part")
    try:
        try:
            with open(part, "wb") as file:
                np.save(file, images)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, cache)
        finally:
            part.unlink(missing_ok=True)
        for other in set(cache.parent.glob("decoded-*")) - {cache}:
            other.unlink(missing_ok=True)
    except OSError as error:
        say(f"{cache.parent} takes no cache ({error.strerror}): every start will decode the images anew")


def _decode(paths: list[str], workers: int) -> np.ndarray:
    """Files -> (len(paths), H, W, 3) uint8, at the size that most of them have."""
    sizes = Counter()
    for path in paths[:: max(1, len(paths) // NUM_CLASSES)]:  # a header a class will tell
        with _opened(path) as image:
            sizes[image.size] += 1
    width, height = sizes.most_common(1)[0][0]
    images = np.empty((len(paths), height, width, 3), dtype=np.uint8)
    starts = range(0, len(paths), FILES_A_TASK)
    tasks = [(paths[start : start + FILES_A_TASK], width, height) for start in starts]
    workers = min(workers, os.cpu_count() or 1, len(tasks))
    pool = None
    if workers > 1:
        # forkserver: forking this process would copy the state of its CUDA and OpenMP threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        with tqdm(
            total=len(paths),
            desc=f"decoding {NAME}",
            unit="image",
            leave=False,
            disable=not (distributed.is_main() and sys.stderr.isatty()),
        ) as bar:
            for start, part in zip(starts, (pool.map if pool else map)(_decode_task, tasks), strict=True):
                images[start : start + len(part)] = part
                bar.update(len(part))
    except BrokenProcessPool as error:
        raise UserError("a decoding process died, for lack of memory perhaps: reduce --workers") from error
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return images


def _start_worker() -> None:
    """Leave interrupts, which reach the whole process group, to the parent; end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)  # the main thread may wait for tasks for ever

    threading.Thread(target=end_with_parent, daemon=True).start()


def _decode_task(task: tuple[list[str], int, int]) -> np.ndarray:
    paths, width, height = task
    return np.stack([_pixels(path, width, height) for path in paths])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # each file format has exceptions of its own
        raise UserError(f"{path} is not a whole image ({error}): {ANEW}") from error


def _pixels(path: str, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8, RGB; transparency is dropped, as ImageFolder does."""
    with _opened(path) as image:
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to 8
            image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if "transparency" in image.info:  # of a palette, say: convert() wants it made a channel first
            image = image.convert("RGBA")
        image = image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)  # antialiased, in Pillow
        return np.asarray(image)
