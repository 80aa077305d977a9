"""Data sets of every kind, good and bad: their splits, classes, order, and what is said of files that are wrong."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import build, random_images
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

import data
import main
from data import readers
from data.images import ReadOptions
from utils.errors import UserError

CLASS_IDS = [f"n{number:08d}" for number in range(1000, 1200)]
IMAGE = Image.effect_noise((20, 24), 99)
TINY = "tiny-imagenet-200"
OPTIONS, TINY_OPTIONS = ReadOptions(32), ReadOptions(64)


def error_of(name, root, *words):
    with pytest.raises(UserError) as caught:
        build("--data_type", name, "--data_path", root, *words)
    message = str(caught.value)
    assert message.isprintable()
    return message


def build_splits(*words):
    args = main.parse_args([str(word) for word in words])
    return data.load_splits(args, "cpu")


def write_classes(folder, images, labels, names, kind="png"):
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        directory = folder / names[label]
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(directory / f"{row:04}.{kind}", compress_level=0)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """3 + 1 images of 20 x 24 pixels in each of 3 classes, a, b and c; nothing can be downloaded."""
    monkeypatch.setattr("urllib.request.urlopen", None)
    for folder, num in (("train", 9), ("test", 3)):
        images = random_images(num, 24, 20)
        write_classes(tmp_path / "set" / folder, images, np.arange(num) % 3, "abc")
    return tmp_path / "set"


def digests(images):
    """Of the splits, by name."""
    return {name: split.digest() for name, split in images.splits.items()}


@pytest.fixture(params=[(3, "jpg", "test"), (11, "png", "val")])
def folder(request, tmp_path):
    """Two images in each of several classes."""
    num_classes, kind, test_name = request.param
    names = [f"class {n}" for n in range(num_classes)]
    labels = np.arange(2 * num_classes) % num_classes
    for split in ("train", test_name):
        write_classes(tmp_path / split, random_images(len(labels)), labels, names, kind)
    return tmp_path


def test_folder_of_classes_is_read_in_sorted_order(folder):
    """As strings: class 10 before class 2."""
    splits, class_names, _ = readers.read_folder(folder, OPTIONS)
    files = sorted(folder.glob("train/*/*"))
    of_files = [file.parent.name for file in files]
    assert class_names == sorted(set(of_files))
    assert [class_names[label] for label in splits["train"].labels] == of_files
    expected = [np.asarray(Image.open(file)) for file in files]
    assert (splits["train"].images == np.stack(expected)).all()
    assert (splits["test"].images == splits["train"].images).all()


def test_mean_and_std_are_those_of_the_training_images_of_the_classes_used(folder):
    _, val = build("--data_type", "folder", "--data_path", folder, "--classes", "2")
    train = readers.read_folder(folder, OPTIONS).splits["train"]
    pixels = train.images[:4] / 255
    np.testing.assert_allclose(val.record.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(val.record.std, pixels.std((0, 1, 2)), rtol=1e-6)


def test_more_classes_than_there_are_are_refused(folder):
    assert "--classes 12: folder has" in error_of("folder", folder, "--classes", "12")


@pytest.fixture
def tiny(root):
    """One training and one validation image of each of 200 classes; annotations in reverse order."""
    directory = root / TINY
    images = random_images(200, 64, 64)
    write_classes(directory / "train", images, np.arange(200), [f"{name}/images" for name in CLASS_IDS])
    write_classes(directory / "val", images, np.zeros(200, int), ["images"])
    (directory / "train" / CLASS_IDS[0] / f"{CLASS_IDS[0]}_boxes.txt").touch()
    (directory / "wnids.txt").write_text("\n".join(CLASS_IDS))
    (directory / "words.txt").write_text(f"{CLASS_IDS[0]}\tgoldfish, Carassius auratus\n")
    lines = [f"{n:04}.png\t{name}\t0\t0\t19\t15\n" for n, name in enumerate(CLASS_IDS)]
    (directory / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return directory


@pytest.fixture
def archive(tiny, root, monkeypatch):
    """Tiny-ImageNet's archive, the only file of its folder."""
    path = Path(shutil.make_archive(root / "new" / TINY, "zip", root, TINY))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(readers, "TINY_IMAGENET_MD5", md5)
    return path


