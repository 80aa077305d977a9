"""The command, end to end, on a handful of synthetic images."""

import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from models import Outputs, build_model
from utils.engine import evaluate
from utils.metrics import classification_metrics

ROOT = Path(main.__file__).parent
METRICS = {"top1_error", "top5_error", "nll", "ece", "aurc", "eaurc"}
SMALL = "--data_type synthetic --width 8 --limit_train 200 --limit_val 100 --end_epoch 2 --device cpu --precision fp32"
METHODS = ("--PSKD", "--BYOT", "--DML")


def run(directory: Path, *words: str, name: str = "run") -> int:
    return main.main([*SMALL.split(), *words, "--experiments_dir", str(directory), "--run_name", name])


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def checkpoint(directory: Path, name: str = "last") -> dict:
    return torch.load(directory / f"checkpoint_{name}.pth", weights_only=True)


def without_times(value):
    """A record without what differs between two equal runs."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("on", list(itertools.product([False, True], repeat=3)))
def test_every_combination_writes_what_the_design_says(on, tmp_path):
    words = [m for m, is_on in zip(METHODS, on, strict=True) if is_on]
    pskd, byot, dml = on
    assert run(tmp_path, *words) == 0
    directory = tmp_path / "run"
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for t, line in enumerate(lines):
        assert line["lr"] == 0.1 and line["alpha_t"] == (pytest.approx(0.8 * (t + 1) / 2) if pskd else None)
        assert line["seconds"] > 0 and line["images_per_second"] == pytest.approx(200 / line["seconds"])
        terms = {"ce"} | ({"byot_ce", "byot_kl", "byot_hint"} if byot else set()) | ({"dml"} if dml else set())
        assert line["train"].keys() == {"loss", "top1_error"} | terms
        assert line["train"]["loss"] == pytest.approx(sum(line["train"][term] for term in terms))
        assert line["val"].keys() == METRICS and all(math.isfinite(v) for v in line["val"].values())
        assert len(line["exits"]) == (3 if byot or dml else 0)
        assert all((e is not None and e.keys() == METRICS) if byot else e is None for e in line["exits"])
        assert (line["ensemble"] is not None) == byot
    found = results(directory)
    assert found["last"] == lines[-1] and found["status"] == "finished" and found["epochs"] == 2
    assert found["best"] == min(lines, key=lambda line: line["val"]["top1_error"])
    assert found["seconds_per_epoch"] == pytest.approx((lines[0]["seconds"] + lines[1]["seconds"]) / 2)
    config = json.loads((directory / "config.json").read_text())
    assert config["PSKD"] == pskd and config["precision"] == "fp32" and config["image_size"] == 32
    assert {"python", "torch", "torchvision", "device_name", "git_commit"} <= config.keys()
    last = checkpoint(directory)
    assert last.keys() == {"model", "optimizer", "objective", "epoch", "history", "args"}
    assert last["epoch"] == 1 and last["history"] == lines and last["args"]["seed"] == 4
    assert checkpoint(directory, "previous")["epoch"] == 0
    assert checkpoint(directory, "best")["epoch"] == found["best"]["epoch"]
    assert {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.weight"} <= last["model"].keys()
    assert list((directory / "tensorboard").iterdir()) and (directory / "experiment.log").stat().st_size


def test_default_run_name(tmp_path):
    args = main.parse_args(["--PSKD", "--DML", "--data_type", "synthetic", "--seed", "7"])
    assert args.run_name == "synthetic_resnet18_PSKD_DML_seed7"
    assert main.parse_args([]).run_name == "cifar100_resnet18_baseline_seed4"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of all three methods, with its predictions."""
    directory = tmp_path_factory.mktemp("experiments")
    assert run(directory, *METHODS, "--save_predictions", "--saveckp_freq", "2") == 0
    return directory / "run"


