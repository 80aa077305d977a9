"""Image files to pixels: which files are images, EXIF, sizes, formats; and the cache of what was decoded."""

import os
import shutil
import threading
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from helpers import random_images, save_photos
from PIL import Image, ImageOps, PngImagePlugin
from torchvision.transforms import functional as reference

import data
import main
from data import images, readers
from data.images import ReadOptions, list_images, load_images, read_image
from utils.errors import UserError


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def write(folder, pixels, **options):
    """PNG files of the images, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03}.png", **options)


@pytest.fixture
def root(tmp_path):
    save_photos(tmp_path)
    return tmp_path


SMALL = ReadOptions(32)


def load(folder, options=SMALL):
    return load_images(folder, "train", list_images(folder)[0], options).images


def load_root(root, options=SMALL):
    return readers.read_folder(root, options).splits["train"].images


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_turned_upright(orientation, suffix, tmp_path):
    [pixels] = random_images(1, 12, 20)
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(file, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    assert np.array_equal(read_image(file), np.asarray(expected))


def test_orientation_may_stand_behind_the_pixels_of_a_png(tmp_path):
    [pixels] = random_images(1, 12, 20)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif(6))
    content = (tmp_path / "x.png").read_bytes()
    start, pixel_data, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    late = content[:start] + content[pixel_data:end] + content[start:pixel_data] + content[end:]
    (tmp_path / "x.png").write_bytes(late)
    assert np.array_equal(read_image(tmp_path / "x.png"), np.rot90(pixels, -1))


def test_strip_that_no_memory_could_hold_when_resized_is_named(tmp_path):
    Image.new("1", (1_000_000, 1)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png .*1000000 x 1 pixels are too long and narrow"):
        read_image(tmp_path / "x.png", 32)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("record", [b"Exif\0\0damaged", b"", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_record_is_no_damaged_image(record, tmp_path):
    [pixels] = random_images(1, 12, 20)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=record)
    assert np.array_equal(read_image(tmp_path / "x.png"), pixels)


SIZES = [[(64, 128), (97, 61), (32, 32), (16, 16), (24, 55)], [(100, 200), (100, 200)]]


@pytest.mark.parametrize("sizes", SIZES, ids=["several", "one"])
def test_images_have_torchvisions_resized_and_cropped_pixels(sizes, tmp_path):
    pixels = [random_images(1, height, width)[0] for height, width in sizes]
    write(tmp_path, pixels)
    found = load(tmp_path)
    for image, got in zip(pixels, found, strict=True):
        resized = reference.resize(Image.fromarray(image), 32)
        expected = np.asarray(reference.center_crop(resized, 32))
        assert np.array_equal(got, expected)


def test_png_with_much_text_or_a_large_colour_profile_is_read(tmp_path):
    [pixels] = random_images(1)
    info = PngImagePlugin.PngInfo()
    info.add_text("notes", "x" * 2_000_000, zip=True)
    write(tmp_path / "text", [pixels], pnginfo=info)
    write(tmp_path / "profile", [pixels], icc_profile=bytes(1_500_000))
    assert np.array_equal(load(tmp_path), [pixels, pixels])


def test_more_pixels_than_are_read_are_named(tmp_path):
    Image.new("1", (20_000, 9_000)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png is larger than what is read"):
        read_image(tmp_path / "x.png")


def test_unreadable_folder_below_a_class_is_named(tmp_path):
    with pytest.raises(UserError, match="missing cannot be read"):
        list_images(tmp_path / "missing")


def test_16_bits_of_a_colour_are_cut_to_the_upper_8(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG_OF_16_BITS)
    assert read_image(tmp_path / "x.png").tolist() == [[[1, 2, 3]]]


# One pixel: 1.3, 2.3 and 4 of 255.
PNG_OF_16_BITS = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000000f49444154789c6360f4658a60fe"
    "0f0003a301abdaa3beaf0000000049454e44ae426082"
)


def test_cache_is_used_until_a_file_changes(root, monkeypatch):
    opened = mock.Mock(wraps=Image.open)
    monkeypatch.setattr(Image, "open", opened)
    before = load_root(root)
    assert (load_root(root) == before).all()
    assert opened.call_count == 24  # each file once
    file, facts = root / "train/a/10.png", (root / "train/a/10.png").stat()
    shutil.copyfile(root / "train/b/1.png", file)  # of the same size, and given the same time
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = load_root(root)
    assert file.stat().st_size == facts.st_size
    assert (after[0] == before[8]).all()


def caches(folder):
    return sorted(folder.glob("decoded-*"))


@pytest.mark.slow
def test_damaged_cache_is_not_used(tmp_path):
    pixels = random_images(3, 16, 16)
    write(tmp_path, pixels)
    load(tmp_path, ReadOptions(16))
    [cache] = caches(tmp_path)
    good = cache.read_bytes()
    damaged = [b"", good[:-1], bytes(len(good))]
    for i in range(0, len(good), 23):
        damaged.append(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
    for content in damaged:
        cache.write_bytes(content)
        assert (load(tmp_path, ReadOptions(16, val_only=True)) == pixels).all()
        assert cache.read_bytes() == content


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_cache_that_is_no_file_is_not_used(make, root, capsys):
    expected = load_root(root)
    for path in caches(root):
        path.unlink()
        make(path)
    assert (load_root(root) == expected).all()
    assert capsys.readouterr().err.count("cannot be written") == (2 if make is os.mkdir else 0)


def test_cache_is_announced_once_with_path_and_size(tmp_path, capsys):
    write(tmp_path, random_images(2))
    for _ in range(2):
        load(tmp_path)
    [path] = caches(tmp_path)
    assert capsys.readouterr().out.startswith(f"writing {path} (0.0 MB)")


def test_cache_of_one_split_is_used_without_the_other(root, monkeypatch):
    expected = readers.read_folder(root, SMALL).splits["test"].digest()
    monkeypatch.setattr(images, "_decode", None)
    (root / "train/a/10.png").unlink()
    assert readers.read_folder(root, ReadOptions(32, val_only=True)).splits["test"].digest() == expected


def test_cache_is_replaced_by_one_of_other_files_or_size_and_nothing_else_is_removed(tmp_path):
    write(tmp_path, random_images(2))
    others = [tmp_path / name for name in ("decoded-images.npz", "decoded-train-notes.npz")]
    for path in others:
        path.touch()
    kept = set()
    for size in (32, 64, 32):
        assert load(tmp_path, ReadOptions(size)).shape == (2, size, size, 3)
        [cache] = set(caches(tmp_path)) - set(others)
        kept.add(cache)
    assert len(kept) == 2
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("limit", [0, 2])
def test_images_are_decoded_where_few_threads_may_start(limit, root, monkeypatch):
    started, original = [], threading.Thread.start

    def start(thread):
        if len(started) == limit:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert load_root(root).any(axis=(1, 2, 3)).all()


def test_decoding_and_writing_the_cache_hold_the_pixels_once(tmp_path):
    pixels = np.zeros((80, 512, 512, 3), dtype=np.uint8)
    for part in ("train/a", "train/b", "test/a", "test/b"):
        write(tmp_path / part, pixels[:20])
    words = f"--data_type folder --data_path {tmp_path} --workers 1 --image_size 512"
    args = main.parse_args(words.split())
    tracemalloc.start()
    loaders = data.load_splits(args, "cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaders["train"].images.shape == (40, 512, 512, 3)
    assert peak < pixels.nbytes + 20e6


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [(data, "Loader", RuntimeError("CUDA out of memory. Tried to allocate")), (images, "_fit", MemoryError())],
)
def test_too_little_memory_names_the_flags_for_images(where, name, error, root, monkeypatch):
    monkeypatch.setattr(where, name, mock.Mock(side_effect=error))
    with pytest.raises(UserError, match="--classes, --limit_train, --limit_val") as caught:
        data.load_splits(main.parse_args(["--data_type", "folder", "--data_path", str(root)]), "cpu")
    assert "--batch_size" not in str(caught.value)


def test_a_link_to_its_own_folder_counts_no_image_twice(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "self").symlink_to(tmp_path)
    found, others = images.list_images(tmp_path)
    assert found == [str(tmp_path / "a.png")]
    assert others == []


def test_a_link_to_a_sibling_takes_no_image_from_it(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").touch()
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "cat").symlink_to(tmp_path / "cat")
    found, _ = images.list_images(tmp_path)
    assert found == [f"{tmp_path}/animals/cat/a.png", f"{tmp_path}/cat/a.png"]