def test_tiny_imagenet_is_read_in_order(tiny, root):
    splits, names, _ = readers.read_tiny_imagenet(root, TINY_OPTIONS)
    train, val = splits.values()
    assert names == ["goldfish", *CLASS_IDS[1:]]
    assert train.labels.tolist() == list(range(200))
    assert (train.images == random_images(200, 64, 64)).all()
    assert val.labels.tolist() == list(reversed(range(200)))
    assert (val.images[::-1] == train.images).all()


@pytest.mark.parametrize("inner", ["", "images"])
def test_tiny_imagenet_is_read_with_validation_images_sorted_into_folders(inner, tiny, capsys):
    for number, name in enumerate(CLASS_IDS):
        folder = tiny / "val" / name / inner
        folder.mkdir(parents=True)
        (tiny / "val" / "images" / f"{number:04}.png").rename(folder / f"{number:04}.png")
    train, val = readers.read_tiny_imagenet(tiny, TINY_OPTIONS).splits.values()
    assert val.labels.tolist() == list(range(200))
    assert (val.images == train.images).all()
    assert not capsys.readouterr().err


def test_tiny_imagenets_validation_images_are_read_alone(tiny):
    expected = readers.read_tiny_imagenet(tiny, TINY_OPTIONS).splits["test"]
    shutil.rmtree(tiny / "train")
    splits = readers.read_tiny_imagenet(tiny, ReadOptions(64, val_only=True)).splits
    assert {name: part.digest() for name, part in splits.items()} == {"test": expected.digest()}


def test_tiny_imagenet_is_cropped_from_64_pixels_with_imagenets_mean_and_std(tiny):
    train, val = build("--data_type", "tinyimagenet", "--data_path", tiny)
    assert train.images.shape == (200, 64, 64, 3)
    assert val.images.shape == (200, 32, 32, 3)
    assert val.record.mean == [0.485, 0.456, 0.406]
    assert val.record.std == [0.229, 0.224, 0.225]


def test_tiny_imagenet_archive_is_unpacked(archive, root):
    unpacked = readers.read_tiny_imagenet(archive.parent, TINY_OPTIONS)
    assert digests(unpacked) == digests(readers.read_tiny_imagenet(root, TINY_OPTIONS))
    assert sorted(os.listdir(archive.parent)) == [TINY, f"{TINY}.zip"]


def test_tiny_imagenet_archive_is_not_unpacked_where_nothing_may_be_written(archive):
    with pytest.raises(UserError, match=r"val_annotations.txt is damaged .*: unpack"):
        readers.read_tiny_imagenet(archive.parent, ReadOptions(64, val_only=True))
    assert os.listdir(archive.parent) == [archive.name]


def test_damaged_tiny_imagenet_archive_is_named(archive):
    os.truncate(archive, 99)
    error = error_of("tinyimagenet", archive.parent)
    assert f"they are damaged, and {archive.name} could not be fetched" in error


def clear(path):
    for file in path.iterdir():
        file.unlink()


def save_bmp(path):
    IMAGE.save(path, "bmp")


def save_16_bit(path):
    Image.new("I;16", (20, 24)).save(path)


def truncate(path):
    IMAGE.save(path)
    os.truncate(path, 500)


def write_row(path):
    path.write_text("0007.png\n")


def write_unknown_class(path):
    path.write_text("0007.png\tn5")