def test_predictions_give_the_metrics_of_the_last_epoch(finished):
    saved = np.load(finished / "predictions.npz")
    assert saved["logits"].dtype == np.float32 and saved["logits"].shape == (100, 100)
    again = classification_metrics(torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"]))
    assert again == pytest.approx(results(finished)["last"]["val"], rel=1e-12)
    assert (finished / "checkpoint_epoch1.pth").exists()


def test_memory_is_whole_and_its_rows_are_probabilities(finished):
    memory = checkpoint(finished)["objective"]["targets.memory"]
    assert memory.shape == (200, 100)
    assert torch.allclose(memory.sum(dim=1), torch.ones(200), atol=1e-5)


def test_same_command_on_a_finished_run_says_so(finished, capsys):
    before = (finished / "results.json").read_bytes()
    assert run(finished.parent, *METHODS, "--save_predictions", "--saveckp_freq", "2") == 0
    assert "is finished" in capsys.readouterr().out
    assert (finished / "results.json").read_bytes() == before


def test_a_restart_does_not_take_an_older_run_for_what_was_to_overwrite_it(finished, monkeypatch, capsys):
    before = (finished / "results.json").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(finished.parent, *METHODS, "--save_predictions", "--saveckp_freq", "2", "--overwrite") == 1
    assert "may not have come to do it" in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


@pytest.mark.parametrize("lost", ["config.json", "metrics.jsonl", "results.json"])
def test_a_finished_run_that_lost_a_file_gets_it_again(finished, tmp_path, lost):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    (directory / lost).unlink()
    assert run(tmp_path, *METHODS, "--save_predictions", "--saveckp_freq", "2") == 0
    assert results(directory) == results(finished)
    assert (directory / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert json.loads((directory / "config.json").read_text())["end_epoch"] == 2


def test_other_flags_are_refused_by_name_and_harm_nothing(finished, capsys):
    before = (finished / "results.json").read_bytes()
    assert run(finished.parent, "--PSKD", "--lr", "0.2") == 1
    message = capsys.readouterr().err
    assert all(word in message for word in ("--BYOT True -> False", "--lr 0.1 -> 0.2", "--overwrite"))
    assert message.count("\n") == 1
    assert (finished / "results.json").read_bytes() == before


def test_val_only_prints_and_writes_the_same_metrics(finished, capsys):
    files = {p: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert run(finished.parent, "--BYOT", "--val_only", "--resume", str(finished), name="again") == 0
    written = json.loads((finished.parent / "again" / "val.json").read_text())
    last = results(finished)["last"]
    for key in ("val", "ensemble"):
        assert written[key] == pytest.approx(last[key], rel=1e-12)
    for ours, theirs in zip(written["exits"], last["exits"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert f"{last['val']['nll']:.4f}" in capsys.readouterr().out
    assert files == {p: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert [p.name for p in (finished.parent / "again").iterdir()] == ["val.json"]


def test_the_printed_evaluation_command_works(finished):
    line = (finished / "experiment.log").read_text().split("evaluate again: ")[1].strip()
    words = [sys.executable, *shlex.split(line)[1:], "--device", "cpu", "--precision", "fp32", "--run_name", "pasted"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = json.loads((finished.parent / "pasted" / "val.json").read_text())
    # Another process may have another number of threads, and so other last digits.
    assert again["val"]["nll"] == pytest.approx(results(finished)["last"]["val"]["nll"], rel=1e-6)


def test_val_only_on_a_directory_of_runs_prints_their_table(finished, capsys):
    assert run(finished.parent, "--PSKD", name="second") == 0
    capsys.readouterr()
    experiments = finished.parent
    argv = ["--val_only", "--resume", str(experiments), "--experiments_dir", str(experiments), "--run_name", "all"]
    assert main.main([*argv, "--device", "cpu", "--precision", "fp32"]) == 0
    written = json.loads((experiments / "all" / "val.json").read_text())
    for directory in (finished, experiments / "second"):
        assert written[str(directory)]["val"] == pytest.approx(results(directory)["last"]["val"], rel=1e-12)
    assert str(finished) in capsys.readouterr().out


def test_val_only_on_a_directory_goes_on_past_a_checkpoint_that_cannot_be_used(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "good")
    shutil.copytree(finished, tmp_path / "bad")
    foreign = checkpoint(finished)
    del foreign["args"]["limit_val"]
    torch.save(foreign, tmp_path / "bad" / "checkpoint_last.pth")
    argv = ["--val_only", "--resume", str(tmp_path), "--experiments_dir", str(tmp_path), "--run_name", "all"]
    assert main.main([*argv, "--device", "cpu", "--precision", "fp32"]) == 1
    error = capsys.readouterr().err
    assert "1 of 2 runs could not be evaluated" in error and "limit_val" in error and error.count("\n") == 1
    assert json.loads((tmp_path / "all" / "val.json").read_text()).keys() == {str(tmp_path / "good")}


def test_val_only_without_a_checkpoint_that_can_be_used_leaves_what_was_written(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "bad")
    (tmp_path / "bad" / "checkpoint_last.pth").write_bytes(b"PK")
    written = tmp_path / "all" / "val.json"
    written.parent.mkdir()
    written.write_text("before")
    argv = ["--val_only", "--resume", str(tmp_path), "--experiments_dir", str(tmp_path), "--run_name", "all"]
    assert main.main([*argv, "--device", "cpu", "--precision", "fp32"]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "written" not in said.out and written.read_text() == "before"


def test_resume_into_another_directory_continues_the_history(finished, tmp_path):
    words = [*METHODS, "--resume", str(finished), "--end_epoch", "3", "--allow_end_epoch_change"]
    assert main.main([*SMALL.split(), *words, "--experiments_dir", str(tmp_path), "--run_name", "on"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    assert lines[:2] == checkpoint(finished)["history"] and len(lines) == 3
    assert lines[2]["alpha_t"] == pytest.approx(0.8)


def test_resumed_in_another_directory_is_the_uninterrupted_run_to_the_bit(finished, tmp_path):
    """Train one epoch, change end_epoch on a baseline (whose losses do not depend on it), compare."""
    short, long = tmp_path / "short", tmp_path / "long"
    assert run(tmp_path, "--BYOT", "--end_epoch", "1", name="short") == 0
    assert run(tmp_path, "--BYOT", "--allow_end_epoch_change", name="short") == 0
    assert run(tmp_path, "--BYOT", name="long") == 0
    a, b = checkpoint(short), checkpoint(long)
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    for ours, theirs in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert without_times(a["history"]) == without_times(b["history"])


def test_val_split_keeps_the_test_split_for_the_end(tmp_path):
    assert run(tmp_path, "--BYOT", "--val_split", "0.1") == 0
    found = results(tmp_path / "run")
    assert found["test"].keys() == {"last", "best"}
    for name in ("last", "best"):
        assert found["test"][name]["val"].keys() == METRICS
        assert found["test"][name]["epoch"] == found[name]["epoch"]
        assert found["test"][name]["val"] != found[name]["val"]


def test_overwrite_starts_anew(tmp_path):
    assert run(tmp_path, "--end_epoch", "1") == 0
    assert run(tmp_path, "--end_epoch", "1", "--seed", "5", "--overwrite") == 0
    assert checkpoint(tmp_path / "run")["args"]["seed"] == 5
    assert not (tmp_path / "run" / "checkpoint_previous.pth").exists()


def test_seed_decides_the_run(tmp_path):
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(tmp_path, "--end_epoch", "1", "--seed", seed, name=name) == 0
        weights.append(checkpoint(tmp_path / name)["model"]["fc.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_bf16_trains(tmp_path):
    assert run(tmp_path, *METHODS, "--precision", "bf16", "--end_epoch", "1") == 0
    assert checkpoint(tmp_path / "run")["model"]["conv1.weight"].dtype == torch.float32


def test_compiled_equals_eager(tmp_path):
    """The graph that torch.compile traces, run without a code generator: what --compile gives but for the speed."""
    args = main.parse_args([*SMALL.split(), "--BYOT"])
    model = build_model(args, 10)
    images = torch.randn(4, 3, 32, 32)
    eager = model(images)
    traced = torch.compile(model, backend="aot_eager", dynamic=False)(images)
    assert isinstance(traced, Outputs)
    assert torch.allclose(traced.logits, eager.logits, atol=1e-5)
    labels = torch.zeros(4, dtype=torch.int64)
    stacked = torch.stack([*traced.exit_logits, traced.logits]).detach()
    assert evaluate(stacked, labels, [True] * 3)["ensemble"].keys() == METRICS


def test_help_fits_and_names_every_flag():
    done = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    flags = vars(main.parse_args([]))
    assert all(f"--{name}" in done.stdout for name in flags)
    for group in ("methods", "data:", "model:", "optimisation", "run:"):
        assert f"\n{group}" in done.stdout


def test_notes_what_is_allowed_and_perhaps_not_meant(monkeypatch):
    cpu = torch.device("cpu")
    args = main.parse_args(["--end_epoch", "2", "--precision", "bf16", "--device", "cpu"])
    monkeypatch.setattr(main, "has_bf16_instructions", lambda: False)
    rate, slow = main.notes(args, cpu)
    assert "never drops" in rate and "150 225" in rate and "bf16 is slow" in slow
    monkeypatch.setattr(main, "has_bf16_instructions", lambda: True)
    assert main.notes(main.parse_args(["--device", "cpu"]), cpu) == []


def test_results_without_checkpoints_are_not_overwritten(tmp_path, capsys):
    """A user who deleted the large files of a finished run to save room."""
    assert run(tmp_path, "--end_epoch", "1") == 0
    for file in (tmp_path / "run").glob("*.pth"):
        file.unlink()
    before = (tmp_path / "run" / "results.json").read_bytes()
    assert run(tmp_path, "--end_epoch", "1", "--lr", "0.05") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    assert run(tmp_path, "--end_epoch", "1", "--overwrite") == 0


def test_predictions_can_be_asked_for_afterwards_and_are_never_stale(tmp_path):
    assert run(tmp_path, "--end_epoch", "1") == 0
    assert run(tmp_path, "--end_epoch", "1", "--save_predictions") == 0
    saved = np.load(tmp_path / "run" / "predictions.npz")
    again = classification_metrics(torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"]))
    assert again == pytest.approx(results(tmp_path / "run")["last"]["val"], rel=1e-12)
    assert run(tmp_path, "--end_epoch", "2", "--allow_end_epoch_change") == 0
    assert not (tmp_path / "run" / "predictions.npz").exists()


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_mended(tmp_path, capsys):
    assert run(tmp_path) == 0
    before = checkpoint(tmp_path / "run")["model"]
    (tmp_path / "run" / "checkpoint_last.pth").write_bytes(b"PK")
    assert run(tmp_path) == 0
    assert "going on from checkpoint_previous.pth" in capsys.readouterr().out
    after = checkpoint(tmp_path / "run")["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_only_own_files_are_removed(tmp_path):
    directory = tmp_path / "run"
    (directory / "tensorboard").mkdir(parents=True)
    for name in ("notes.tmp", "tensorboard/notes.txt"):
        (directory / name).write_text("mine")
    assert run(tmp_path, "--end_epoch", "1") == 0
    assert run(tmp_path, "--end_epoch", "1", "--overwrite") == 0
    assert (directory / "notes.tmp").exists() and (directory / "tensorboard" / "notes.txt").exists()


def test_a_start_that_fails_leaves_no_directory(tmp_path, capsys):
    words = ["--data_type", "tinyimagenet", "--data_path", str(tmp_path / "tiny-imagenet-200")]
    (tmp_path / "tiny-imagenet-200" / "train").mkdir(parents=True)
    assert run(tmp_path / "experiments", *words) == 1
    assert "wnids.txt" in capsys.readouterr().err
    assert not (tmp_path / "experiments" / "run").exists()


def test_val_only_goes_past_a_damaged_run(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "good")
    shutil.copytree(finished, tmp_path / "bad")
    (tmp_path / "bad" / "checkpoint_last.pth").write_bytes(b"PK")
    argv = ["--val_only", "--resume", str(tmp_path), "--experiments_dir", str(tmp_path), "--run_name", "all"]
    assert main.main([*argv, "--device", "cpu", "--precision", "fp32"]) == 1
    assert "1 of 2 runs" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "all" / "val.json").read_text())) == [str(tmp_path / "good")]
