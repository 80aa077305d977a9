"""The command end to end, on forty synthetic images: what each combination of methods writes."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ALL, make_small, read, read_records, run
from PIL import Image

import main
from data import build_loaders
from models import load, load_run
from utils import run_directory
from utils.calibration import fit_temperatures, scaled_metrics
from utils.engine import evaluate, predict

COMBINATIONS = ["--BYOT --BYOT_from_k_block 2", "--DML --DML_on_output"]
for number in range(len(ALL) + 1):
    COMBINATIONS += map(" ".join, itertools.combinations(ALL, number))


class Written(SimpleNamespace):
    """A finished run of two epochs: its flags and what it wrote."""

    def __init__(self, flags: str, directory: Path):
        super().__init__(flags=flags, directory=directory)
        self.records = read_records(directory)
        self.results = read(directory)
        self.config = read(directory, "config.json")

    def trained(self) -> list[str]:
        """Names of the classifiers that a loss trains."""
        if "--BYOT_from_k_block" in self.flags:
            return ["exit 2", "exit 3", "final"]
        if "--BYOT" in self.flags or "--DML_on_output" in self.flags:
            return ["exit 1", "exit 2", "exit 3", "final"]
        return ["final"]


@pytest.fixture(scope="module", params=COMBINATIONS)
def written(request, tmp_path_factory) -> Written:
    directory = tmp_path_factory.mktemp("combinations") / "run"
    assert run(directory, *request.param.split(), "--save_predictions", "--lr_decay_schedule", "1") == 0
    return Written(request.param, directory)


def test_records_hold_the_learning_rate(written):
    rates = [record["lr"] for record in written.records]
    assert rates == pytest.approx([0.05, 0.005])


def test_alpha_t_grows_with_the_epochs_of_pskd_alone(written):
    found = [record.get("alpha_t") for record in written.records]
    expected = [0.4, 0.8] if "--PSKD" in written.flags else [None, None]
    assert found == expected


def test_records_name_the_terms_of_the_loss_which_add_up(written):
    terms = {"ce"}
    if "--BYOT" in written.flags:
        terms |= {"byot_ce", "byot_kl", "byot_hint"}
    if "--DML" in written.flags:
        terms |= {"dml"}
    train = written.records[1]["train"]
    assert train.keys() == {"loss", "top1_error"} | terms
    assert train["loss"] == pytest.approx(sum(train[term] for term in terms))


def test_records_hold_what_training_validation_and_saving_took(written):
    first, second = written.records
    for record in (first, second):
        assert record["images_per_second"] == pytest.approx(40 / record["seconds"])
        assert record["seconds_validation"] > 0
    assert first["seconds_saving"] == 0  # of the save before it
    assert second["seconds_saving"] > 0


def test_results_hold_the_last_and_the_best_epoch(written):
    results = dict(written.results)
    del results["hours"], results["seconds_per_epoch"]
    best = min(written.records, key=lambda record: record["val"]["final"]["top1_error"])
    last = written.records[1]
    assert results == {"status": "finished", "epochs": 2, "last": last, "best": best}


def test_results_hold_hours_and_seconds_per_epoch(written):
    training = [record["seconds"] for record in written.records]
    total = sum(training)
    for record in written.records:
        total += record["seconds_validation"] + record["seconds_saving"]
    assert written.results["hours"] == pytest.approx(total / 3600)
    assert written.results["seconds_per_epoch"] == pytest.approx(sum(training) / 2)


def test_config_holds_every_flag_which_do_not_define_the_experiment_and_where_it_ran(written):
    config = written.config
    assert config["precision"] == "fp32"
    assert config["overwrite"] is False
    assert config["PSKD"] == ("--PSKD" in written.flags)
    assert config["runtime"] == sorted(main.RUNTIME_FLAGS)
    (start,) = config["starts"]
    assert start.pop("epoch") == 0
    assert start.keys() >= {"python", "torch", "torchvision", "device_name", "processes"}
    assert start.items() <= config.items()


def test_predictions_of_all_classifiers_give_the_recorded_metrics(written):
    saved = np.load(written.directory / "predictions.npz")
    logits = saved["logits"][None]
    if "exit_logits" in saved:
        logits = np.concatenate([saved["exit_logits"], logits])
    num_exits = 3 if "--BYOT" in written.flags or "--DML" in written.flags else 0
    assert logits.shape == (num_exits + 1, 20, 10)
    assert logits.dtype == np.float32
    labels = torch.from_numpy(saved["labels"])
    measured = evaluate(torch.from_numpy(logits), labels, written.trained())
    assert measured == written.records[1]["val"]


TRAINED = ["exit 1", "exit 2", "exit 3", "final"]


@pytest.fixture(scope="module")
def held_out_run(tmp_path_factory) -> Path:
    """A run with held-out images, whose first epoch is made the best one, so that the two have different weights."""
    directory = tmp_path_factory.mktemp("held_out") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for module in (run_directory, load):
            patch.setattr(module, "best_epoch", lambda history: history[0])
        assert run(directory, *ALL, "--val_split", "0.5") == 0
        models = {epoch: load_run(directory, epoch) for epoch in ("last", "best")}
    return SimpleNamespace(directory=directory, models=models)


@pytest.fixture(scope="module", params=["last", "best"])
def evaluated(request, held_out_run) -> SimpleNamespace:
    """A block of `test`, and what it is measured from: logits and labels of the held-out and of the test images."""
    model, info = held_out_run.models[request.param]
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        val_loader = build_loaders(info["args"], "cpu", split="val")
        test_loader = build_loaders(info["args"], "cpu", split="test")
    held_out = predict(model, val_loader, "fp32")
    tested = predict(model, test_loader, "fp32")
    block = read(held_out_run.directory)["test"][request.param]
    return SimpleNamespace(name=request.param, block=block, info=info, held_out=held_out, tested=tested)


def test_block_holds_the_metrics_of_its_epoch_on_the_test_split(evaluated):
    assert evaluated.tested[0].shape == (4, 20, 10)
    assert evaluated.block["metrics"] == evaluate(*evaluated.tested, TRAINED)
    epochs = {"last": 1, "best": 0}
    assert evaluated.block["epoch"] == epochs[evaluated.name]


def test_temperatures_are_fitted_on_the_held_out_images(evaluated):
    assert evaluated.held_out[0].shape == (4, 20, 10)
    fitted = {name: t or 1.0 for name, t in fit_temperatures(*evaluated.held_out, TRAINED).items()}
    assert evaluated.block["temperatures"] == evaluated.info["temperatures"] == fitted


def test_block_holds_the_metrics_after_calibration(evaluated):
    calibrated = scaled_metrics(*evaluated.tested, evaluated.block["temperatures"])
    assert evaluated.block["calibrated"] == calibrated


def test_chosen_early_exit_keeps_the_held_out_accuracy(evaluated):
    early_exit = evaluated.block["early_exit"]
    never = early_exit["curve"][-1]
    assert never["accuracy"] == pytest.approx(100 - evaluated.block["metrics"]["final"]["top1_error"])
    assert early_exit["chosen"]["heldout_accuracy"] >= never["heldout_accuracy"] - 0.5


def test_easy_images_get_a_temperature_of_1_with_a_line_and_without_a_test_split_an_early_exit(tmp_path, capsys):
    """Black and white ones, of which the held-out ones are all right."""
    photos = tmp_path / "photos"
    for number in range(32):
        folder = photos / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 255 * (number % 2)).save(folder / f"{number}.png")
    words = f"--BYOT --val_split 0.5 --classes 2 --batch_size 4 --end_epoch 3 --lr 0.01 --width 8 --data_path {photos}"
    assert run(tmp_path / "run", "--data_type", "folder", *words.split()) == 0
    last = read(tmp_path / "run")["test"]["last"]
    assert last.keys() == {"epoch", "temperatures", "early_exit"}
    assert last["temperatures"]["final"] == 1
    assert "final on the held-out images: T = 1" in capsys.readouterr().out
    assert last["early_exit"]["chosen"]["heldout_accuracy"] == 100


def test_flags_without_effect_are_noted(tmp_path, capsys):
    words = "--lr_schedule cosine --lr_decay_rate 0.1 --alpha 0.1 --alpha_T 0.8 --PSKD --end_epoch 1"
    assert run(tmp_path / "run", *words.split()) == 0
    printed = capsys.readouterr().out
    notes = re.findall("note: --(.*) has no effect with(?:out)? --(.*)", printed)
    assert notes == [("lr_decay_rate", "lr_schedule cosine"), ("alpha", "BYOT")]
