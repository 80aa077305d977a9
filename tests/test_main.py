"""The command end to end, on forty synthetic images: what a run writes, evaluation, errors that become one line."""

import json
import math
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import main
from data import build_loaders, synthetic
from loss import trained_exits
from models import load_run
from utils import run_directory
from utils.calibration import fit_temperature
from utils.engine import TrainStep, evaluate, predict
from utils.metrics import METRICS, classification_metrics
from utils.runtime import MACHINE_FACTS

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
    """What was printed as an error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


def files(directory: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def before_step(monkeypatch, number: int, action) -> None:
    """Call `action(step)` before the training step of this number, counted from 0."""
    call, left = TrainStep.__call__, list(range(number + 1))

    def step(self, *batch):
        if left and left.pop() == 0:
            action(self)
        call(self, *batch)

    monkeypatch.setattr(TrainStep, "__call__", step)


EXITS_TRAINED = ["--BYOT", "--PSKD --BYOT", "--BYOT --DML", "--PSKD --BYOT --DML", "--DML --DML_on_output"]
COMBINATIONS = [  # flags, and for each exit whether a loss trains its classifier
    *[(flags, []) for flags in ("", "--PSKD")],
    *[(flags, [True] * 3) for flags in EXITS_TRAINED],
    *[(flags, [False] * 3) for flags in ("--DML", "--PSKD --DML")],
    ("--BYOT --BYOT_from_k_block 2", [False, True, True]),
]


@pytest.mark.parametrize(("flags", "trained"), COMBINATIONS)
def test_every_combination_writes_what_the_design_says(flags, trained, tmp_path):
    directory = tmp_path / "run"
    assert run(directory, *flags.split(), "--save_predictions") == 0
    records, results, config = read_records(directory), read(directory), read(directory, "config.json")
    terms = {"ce"} | ({"byot_ce", "byot_kl", "byot_hint"} if "--BYOT" in flags else set())
    terms |= {"dml"} if "--DML" in flags else set()
    for t, record in enumerate(records):
        assert record["epoch"] == t and record["lr"] == 0.05
        assert record["alpha_t"] == (0.4 * (t + 1) if "--PSKD" in flags else None)
        assert record["images_per_second"] == pytest.approx(40 / record["seconds"])
        assert record["seconds_validation"] > 0 and (record["seconds_saving"] > 0) == (t > 0)
        assert record["train"].keys() == {"loss", "top1_error"} | terms
        assert record["train"]["loss"] == pytest.approx(sum(record["train"][term] for term in terms))
        for metrics in filter(None, (record["val"], record["ensemble"], *record["exits"])):
            assert metrics.keys() == METRICS.keys() and all(map(math.isfinite, metrics.values()))
    seconds = [r["seconds"] + r["seconds_validation"] + r["seconds_saving"] for r in records]
    best = min(records, key=lambda record: record["val"]["top1_error"])
    assert results == {"status": "finished", "epochs": 2, "last": records[1], "best": best} | {
        "seconds_per_epoch": pytest.approx((records[0]["seconds"] + records[1]["seconds"]) / 2),
        "hours": pytest.approx(sum(seconds) / 3600),
    }
    assert config["precision"] == "fp32" and config["overwrite"] is False and config["PSKD"] == ("--PSKD" in flags)
    assert config["starts"] == [{"epoch": 0} | {key: config[key] for key in MACHINE_FACTS}]
    assert config["data"]["class_names"][9] == "hue 0, width 9" and config["data"]["mean"] == [0.5] * 3
    checkpoints = [torch.load(directory / f"checkpoint_{n}.pth", weights_only=True) for n in ("last", "best")]
    assert [c["history"] for c in checkpoints] == [records, records[: best["epoch"] + 1]]
    assert {"conv1.weight", "layer1.0.bn1.bias", "fc.bias"} <= checkpoints[0]["model"].keys()
    saved = {name: torch.from_numpy(array) for name, array in np.load(directory / "predictions.npz").items()}
    logits = torch.stack([*saved.get("exit_logits", ()), saved["logits"]])
    assert logits.shape == (len(trained) + 1, 20, 10) and logits.dtype == torch.float32
    assert evaluate(logits, saved["labels"], trained) == {k: records[1][k] for k in ("val", "exits", "ensemble")}


def test_val_split_gives_a_test_block_and_without_it_nothing_is_fitted(tmp_path, monkeypatch):
    """The first epoch is made the best one, so that the two blocks have different weights."""
    assert run(tmp_path / "plain", *ALL) == 0 and "test" not in read(tmp_path / "plain")
    monkeypatch.setattr(run_directory, "best_record", lambda history: history[0] if history else None)
    assert run(tmp_path / "run", *ALL, "--val_split", "0.5") == 0
    make_small(monkeypatch)
    for name, epoch in (("last", 1), ("best", 0)):
        block = read(tmp_path / "run")["test"][name]
        model, info = load_run(tmp_path / "run", name)
        loaders = [build_loaders(info["args"], "cpu", split=split) for split in ("val", "test")]
        (held_logits, held_labels), (logits, labels) = (predict(model, loader, "fp32") for loader in loaders)
        expected = {"epoch": epoch, **evaluate(logits, labels, trained_exits(info["args"]))}
        assert len(held_labels) == len(labels) == 20 and expected == {key: block[key] for key in expected}
        assert block["temperatures"] == [fit_temperature(z, held_labels) for z in held_logits] == info["temperatures"]
        calibrated = classification_metrics(logits[-1].double() / block["temperatures"][-1], labels)
        assert block["calibrated"]["val"] == {key: calibrated[key] for key in ("ece", "nll")}
        curve, chosen = block["early_exit"]["curve"], block["early_exit"]["chosen"]
        assert curve[-1]["accuracy"] == pytest.approx(100 - block["val"]["top1_error"])
        assert chosen in curve and chosen["heldout_accuracy"] >= curve[-1]["heldout_accuracy"] - 0.5
        assert curve[-1]["multiply_adds"] == block["early_exit"]["backbone_multiply_adds"]
        images = torch.cat([batch for batch, _, _ in loaders[1]])
        right = model.predict_early(images, chosen["threshold"])[0].argmax(dim=1) == labels
        assert 100 * right.double().mean().item() == pytest.approx(chosen["accuracy"])


@pytest.fixture
def folders(tmp_path) -> Path:
    """A finished run with no flag at its default, on a folder of classes beside it, whose cache is gone."""
    random = np.random.RandomState(0)
    for i in range(24):
        file = tmp_path / "photos" / ("test" if i % 3 == 0 else "train") / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (20, 20, 3), dtype=np.uint8)).save(file)
    flags = "--BYOT --data_type folder --width 8 --num_resnet_blocks 2 --image_size 24 --val_split 0.3 --seed 7"
    words = [*flags.split(), "--classes", "2", "--limit_val", "3", "--data_path", str(tmp_path / "photos")]
    assert run(tmp_path / "run", *words) == 0
    (tmp_path / "photos" / "decoded-images.npz").unlink()
    return tmp_path


def test_val_only_takes_flags_from_the_checkpoint_and_writes_val_json_only(folders, monkeypatch, capsys):
    (folders / "elsewhere").mkdir()
    monkeypatch.chdir(folders / "elsewhere")
    before, last = files(folders), read(folders / "run")["last"]
    printed = (folders / "run" / "experiment.log").read_text().split("evaluate again: python main.py ")[1].splitlines()
    assert shlex.split(printed[0]) == ["--val_only", "--resume", str(folders / "run")]
    assert main.main([*shlex.split(printed[0]), "--precision", "fp32"]) == 0
    written = folders / "elsewhere" / "experiments" / "val_only" / "val.json"
    found = json.loads(written.read_text())
    assert found.pop("checkpoint") == str(folders / "run" / "checkpoint_last.pth")
    assert found == {key: last[key] for key in ("epoch", "val", "exits", "ensemble")}
    assert {path: content for path, content in files(folders).items() if path != written} == before
    capsys.readouterr()
    (folders / "photos").rename(folders / "moved")
    assert val_only(folders / "run", folders / "out") == 1
    assert str(folders / "photos") in one_line(capsys) and not (folders / "photos").exists()
    words = ("--data_path", str(folders / "moved"), "--precision", "bf16", "--label_smoothing", "0")
    assert val_only(folders / "run", folders / "out", *words) == 0 and (folders / "out" / "val.json").exists()
    for words, named in (("--width 4", "--width 8 -> 4"), ("--PSKD --seed 4", "--PSKD False -> True, --seed 7 -> 4")):
        assert val_only(folders / "run", folders / "out", *words.split()) == 1
        assert named in one_line(capsys)


def test_val_only_on_a_directory_of_runs_goes_past_bad_ones(folders, monkeypatch, capsys):
    good = torch.load(folders / "run" / "checkpoint_last.pth", weights_only=True)
    changes = {"c": {"width": -5}, "d": {"image_size": 7}, "e": {"seed": "four"}, "f": {"data_path": "new"}}
    for name in "abcdefgh":
        forged = {**good, "args": good["args"] | changes.get(name, {})}
        forged["model"] = {key: tensor * (math.nan if name == "b" else 1) for key, tensor in good["model"].items()}
        (folders / "runs" / name).mkdir(parents=True)
        torch.save("foreign" if name == "g" else forged, folders / "runs" / name / "checkpoint_last.pth")
    outcomes = [RuntimeError("a mistake"), mock.DEFAULT]  # of runs a and h
    monkeypatch.setattr(main, "predict", mock.Mock(wraps=predict, side_effect=outcomes))
    monkeypatch.chdir(folders)
    assert val_only(folders / "runs", folders / "all") == 1
    error = one_line(capsys)
    for words in ("7 of 8", "a: a mistake", "b/", "not finite", "'-5'", "--image_size", "'four'", "new/train", "g/"):
        assert words in error, words
    assert read(folders / "all", "val.json").keys() == {str(folders / "runs" / "h")} and not (folders / "new").exists()


def test_out_of_memory_is_one_line_wherever_it_hides_and_a_mistake_is_not_hidden(tmp_path, monkeypatch, capsys):
    error = RuntimeError("CUDA error: operation failed during capture")
    error.__context__ = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    before_step(monkeypatch, 0, mock.Mock(side_effect=error))
    assert run(tmp_path / "run") == 1
    assert "out of memory with --batch_size 16" in one_line(capsys)
    before_step(monkeypatch, 0, mock.Mock(side_effect=RuntimeError("a mistake in the code")))
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        run(tmp_path / "run")
    assert read(tmp_path / "run")["status"] == "failed"


def test_numbers_that_are_not_finite_stop_the_run(tmp_path, monkeypatch, capsys):
    before_step(monkeypatch, 4, lambda step: step.model.exits[1].fc.weight.data.fill_(math.inf))
    assert run(tmp_path / "run", *ALL) == 1
    error = one_line(capsys)
    assert error.startswith("error: epoch 2: ") and "byot_kl" in error and "not finite" in error and "--lr" in error
    assert len(read_records(tmp_path / "run")) == 1
