"""Image files: which of a folder's files they are, their pixels, and one cache of a data set's decoded images."""

import contextlib
import hashlib
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from utils import launch
from utils.errors import UserError, first_line, printable, tell
from utils.files import write_atomic

FORMATS = ("JPEG", "PNG", "WEBP")
# Files of these suffixes are images: to be read, or an error. All others are left out.
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
SUFFIXES |= {".avif", ".bmp", ".gif", ".heic", ".heif", ".pgm", ".ppm", ".tif", ".tiff"}  # of other formats
CACHE = "decoded-images.npz"
VERSION = 2  # of the pixels in it: since 2 they are upright
LARGEST = 512  # pixels, the largest --image_size: no network sees more of an image, so that larger ones are not kept

ORIENTATION = 0x0112  # of EXIF's tags; its values, and what makes an image upright:
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

warnings.filterwarnings("ignore", module="PIL")  # about images that it reads all the same

Size = tuple[int, int]  # height, width in pixels
Arrays = dict[str, np.ndarray]  # of each split, by its name: (M, H, W, 3) uint8, RGB


class ReadOptions(NamedTuple):
    """How a data set is read."""

    image_size: int  # --image_size
    size: Size | None = None  # to which all images are brought; None: what `stored_size` chooses
    train: bool = True  # False: the test split alone is read
    needs_test: bool = True  # False: a test split is read if there is one
    workers: int = 8  # threads that decode
    read_only: bool = False  # download nothing, write nothing

    def stored_size(self, own_size: Size | tuple[()] | None) -> Size:
        """`size`, or the images' own, where they have one that is not too large, or else --image_size squared."""
        return self.size or own_size or (self.image_size, self.image_size)


def list_images(folder: str | Path) -> tuple[list[str], list[str]]:
    """The image files in a folder and below it, sorted by folder, then name; and the other files, hidden ones and
    those whose suffix is not an image's."""
    images, others = [], []
    for parent, names in sorted(_walk(folder)):
        for name in sorted(names):
            path = os.path.join(parent, name)
            is_hidden = "/." in path.removeprefix(str(folder))
            is_image = Path(name).suffix.lower() in SUFFIXES
            (images if is_image and not is_hidden else others).append(path)
    return images, others