@pytest.mark.parametrize(
    "damage, path, words",
    [
        (shutil.rmtree, "", "{root} is not a directory"),
        (shutil.rmtree, "train", "{root} has no folder train/ with folders of images"),
        (shutil.rmtree, "test", "give --val_split to hold out a part of the training images"),
        (clear, "train/c", "the train images in {root} lack classes of another split: c"),
        (shutil.rmtree, "test/b", "the test images in {root} lack classes of another split: b"),
        (save_bmp, "test/c/x.JPEG", "test/c/x.JPEG is not a JPEG, PNG or WebP image"),
        (Path.touch, "test/c/photo.heic", "test/c/photo.heic is not a JPEG, PNG or WebP image"),
        (os.mkfifo, "test/c/x.png", "test/c/x.png is not a regular file"),
        (save_16_bit, "test/c/x.png", "x.png is a 16-bit grey PNG"),
        (truncate, "test/c/x.jpg", "x.jpg is not an intact JPEG, PNG or WebP"),
    ],
)
def test_bad_files_of_a_folder_are_named(root, damage, path, words):
    damage(root / path)
    assert words.format(root=root) in error_of("folder", root)
    assert not list(root.glob("decoded-test-*"))


@pytest.mark.parametrize(
    "damage, path, words",
    [
        (shutil.rmtree, f"train/{CLASS_IDS[9]}", "train has 199 classes, not 200"),
        (Path.unlink, "val/val_annotations.txt", "{tiny}/val/val_annotations.txt is damaged"),
        (write_row, "val/val_annotations.txt", "val_annotations.txt is damaged"),
        (write_unknown_class, "val/val_annotations.txt", "must be there, and be listed in"),
        (Path.unlink, "val/images/0007.png", "val/images/0007.png must be there, and be listed in"),
        (IMAGE.save, "val/images/x.png", "x.png must be there, and be listed in {tiny}/val/val_annotations.txt"),
    ],
)
def test_bad_files_of_tiny_imagenet_are_named(tiny, damage, path, words):
    damage(tiny / path)
    assert words.format(tiny=tiny) in error_of("tinyimagenet", tiny.parent)


def test_damaged_images_are_all_counted_and_five_are_named(root):
    for number in range(12):
        truncate(root / "train" / "b" / f"x{number:02}.png")
    error = error_of("folder", root)
    assert error.startswith(f"{root}/train/b/x00.png is not an intact")
    assert error.count(".png") == 5
    assert error.endswith(", ... (12 of 21 files)")


def write_pickle(file, content) -> str:
    """The file's md5."""
    pickled = pickle.dumps(content)
    file.write_bytes(pickled)
    return hashlib.md5(pickled).hexdigest()


