"""What several test files use: the command on a few synthetic images, and what it wrote."""

import itertools
import json
import math
import multiprocessing
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import main
from data import synthetic
from utils import run_directory
from utils.engine import TrainStep
from utils.flags import RUNTIME_FLAGS

ALL = ("--PSKD", "--BYOT", "--DML")
SMALL = "--data_type synthetic --classes 10 --image_size 16 --width 4 --batch_size 16 --lr 0.05 --end_epoch 2"


def make_small(patch: pytest.MonkeyPatch) -> None:
    """4 training and 2 test images per synthetic class, every epoch saved however slow the disk, no pictures."""
    patch.setattr(synthetic, "TRAIN_PER_CLASS", 4)
    patch.setattr(synthetic, "TEST_PER_CLASS", 2)
    patch.setattr(run_directory, "SHORT_WRITE", math.inf)
    patch.setitem(sys.modules, "matplotlib", None)


def run(directory: Path, *words: str, flags: str = SMALL) -> int:
    """The command in this process, with `directory` as its run directory; `words` override `flags`."""
    where = ["--experiments_dir", str(directory.parent), "--run_name", directory.name]
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return main.main([*flags.split(), "--device", "cpu", "--precision", "fp32", *where, *words])


def val_only(path: Path, directory: Path, *words: str) -> int:
    return run(directory, "--resume", str(path), *words, flags="--val_only")


def read(directory: Path, name: str = "results.json") -> dict:
    return json.loads((directory / name).read_text())


def read_records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert re.fullmatch("error: .*\n", error), error
    return error


def files(directory: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def before_step(monkeypatch, number: int, action) -> None:
    """Call `action(step)` before the training step of this number, counted from 0."""
    call, numbers = TrainStep.__call__, itertools.count()

    def step(self, *batch):
        if next(numbers) == number:
            action(self)
        call(self, *batch)

    monkeypatch.setattr(TrainStep, "__call__", step)


FLAGS = (*ALL, "--end_epoch", "3", "--val_split", "0.25", "--save_predictions")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.utils.tensorboard", "torchvision"])


def train(directory: Path, *words: str) -> int:
    return run(directory, *FLAGS, *words)


def content(directory: Path) -> dict[str, object]:
    """Everything in a run directory that must not depend on what happened to the run."""
    names = [str(file.relative_to(directory)).split("tfevents")[0] for file in files(directory)]  # one event file
    found = {file.name: torch.load(file, map_location="cpu", weights_only=True) for file in directory.glob("*.pth")}
    found |= {"files": sorted(names), "results": read(directory), "records": read_records(directory)}
    return bits(found | {"predictions": dict(np.load(directory / "predictions.npz"))})


def bits(value):
    """Nested dicts and lists without times and runtime flags; tensors and arrays as type, shape and bytes."""
    if isinstance(value, dict):
        left_out = RUNTIME_FLAGS | {"hours", "starts"}
        return {key: bits(v) for key, v in value.items() if "second" not in str(key) and key not in left_out}
    if isinstance(value, list | tuple):
        return [bits(v) for v in value]
    return (str(value.dtype), value.shape, np.asarray(value).tobytes()) if hasattr(value, "dtype") else value


def save_photos(folder: Path) -> None:
    random = np.random.RandomState(0)
    for i in range(24):
        file = folder / ("test" if i % 3 == 0 else "train") / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (20, 20, 3), dtype=np.uint8)).save(file)


def metrics(top1):
    return {"top1_error": top1, "top5_error": 4.0, "nll": 0.5, "ece": 3.0, "aurc": 50.0, "eaurc": 20.0}


def record(epoch, top1):
    return {
        "epoch": epoch, "lr": 0.1, "alpha_t": None, "seconds": 2.0, "seconds_validation": 0.5, "seconds_saving": 0.6,
        "images_per_second": 99.0, "train": {"loss": 1.5, "hint": 0.25, "top1_error": 60.0},
        "val": metrics(top1), "exits": [None, metrics(top1 + 5)], "ensemble": metrics(top1 - 1),
    }  # fmt: skip


def build(*words, split=None):
    words = ["--data_type", "synthetic", "--device", "cpu", "--precision", "fp32", "--batch_size", 16, *words]
    return data.build_loaders(main.parse_args([str(word) for word in words]), "cpu", split)


def random_images(num, height=32, width=32):
    return np.random.RandomState(num).randint(0, 256, (num, height, width, 3)).astype(np.uint8)