def _walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """The folders at and below `folder`, each once, though links may lead to one again, and the names in them."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        where = os.path.realpath(parent)
        if where in seen:
            folders.clear()
            continue
        seen.add(where)
        folders.sort()
        yield parent, names


def note_skipped(folder: str | Path, others: list[str]) -> None:
    """One line on standard error that counts the files which `list_images` left out."""
    if others:
        files = "file" if len(others) == 1 else "files"
        first = os.path.relpath(others[0], folder)
        _print_note(f"skipped {len(others)} hidden or foreign {files} in {folder}, the first of them {first}")


@cache  # a process may read a data set more than once
def _print_note(text: str) -> None:
    if launch.WORLD.is_local_main:
        tell(f"note: {printable(text)}", sys.stderr)


def read_image(path: str | Path, size: Size | None = None) -> np.ndarray:
    """(H, W, 3) uint8, RGB, of a JPEG, PNG or WebP file: upright, as its EXIF orientation says; without transparency;
    16 bits of a colour cut to the upper 8.

    Bytes altered inside a JPEG or a PNG may decode to other pixels without an error: Pillow does not notice.

    Args:
        size: (H, W); an image of another size is resized, antialiased, the shorter side first, and cut centrally.

    Raises:
        UserError: the file is not such an image; names it.
    """
    with _open(path) as image:
        image.load()
        if image.mode.startswith("I"):  # conversion would cut it off at level 255
            raise UserError(f"{path} is a 16-bit grey PNG: convert it to 8 bits")
        turn = UPRIGHT.get(_orientation(image.getexif))
        image = image.convert("RGB")
        if turn is not None:
            image = image.transpose(turn)
        if size not in (None, (image.height, image.width)):
            image = _fit(image, size)
        return np.asarray(image)


def _fit(image: Image.Image, size: Size) -> Image.Image:
    """Resized, antialiased bilinear, until it just covers `size`, and cut to it centrally. Of a square that is
    torchvision's Resize (the shorter side) and CenterCrop."""
    height, width = size
    covering_height = max(height, width * image.height // image.width)
    covering_width = max(width, height * image.width // image.height)
    if covering_height * covering_width > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow")
    image = image.resize((covering_width, covering_height), Image.Resampling.BILINEAR)
    top = round((covering_height - height) / 2)
    left = round((covering_width - width) / 2)
    return image.crop((left, top, left + width, top + height))


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    """Raises UserError, naming the file, for whatever goes wrong within."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe might never end
            raise UserError(f"{path} is not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a JPEG, PNG or WebP image") from None
    except Exception as e:  # each file format has exceptions of its own
        if getattr(e, "strerror", None):  # the system's, of the file itself
            raise UserError(f"{path} cannot be read ({e.strerror})") from None
        raise UserError(f"{path} is not an intact JPEG, PNG or WebP image ({first_line(e)})") from None


def _orientation(getexif: Callable[[], Image.Exif]) -> int:
    """1 to 8; 1, upright, where there is no EXIF record or a damaged one."""
    try:
        return getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's parsers raise half a dozen types
        return 1


def _read_size(path: str) -> Size | None:
    """Of an upright image, from the file's header; None where it has none that is intact."""
    try:
        with _open(path) as image:
            # A PNG's own getexif would decode the image, to look behind its pixels.
            orientation = _orientation(partial(Image.Image.getexif, image))
            width, height = image.size
            return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    except UserError:  # decoding reports it
        return None


def load_images(folder: Path, splits: dict[str, list[str]], options: ReadOptions) -> Arrays:
    """The images of each split's files, (M, H, W, 3) uint8, all of one size, from the cache in `folder`, or decoded and
    then cached there.

    A split is taken from the cache if its checksum is right and it was made of files of these names, sizes and times.

    Raises:
        UserError: files that are not images, by name; or too little memory.
    """
    cache_file = folder / CACHE
    keys = {name: _key(folder, files) for name, files in splits.items()}
    images = _read_cache(cache_file, splits, keys, options)
    if images is None:
        own_size = _common_size([file for files in splits.values() for file in files], options.workers)
        images = _decode_splits(splits, own_size, options)
        if not options.read_only:
            _write_cache(cache_file, keys, images, own_size)
    return images


def _key(folder: Path, files: list[str]) -> str:
    facts = []
    for file in files:
        info = os.stat(file)
        facts.append((os.path.relpath(file, folder), info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    return hashlib.sha256(repr((VERSION, facts)).encode()).hexdigest()


def _read_cache(path: Path, splits: dict, keys: dict[str, str], options: ReadOptions) -> Arrays | None:
    """The arrays of the splits with these keys; None where they are missing, damaged, or have another size than
    decoding would give them."""
    images = {}
    # Missing, or damaged, for which every part of the format has an exception of its own: made again.
    with contextlib.suppress(Exception), np.load(path) as arrays:
        own_size = tuple(arrays["own_size"].tolist())
        size = options.stored_size(own_size)
        for name, files in splits.items():
            if str(arrays[f"{name}_key"]) != keys[name]:
                continue
            pixels = arrays[name]
            if pixels.shape == (len(files), *size, 3):  # read to its end, so that the zip's checksum was verified
                images[name] = pixels
    return images if images.keys() == splits.keys() else None


def _write_cache(path: Path, keys: dict[str, str], images: Arrays, own_size: Size | None) -> None:
    arrays = {**images, "own_size": own_size or ()}
    for name, key in keys.items():
        arrays[f"{name}_key"] = key
    megabytes = sum(part.nbytes for part in images.values()) / 1e6
    if launch.WORLD.is_local_main:
        tell(f"writing {path} ({megabytes:.1f} MB), which later starts read in place of the image files")
    try:
        write_atomic(path, lambda file: np.savez(file, **arrays))
    except UserError:
        _print_note(f"{path} cannot be written: every start decodes the images again")


def _decode_splits(splits: dict[str, list[str]], own_size: Size | None, options: ReadOptions) -> Arrays:
    """Raises UserError, which names the first ten files that are not images, or says what does not fit into memory."""
    size = options.stored_size(own_size)
    images, errors = {}, []
    try:
        for name, files in splits.items():
            images[name], found = _decode(files, size, options.workers)
            errors += found
    except MemoryError:
        num = sum(len(files) for files in splits.values())
        raise _too_large(num, size, size == own_size) from None
    if errors:
        named = "; ".join(errors[:10])
        more = f"; and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise UserError(named + more)
    return images


def _too_large(num: int, size: Size, is_own_size: bool) -> UserError:
    height, width = size
    gigabytes = num * height * width * 3 / 1e9
    what = f"{num} images of {height} x {width} pixels ({gigabytes:.3g} GB) do not fit into memory"
    remedy = "use fewer or smaller image files" if is_own_size else "use fewer image files, a lower --image_size"
    return UserError(f"{what}: {remedy}, or fewer --workers, each of which decodes one at a time")


def _common_size(files: list[str], workers: int) -> Size | None:
    """The size that all images have; None where they have several, or one too large to be kept."""

    def sizes(rows: range) -> set[Size]:
        return {_read_size(files[row]) for row in rows} - {None}

    found = set()
    with _in_threads(sizes, len(files), workers) as results:
        for _, some in results:
            found |= some
            if len(found) > 1:
                return None
    common = found.pop() if found else None
    return common if common and max(common) <= LARGEST else None


def _decode(files: list[str], size: Size, workers: int) -> tuple[np.ndarray, list[str]]:
    """(len(files), *size, 3) uint8, RGB; and a line for each file that is not an image."""
    images = np.empty((len(files), *size, 3), dtype=np.uint8)

    def decode(rows: range) -> list[str]:
        errors = []
        for row in rows:
            try:
                images[row] = read_image(files[row], size)
            except UserError as e:
                errors.append(str(e))
        return errors

    errors = []
    bar = tqdm(desc="decoding", total=len(files), unit="img", leave=False, disable=None)
    with bar, _in_threads(decode, len(files), workers) as results:
        for rows, some in results:
            errors += some
            bar.update(len(rows))
    return images, errors


@contextlib.contextmanager
def _in_threads(function: Callable, num: int, workers: int) -> Iterator[Iterator[tuple]]:
    """Gives (rows, function(rows)) for parts of the rows 0 .. num - 1, in order. Threads share memory and import
    nothing."""
    step = min(32, 1 + num // (8 * max(1, workers)))  # a task per file would take more memory than small images
    parts = [range(num)[start : start + step] for start in range(0, num, step)]
    # Closing the results cancels what has not begun, after an error or a signal.
    with ThreadPoolExecutor(max(1, workers)) as pool, contextlib.closing(pool.map(function, parts)) as results:
        yield zip(parts, results, strict=True)
