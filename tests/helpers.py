"""What several test files use: the command on a few synthetic images, and what it wrote."""

import itertools
import json
import math
import multiprocessing
import re
import shutil
from pathlib import Path

import conftest  # noqa: F401  (finds the program where a test file is run by itself)
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import data
import main
from data import synthetic
from loss import Objective, build_objective
from models import Outputs, build_model
from utils import run_directory
from utils.checkpoint import LAST
from utils.engine import TrainStep

ALL = ("--PSKD", "--BYOT", "--DML")
# The largest relative differences from the published script that tests allow, in float64: a few times what different
# instruction sets give. The table "Agreement with the published script" prints them.
AGREEMENT = {
    "losses and gradients": [5e-15],
    "losses of training runs": [5e-15, 1e-12, 5e-11],  # ResNet-18, ResNeXt-50, ResNet-50
    "state after training runs": [2e-13, 1e-10, 3e-9],
    "prediction memory": [5e-15],
    "learning rate and alpha_t of every epoch": [3e-16],  # alpha_t; rates are equal
    "networks": [2e-8, 3e-10],  # logits and feature sums, golden to 9 and 12 digits
    "metrics": [5e-15, 1e-7],  # ECE, whose golden confidences are float32
}
SMALL = "--data_type synthetic --classes 10 --image_size 16 --width 4 --batch_size 16 --lr 0.05 --end_epoch 2"


def make_small(patch: pytest.MonkeyPatch) -> None:
    """4 training and 2 test images per synthetic class, every epoch saved however slow the disk."""
    patch.setattr(synthetic, "TRAIN_PER_CLASS", 4)
    patch.setattr(synthetic, "TEST_PER_CLASS", 2)
    patch.setattr(run_directory, "SHORT_WRITE", math.inf)


def run(directory: Path, *words: str, flags: str = SMALL) -> int:
    """The command in this process, with `directory` as its run directory; `words` override `flags`."""
    argv = flags.split()
    argv += ["--device", "cpu", "--precision", "fp32"]
    argv += ["--experiments_dir", str(directory.parent), "--run_name", directory.name]
    argv += words
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return main.main(argv)


def val_only(path: Path, directory: Path, *words: str) -> int:
    return run(directory, "--resume", str(path), *words, flags="--val_only")


def read(directory: Path, name: str = "results.json") -> dict:
    return json.loads((directory / name).read_text())


