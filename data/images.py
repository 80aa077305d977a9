"""Image files: which of a folder's files they are, their pixels, and a cache of what was decoded."""

import contextlib
import hashlib
import io
import os
import stat
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from utils import launch
from utils.errors import UserError, first_line, first_names, printable, tell
from utils.files import write_atomic

FORMATS = ("JPEG", "PNG", "WEBP")
# Files of these suffixes are images: to be read, or an error. All others are left out.
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
SUFFIXES |= {".avif", ".bmp", ".gif", ".heic", ".heif", ".pgm", ".ppm", ".tif", ".tiff"}  # of other formats
VERSION = 3  # of what a cache holds

warnings.filterwarnings("ignore", module="PIL")  # about images that it reads all the same
# Pillow refuses a PNG with more than 1 MB of text or colour profile, which nothing here reads.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


class ReadOptions(NamedTuple):
    """How a data set is read."""

    size: int  # height and width to which image files are brought
    workers: int = 8  # threads that decode
    holds_out: bool = False  # validation images are held out of the training images: a test split is not needed
    val_only: bool = False  # download nothing, write nothing, and read no training images unless some were held out

    @property
    def train(self) -> bool:
        """Whether training images are read."""
        return self.holds_out or not self.val_only


class Decoded(NamedTuple):
    """M image files, decoded."""

    images: np.ndarray  # (M, S, S, 3) uint8, RGB
    file_digests: np.ndarray  # (M, 16) uint8, of the files' bytes
    sides: np.ndarray  # (M,) int64, the shorter side in the file, pixels


def list_images(folder: str | Path) -> tuple[list[str], list[str]]:
    """The image files in a folder and below it, sorted by folder, then name; and the other files but for caches, hidden
    ones and those whose suffix is not an image's.

    Raises:
        UserError: the folder or one below it cannot be read; names it.
    """

    def refuse(e: OSError):
        raise UserError(f"{e.filename} cannot be read ({e.strerror})")

    images, others = [], []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(parent) in map(os.path.realpath, Path(parent).parents):  # a link leads back up
            folders.clear()
            continue
        folders.sort()
        for name in sorted(names):
            path = f"{parent}/{name}"
            _, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES and "/." not in path.removeprefix(str(folder)):
                images.append(path)
            elif not is_cache(name):
                others.append(path)
    return images, others


def note_skipped(folder: str | Path, others: list[str]) -> None:
    """One line on standard error that counts the files which `list_images` left out."""
    if others:
        files = "file" if len(others) == 1 else "files"
        first = os.path.relpath(others[0], folder)
        note(f"skipped {len(others)} hidden or foreign {files} in {folder}, the first of them {first}")


@cache  # a process may read a data set more than once
def note(text: str) -> None:
    """A line on standard error, once."""
    if launch.WORLD.is_local_main:
        tell(f"note: {printable(text)}", sys.stderr)


