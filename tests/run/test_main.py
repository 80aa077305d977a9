"""The command end to end, on forty synthetic images: what a run writes, evaluation, errors that become one line."""

import itertools
import json
import math
import shlex
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ALL, files, make_small, one_line, read, read_records, run, save_photos, val_only

import main
from data import build_loaders
from models import load_run
from utils import run_directory
from utils.calibration import calibrate, fit_temperature
from utils.engine import evaluate, predict
from utils.machine import MACHINE_FACTS
from utils.metrics import METRICS

COMBINATIONS = [" ".join(methods) for n in range(4) for methods in itertools.combinations(ALL, n)]
COMBINATIONS += ["--BYOT --BYOT_from_k_block 2", "--DML --DML_on_output"]
EXITS_TRAINED = {"": [], "--PSKD": [], "--DML": [False] * 3, "--PSKD --DML": [False] * 3}  # all others: all three
EXITS_TRAINED["--BYOT --BYOT_from_k_block 2"] = [False, True, True]


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_every_combination_writes_what_the_design_says(flags, tmp_path):
    directory = tmp_path / "run"
    assert run(directory, *flags.split(), "--save_predictions", "--lr_decay_schedule", "1") == 0
    records, results, config = read_records(directory), read(directory), read(directory, "config.json")
    terms = {"ce"} | ({"byot_ce", "byot_kl", "byot_hint"} if "--BYOT" in flags else set())
    terms |= {"dml"} if "--DML" in flags else set()
    for t, record in enumerate(records):
        assert record["epoch"] == t and record["lr"] == pytest.approx(0.05 * 0.1**t)
        assert record["alpha_t"] == (0.4 * (t + 1) if "--PSKD" in flags else None)
        assert record["images_per_second"] == pytest.approx(40 / record["seconds"])
        assert record["seconds_validation"] > 0 and (record["seconds_saving"] > 0) == (t > 0)
        assert record["train"].keys() == {"loss", "top1_error"} | terms
        assert record["train"]["loss"] == pytest.approx(sum(record["train"][term] for term in terms))
        for metrics in filter(None, (record["val"], record["ensemble"], *record["exits"])):
            assert metrics.keys() == METRICS.keys()
            assert all(value is None or math.isfinite(value) for value in metrics.values())
    seconds = [r["seconds"] + r["seconds_validation"] + r["seconds_saving"] for r in records]
    times = [sum(seconds) / 3600, (records[0]["seconds"] + records[1]["seconds"]) / 2]
    assert [results.pop("hours"), results.pop("seconds_per_epoch")] == pytest.approx(times)
    best = min(records, key=lambda record: record["val"]["top1_error"])
    assert results == {"status": "finished", "epochs": 2, "last": records[1], "best": best}
    assert config["precision"] == "fp32" and config["overwrite"] is False and config["PSKD"] == ("--PSKD" in flags)
    assert config["starts"] == [{"epoch": 0} | {key: config[key] for key in MACHINE_FACTS}]
    assert config["data"]["class_names"][9] == "hue 0, width 9" and config["data"]["mean"] == [0.5] * 3
    saved = {name: torch.from_numpy(array) for name, array in np.load(directory / "predictions.npz").items()}
    logits = torch.stack([*saved.get("exit_logits", ()), saved["logits"]])
    trained = EXITS_TRAINED.get(flags, [True] * 3)
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
        expected = {"epoch": epoch, **evaluate(logits, labels, [True] * 3)}
        assert len(held_labels) == len(labels) == 20 and expected == {key: block[key] for key in expected}
        assert block["temperatures"] == [fit_temperature(z, held_labels) for z in held_logits] == info["temperatures"]
        assert {name: block[name] for name in ("temperatures", "calibrated")} == calibrate(
            (held_logits, held_labels), (logits, labels), [True] * 3
        )
        curve, chosen = block["early_exit"]["curve"], block["early_exit"]["chosen"]
        assert curve[-1]["accuracy"] == pytest.approx(100 - block["val"]["top1_error"])
        assert chosen in curve and chosen["heldout_accuracy"] >= curve[-1]["heldout_accuracy"] - 0.5


@pytest.fixture
def folders(tmp_path) -> Path:
    """A finished run with no flag at its default, on a folder of classes beside it, whose cache is gone."""
    save_photos(tmp_path / "photos")
    flags = "--BYOT --data_type folder --width 8 --num_resnet_blocks 2 --image_size 24 --val_split 0.3 --classes 2"
    assert run(tmp_path / "run", *flags.split(), "--data_path", str(tmp_path / "photos")) == 0
    (tmp_path / "photos" / "decoded-images.npz").unlink()
    return tmp_path


def test_val_only_takes_flags_from_the_checkpoint_and_writes_val_json_only(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    before, last = files(folders), read(folders / "run")["last"]
    line = (folders / "run" / "experiment.log").read_text().split("evaluate again: python main.py ")[1].splitlines()[0]
    assert main.main([*shlex.split(line), "--device", "cpu"]) == 0
    written = folders / "experiments" / "val_only" / "val.json"
    found = json.loads(written.read_text())
    assert found.pop("checkpoint") == str(folders / "run" / "checkpoint_last.pth")
    recorded = read(folders / "run", "config.json")["data"]["splits"]["val"]
    assert found.pop("images") == found.pop("images_of_the_run") == recorded
    assert found == {key: last[key] for key in ("epoch", "val", "exits", "ensemble")}
    assert files(folders).keys() - before.keys() == {written} and files(folders).items() >= before.items()
    (folders / "photos").rename(folders / "moved")
    assert val_only(folders / "run", folders / "out") == 1
    assert str(folders / "photos") in one_line(capsys) and not (folders / "photos").exists()
    words = ("--data_path", str(folders / "moved"), "--precision", "bf16", "--label_smoothing", "0")
    assert val_only(folders / "run", folders / "out", *words) == 0
    assert val_only(folders / "run", folders / "out", "--PSKD", "--width", "4") == 1
    assert "--PSKD False -> True, --width 8 -> 4" in one_line(capsys)


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
    named = (
        "7 of 8",
        "a: a mistake",
        "b/",
        "not finite",
        "--width: -5",
        "--image_size",
        "manual_seed",
        "new is not a directory",
        "g/",
    )
    assert all(words in error for words in named), error
    assert read(folders / "all", "val.json").keys() == {str(folders / "runs" / "h")} and not (folders / "new").exists()