def read_records(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_checkpoint(directory: Path, name: str = LAST) -> dict:
    return torch.load(directory / name, map_location="cpu", weights_only=True)


def forge(file: Path, to: Path | None = None, **entries) -> None:
    """Change entries of a checkpoint, or of a copy of it."""
    torch.save({**read_checkpoint(file.parent, file.name), **entries}, to or file)


def one_line(capsys) -> str:
    """The error, which is all that stands on standard error."""
    error = capsys.readouterr().err
    assert re.fullmatch("error: .*\n", error), error
    return error


def files(directory: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def before_step(monkeypatch, number: int, action) -> None:
    """Call `action(step)` before the training step of this number, counted from 0."""
    original = TrainStep.update
    numbers = itertools.count()

    def step(self, *batch):
        if next(numbers) == number:
            action(self)
        original(self, *batch)

    monkeypatch.setattr(TrainStep, "update", step)


FLAGS = (*ALL, "--end_epoch", "3", "--val_split", "0.25", "--save_predictions")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.utils.tensorboard", "torchvision"])


def train(directory: Path, *words: str) -> int:
    return run(directory, *FLAGS, *words)


def content(directory: Path) -> dict[str, object]:
    """Everything in a run directory that must not depend on what happened to the run."""
    found = {file.name: read_checkpoint(directory, file.name) for file in directory.glob("*.pth")}
    found["results.json"] = read(directory)
    found["metrics.jsonl"] = read_records(directory)
    found["predictions.npz"] = dict(np.load(directory / "predictions.npz"))
    names = [file.name for file in files(directory)]
    found["names"] = sorted(name.split("tfevents")[0] for name in names)  # one event file
    return bits(found)


def bits(value):
    """Nested dicts and lists without times and runtime flags; tensors and arrays as type, shape and bytes."""
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items() if is_reproducible(str(key))}
    if isinstance(value, list | tuple):
        return [bits(entry) for entry in value]
    if hasattr(value, "dtype"):
        return str(value.dtype), value.shape, np.asarray(value).tobytes()
    return value


def is_reproducible(key: str) -> bool:
    if "second" in key:
        return False
    return key not in main.RUNTIME_FLAGS | {"hours", "starts"}


def save_photos(folder: Path) -> None:
    """16 training and 8 test images of 20 pixels, half of them of class `a`, half of class `b`; files of equal size."""
    random = np.random.RandomState(0)
    for number in range(24):
        split = "test" if number % 3 == 0 else "train"
        directory = folder / split / "ab"[number % 2]
        directory.mkdir(parents=True, exist_ok=True)
        pixels = random.randint(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png", compress_level=0)


def train_on_photos(folder: Path, flags: str) -> Path:
    """A finished run, `run`, beside its images, `photos`, both named from the folder; it can be copied as a whole."""
    save_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(Path("run"), flags=f"--data_type folder --data_path photos {flags}") == 0
    return folder


def enter_copy(folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of a folder, as the working directory."""
    copy = shutil.copytree(folder, tmp_path / "folder")
    monkeypatch.chdir(copy)
    return copy


def metrics(top1):
    shown = {"top1_error": top1, "top5_error": 4.0, "nll": 0.5, "ece": 3.0, "aurc": 50.0, "eaurc": 20.0}
    return shown | {"augrc": 30.0, "auroc_failure": None, "brier": 0.25, "adaptive_ece": 3.5}


def record(epoch, top1):
    return {
        "epoch": epoch, "lr": 0.1, "seconds": 2.0, "seconds_validation": 0.5, "seconds_saving": 0.6,
        "images_per_second": 99.0, "train": {"loss": 1.5, "hint": 0.25, "top1_error": 60.0},
        "val": {"exit 2": metrics(top1 + 5), "final": metrics(top1), "ensemble": metrics(top1 - 1)},
    }  # fmt: skip


def build(*words, split=None):
    argv = ["--data_type", "synthetic", "--device", "cpu", "--precision", "fp32", "--batch_size", "16"]
    argv += map(str, words)
    args = main.parse_args(argv)
    return data.build_loaders(args, "cpu", split)


def random_images(num, height=32, width=32):
    random = np.random.RandomState(num)
    return random.randint(0, 256, (num, height, width, 3)).astype(np.uint8)


NO_METHOD = {"PSKD": False, "BYOT": False, "DML": False}  # flags, beside those of `make_finished_run`
ONLY_BYOT = {"PSKD": False, "DML": False}
TEST_BLOCK = {
    "last": {"epoch": 1, "temperatures": {"final": 1.0}, "metrics": {"final": metrics(20.0)}}
}  # `test` of results.json


def images_record(**digests):
    """A data record with these digests of splits, beside those of a run without held-out images."""
    splits = {}
    for name, digest in {"train": "1a", "val": "2b", **digests}.items():
        splits[name] = {"images": 100, "digest": digest * 16}
    return {"class_names": ["a", "b"], "mean": [0.12345678], "std": [0.25], "splits": splits}


def start_record(device="H200", processes=1):
    versions = {"python": "3.11", "torch": "2.8", "torchvision": "0.23", "git_commit": "0123456"}
    return {"epoch": 0, "device_name": device, "processes": processes, **versions}


def make_finished_run(root, name, top1, seed=1, results=(), val=(), **config):
    """A run directory; row 8 of Table 1 in the paper's setting unless the config differs."""
    flags = {"classifier_type": "resnet18", "PSKD": True, "BYOT": True, "DML": True, "end_epoch": 300}
    flags |= {"precision": "fp32", "seed": seed, "run_name": name, "workers": seed, "data_path": "/home/me"}
    facts = {"data": images_record(), "starts": [start_record()], "changes": []}
    facts["runtime"] = ["data_path", "run_name", "workers"]
    last, best = ({**record(299, error), "val": {"final": metrics(error), **dict(val)}} for error in (top1, top1 - 1))
    usual = {"status": "finished", "epochs": 300, "seconds_per_epoch": 10.0, "last": last, "best": best}
    directory = root / name
    directory.mkdir(parents=True)
    write(directory / "config.json", {**flags, **facts, **config})
    write(directory / "results.json", {**usual, **dict(results)})


def write(file: Path, value) -> None:
    file.write_text(json.dumps(value))


def cells(output, **labels):
    """Heading -> cell, for each line of the first table that has these labels."""
    table = output.partition("###")[2].partition("###")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    headings, _, *rows = map(split_cells, lines)
    rows = [dict(zip(headings, row, strict=True)) for row in rows]
    return [row for row in rows if labels.items() <= row.items()]


def split_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


LABELS = torch.tensor([0, 1, 2, 3, 0])  # of the five images, INDEX, of `random_outputs`
INDEX = torch.arange(5)


def objective_of(words: str, num_samples: int = 5, num_classes: int = 4) -> Objective:
    args = main.parse_args(["--device", "cpu", *words.split()])
    return build_objective(args, num_samples, num_classes).double()


def tensor(*rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def near(value):
    """Equal but for the rounding of float64."""
    return pytest.approx(value, rel=1e-12, abs=1e-15)


def assert_identical(found, expected) -> None:
    """Nested tensors, to the bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def random_outputs(seed: int = 0, exits: int = 3) -> Outputs:
    """N = 5, K = 4, D = 6 in float64; leaves, so that gradients show who gets one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        return torch.randn(5, width, dtype=torch.float64, generator=generator, requires_grad=True)

    logits, feature = draw(4), draw(6)
    exit_logits = tuple(draw(4) for _ in range(exits))
    exit_features = tuple(draw(6) for _ in range(exits))
    return Outputs(logits, feature, exit_logits, exit_features)


def leaves(outputs: Outputs) -> dict[str, Tensor]:
    """The outputs by name: logits, feature, exit_logits1, ..., exit_features1, ..."""
    found = {"logits": outputs.logits, "feature": outputs.feature}
    for i, logits in enumerate(outputs.exit_logits, start=1):
        found[f"exit_logits{i}"] = logits
    for i, feature in enumerate(outputs.exit_features, start=1):
        found[f"exit_features{i}"] = feature
    return found


def gradients(loss: Tensor, outputs: Outputs) -> dict[str, Tensor]:
    """Of each output, by name; zeros where none arrives."""
    tensors = leaves(outputs)
    found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def receives_gradient(part: Tensor, outputs: Outputs) -> set[str]:
    """Names of the outputs that `part` sends a gradient to."""
    return {name for name, gradient in gradients(part, outputs).items() if gradient.any()}


NARROWEST = {"resnext50_32x4d": 16, "resnext101_32x8d": 8}  # widths; the others': 1


def build_network(name: str, flags: str = "", width: int = 8, num_classes: int = 10):
    """A network that is `width` wide, or as narrow as it can be."""
    width = max(width, NARROWEST.get(name, 1))
    argv = ["--classifier_type", name, "--width", str(width), "--device", "cpu", "--precision", "fp32"]
    args = main.parse_args(argv + flags.split())
    return build_model(args, num_classes)


def network_images(size: int = 16, num: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, 3, size, size, generator=generator)