def read_image(path: str | Path, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8, RGB, of a JPEG, PNG or WebP file: upright, as its EXIF orientation says; without transparency;
    16 bits of a colour cut to the upper 8.

    Bytes altered inside a JPEG or a PNG may decode to other pixels without an error: Pillow does not notice.

    Args:
        size: H and W, to which the image is brought: its shorter side is resized, antialiased, and the centre cut out,
            as by torchvision's Resize and CenterCrop. None: its own.

    Raises:
        UserError: the file is not such an image; names it.
    """
    pixels, *_ = _decode_file(path, size)
    return pixels


def _decode_file(path: str | Path, size: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """An entry of each of `Decoded`'s arrays. Raises UserError, naming the file, for whatever goes wrong."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe might never end
            raise UserError(f"{path} is not a regular file")
        content = Path(path).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()  # also what stands behind the pixels, where the EXIF record may be
            if image.mode.startswith("I"):  # conversion would cut it off at level 255
                raise UserError(f"{path} is a 16-bit grey PNG: convert it to 8 bits")
            with contextlib.suppress(Exception):  # Pillow's parsers raise half a dozen types for a damaged EXIF record
                ImageOps.exif_transpose(image, in_place=True)
            image = image.convert("RGB")
        side = min(image.size)
        if size is not None:
            image = _fit(image, size)
        return np.asarray(image), np.frombuffer(digest, np.uint8), side
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError as e:
        raise UserError(f"{path} is larger than what is read ({first_line(e)})") from None
    except Exception as e:  # each file format has exceptions of its own
        if getattr(e, "strerror", None):  # the system's, of the file itself
            raise UserError(f"{path} cannot be read ({e.strerror})") from None
        raise UserError(f"{path} is not an intact JPEG, PNG or WebP image ({first_line(e)})") from None


def _fit(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    width, height = image.width * size // side, image.height * size // side
    if width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too long and narrow")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def load_images(folder: Path, split: str, files: list[str], options: ReadOptions) -> Decoded:
    """The images of a split's files, from the cache in `folder`, or decoded and then cached there.

    The cache's name says of which files it was made (names, sizes and times) and how, so that what it holds is right if
    the checksums in it are.

    Raises:
        UserError: files that are not images, by name.
    """
    facts = [VERSION, options.size]
    for file in files:
        info = os.stat(file)
        name = file.removeprefix(str(folder)).lstrip("/")
        facts.append((name, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    key = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    path = folder / f"decoded-{split}-{key}.npz"
    # Missing, or damaged, for which every part of the format has an exception of its own: made again.
    with contextlib.suppress(Exception):
        if path.is_file():  # reading a pipe might never end
            with np.load(path) as arrays:
                return Decoded(**arrays)  # read to their ends, so that the zip's checksums were verified
    decoded = _decode(files, options)
    if not options.val_only:
        _write_cache(path, decoded)
    return decoded


def is_cache(name: str) -> bool:
    """Whether a file of this name is a cache that `load_images` wrote."""
    return fnmatch(name, "decoded-*-" + 32 * "[0-9a-f]" + ".npz")


def _write_cache(path: Path, decoded: Decoded) -> None:
    """In place of the split's earlier ones, which were made of other files, or of the same in other sizes."""
    megabytes = decoded.images.nbytes / 1e6
    tell(f"writing {path} ({megabytes:.1f} MB), which later starts read in place of the image files")
    try:
        write_atomic(path, lambda file: np.savez(file, **decoded._asdict()))
        for earlier in path.parent.glob(f"{path.name.rpartition('-')[0]}-*"):
            if earlier != path and is_cache(earlier.name):
                earlier.unlink(missing_ok=True)
    except (UserError, OSError):
        note(f"{path} cannot be written: every start decodes the images again")


def _decode(files: list[str], options: ReadOptions) -> Decoded:
    """Raises UserError, which names the first files that are not images."""
    num, size = len(files), options.size
    images = np.empty((num, size, size, 3), np.uint8)
    decoded = Decoded(images, np.empty((num, 16), np.uint8), np.empty(num, np.int64))
    rows = iter(range(num))  # which the threads share
    errors = {}

    def work() -> None:
        for row in rows:
            try:
                for array, value in zip(decoded, _decode_file(files[row], size), strict=True):
                    array[row] = value
            except UserError as e:
                errors[row] = str(e)
            bar.update()

    bar = tqdm(desc="decoding", total=num, unit="img", leave=False, disable=None)
    # Threads share memory and import nothing.
    with bar, ThreadPoolExecutor(max(1, options.workers)) as pool:
        others = []
        try:
            with contextlib.suppress(RuntimeError):  # the system allows no more threads; this one works too
                for _ in range(options.workers - 1):
                    others.append(pool.submit(work))
            work()
        finally:
            for _ in rows:  # after an error or a signal, nothing is left to do
                pass
        for other in others:
            other.result()
    if errors:
        named = first_names([errors[row] for row in sorted(errors)])
        raise UserError(f"{named} ({len(errors)} of {num} files)")
    return decoded