@pytest.fixture(params=[(CIFAR10, 10), (CIFAR100, 100)])
def cifar(request, root, monkeypatch):
    """The same images, 3 + 1 per class, as torchvision's files and as folders of classes: its name, the folder of the
    files and that of the folders."""
    kind, classes = request.param
    pickles, folders = root / kind.base_folder, root / "folders"
    pickles.mkdir()
    names = [f"name {n:02}" for n in range(classes)]
    for part, num in (("train", 3 * classes), ("test", classes)):
        images = random_images(num)
        labels = np.random.RandomState(0).permutation(num) % classes
        write_classes(folders / part, images, labels, names)
        rows = images.transpose(0, 3, 1, 2).reshape(num, -1)
        md5 = write_pickle(pickles / part, {"data": rows, "labels": labels.tolist()})
        monkeypatch.setattr(kind, f"{part}_list", [(part, md5)])
    md5 = write_pickle(pickles / "meta", {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": "meta", "md5": md5})
    monkeypatch.setattr(readers, "CIFAR_IMAGES", {"train": 3 * classes, "test": classes})
    return kind.__name__, pickles, folders


def test_cifars_loaders_have_its_names_statistics_and_augmentation(cifar):
    name, pickles, folders = cifar
    for path in (pickles.parent, folders):
        train, _ = build("--data_type", name.lower(), "--data_path", path)
        assert train.record.class_names[3] == "name 03"
        assert train.augmentation == "crop"
        assert train.record.mean == [0.4914, 0.4822, 0.4465]
        assert train.record.std == [0.2023, 0.1994, 0.2010]


def test_damaged_cifar_files_are_refused(cifar):
    name, pickles, _ = cifar
    os.truncate(pickles / "test", 99)
    error = error_of(name.lower(), pickles.parent)
    assert f"{pickles.parent} lacks files of the data set, or they are damaged" in error


def copy_a_class(train):
    shutil.copytree(train / "name 03", train / "name 04", dirs_exist_ok=True)


def enlarge(train):
    for file in train.parent.glob("*/*/*.png"):
        IMAGE.save(file)


@pytest.mark.parametrize("change", [copy_a_class, enlarge])
def test_folders_of_other_numbers_or_sizes_of_images_are_not_cifar(change, cifar):
    name, _, folders = cifar
    change(folders / "train")
    assert f"{folders} is not {name}" in error_of(name.lower(), folders)


def split_sizes(folder):
    """With --val_split 0.3."""
    splits = build_splits("--data_type", "folder", "--data_path", folder, "--val_split", "0.3")
    return {name: split.num_samples for name, split in splits.items()}


@pytest.mark.parametrize("path", ["", "train"])  # the second is one folder of classes
def test_classes_are_read_without_a_test_split_for_val_split(root, path):
    shutil.rmtree(root / "test")
    assert split_sizes(root / path) == {"train": 6, "val": 3}


def test_a_test_split_that_is_there_is_read_with_val_split_too(root):
    assert split_sizes(root) == {"train": 6, "val": 3, "test": 3}


def test_a_test_split_is_read_alone(root):
    expected = readers.read_folder(root, OPTIONS).splits["test"]
    shutil.rmtree(root / "train")
    splits, class_names, _ = readers.read_folder(root, ReadOptions(32, val_only=True))
    assert list(splits) == ["test"]
    assert class_names == ["a", "b", "c"]
    assert splits["test"].digest() == expected.digest()


FOREIGN = "train/a/._0000.png", "train/a/.DS_Store", "train/b/Thumbs.db", "test/c/notes.txt", "test/loose.png"
FOREIGN += "train/.hidden/0.png", "train/b/.folder/0.png"


def test_hidden_and_foreign_files_are_skipped_with_one_line_that_counts_them(root, capsys):
    before = readers.read_folder(root, OPTIONS)
    for name in FOREIGN:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    capsys.readouterr()
    for _ in range(2):  # decoded, and from the cache
        after = readers.read_folder(root, OPTIONS)
        assert after.class_names == before.class_names
        assert digests(after) == digests(before)
    error = capsys.readouterr().err
    assert error == f"note: skipped 7 hidden or foreign files in {root}, the first of them train/.hidden/0.png\n"


def test_pickles_folders_and_cache_give_identical_arrays(cifar):
    name, pickles, folders = cifar
    from_pickles = readers.read_cifar(name, pickles.parent, OPTIONS)
    for _ in range(2):  # decoded, and from the cache
        from_folders = readers.read_cifar(name, folders, OPTIONS)
        assert from_folders.class_names == from_pickles.class_names
        for split, expected in from_pickles.splits.items():
            in_order = expected.select(np.argsort(expected.labels, kind="stable"))
            found = from_folders.splits[split]._replace(file_digests=None)
            assert found.digest() == in_order.digest()


def test_another_test_set_of_cifars_classes_is_read(cifar):
    name, _, folders = cifar
    shutil.rmtree(folders / "train")
    image = next((folders / "test" / "name 00").glob("*.png"))
    shutil.copy(image, image.with_name("new.png"))
    splits, class_names, _ = readers.read_cifar(name, folders, ReadOptions(32, val_only=True))
    assert len(splits["test"].images) == len(class_names) + 1


def fill(folder, num=4):
    """`num` images of each of three classes."""
    images = random_images(3 * num)
    write_classes(folder, images, np.arange(3 * num) % 3, "abc")


def folder_splits(root, *words):
    return build_splits("--data_type", "folder", "--data_path", root, *words)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_val_selects_beside_a_test_split(name, root):
    fill(root / name)
    loaders = folder_splits(root)
    assert {split: loader.num_samples for split, loader in loaders.items()} == {"train": 9, "test": 3, "val": 12}
    assert loaders["val"].record.selects_on_val


def test_val_without_a_test_split_is_one(root):
    (root / "test").rename(root / "val")
    loaders = folder_splits(root)
    assert {split: loader.num_samples for split, loader in loaders.items()} == {"train": 9, "val": 3}
    assert not loaders["val"].record.selects_on_val


def test_val_split_beside_a_val_folder_is_refused(root):
    fill(root / "val")
    assert "has validation images of its own" in error_of("folder", root, "--val_split", "0.3")


def test_what_lies_unused_beside_the_splits_gets_one_line(root, capsys):
    fill(root / "valid")
    fill(root / "validation")
    (root / "labels.csv").touch()
    folder_splits(root)
    assert capsys.readouterr().err == f"note: not used: labels.csv, validation in {root}\n"


@pytest.mark.parametrize("words", [(), ("--val_split", "0.3")])
def test_folders_named_like_splits_are_not_classes(words, root):
    (root / "train").rename(root / "Training")
    (root / "test").rename(root / "Testing")
    error = error_of("folder", root, *words)
    assert f"{root} holds Testing, Training in place of several classes" in error
    assert "name splits train, val and test" in error


def test_a_single_class_is_refused(root):
    (root / "train").rename(root / "images")
    (root / "train").mkdir()
    (root / "images").rename(root / "train" / "images")
    error = error_of("folder", root)
    assert f"{root}/train holds images in place of several classes" in error
    assert "move folders of classes up" in error


def test_a_test_folder_without_classes_is_no_test_split(root, capsys):
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    IMAGE.save(root / "test" / "0.png")
    assert split_sizes(root) == {"train": 6, "val": 3}
    assert f"note: not used: test in {root}" in capsys.readouterr().err
    fill(root / "val")
    assert list(folder_splits(root)) == ["train", "val"]


def test_classes_of_one_image_are_not_held_out_and_named(root, capsys):
    for number in ("0003", "0006"):
        (root / "train" / "a" / f"{number}.png").unlink()
    loaders = folder_splits(root, "--val_split", "0.3")
    assert loaders["train"].labels.tolist() == [0, 1, 1, 2, 2]
    assert "no image of classes that have only one: a\n" in capsys.readouterr().err


def test_class_names_are_compared_in_one_unicode_form(root):
    (root / "train" / "b").rename(root / "train" / "caf\u00e9")
    (root / "test" / "b").rename(root / "test" / "cafe\u0301")
    assert folder_splits(root)["val"].record.class_names == ["a", "c", "caf\u00e9"]


def test_a_link_to_nowhere_in_place_of_a_class_is_counted(root, capsys):
    (root / "train" / "d").symlink_to("nowhere")
    folder_splits(root)
    assert f"skipped 1 hidden or foreign file in {root}, the first of them train/d" in capsys.readouterr().err


def test_images_much_larger_than_the_image_size_get_a_line(root, capsys):
    for file in root.glob("*/*/*.png"):
        IMAGE.resize((300, 200)).save(file)
    folder_splits(root)
    assert "are brought to 32 x 32 pixels; half are 200 or more" in capsys.readouterr().err


def test_digest_of_a_folder_does_not_depend_on_the_image_size(root):
    small, large = (folder_splits(root, "--image_size", size)["val"].record.splits for size in (32, 64))
    assert small == large


PIXELS, LABELS = random_images(6, 16, 16), np.arange(6) % 3
BAD_ARRAYS = [
    (PIXELS[..., 0], LABELS, "images uint8 (6, 16, 16) and labels int64 (6,) in place of uint8 (M, S, S, 3)"),
    (PIXELS.transpose(0, 3, 1, 2), LABELS, "images uint8 (6, 3, 16, 16)"),
    (PIXELS / 255, LABELS, "images float64"),
    (PIXELS, LABELS.astype(np.uint8), "labels uint8 (6,)"),
    (PIXELS, LABELS + 1, "labels from 1 to 3 for 3 class names"),
]


@pytest.mark.parametrize(("pixels", "labels", "words"), BAD_ARRAYS)
def test_what_a_reader_returns_is_checked(pixels, labels, words, monkeypatch):
    split = readers.Split(pixels, labels)
    images = readers.Images({"train": split, "test": split}, list("abc"))
    row = data.DATASETS["folder"]._replace(read=lambda *_: images)
    monkeypatch.setitem(data.DATASETS, "folder", row)
    assert words in error_of("folder", ".")
