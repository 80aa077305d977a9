"""Which run is this, and what may be removed: other runs' files, stale checkpoints, allowed changes."""

from pathlib import Path

import pytest
import torch
from helpers import bits, files, read, read_records, train, val_only

import main
from utils import run_directory
from utils.checkpoint import BEST, LAST, PREVIOUS, load_checkpoint, write_checkpoint

EXPORTS = ("config.json", "metrics.jsonl", "results.json")


@pytest.fixture
def stopped(copied) -> Path:
    """Two of three epochs: the last checkpoint is gone, the previous one is there."""
    (copied / LAST).unlink()
    return copied


def forge(file: Path, **entries) -> None:
    write_checkpoint(file, load_checkpoint(file) | entries)


def first_epochs(directory: Path) -> list[int]:
    """Of each start of the run."""
    starts = read(directory, "config.json")["starts"]
    return [start["epoch"] for start in starts]


def test_finished_run_is_extended_by_permission(copied):
    assert train(copied, "--end_epoch", "4", "--allow_end_epoch_change") == 0
    assert len(read_records(copied)) == 4
    assert read(copied)["status"] == "finished"
    change = {"epoch": 3, "name": "end_epoch", "before": 3, "after": 4}
    assert read(copied, "config.json")["changes"] == [change]
    assert load_checkpoint(copied / LAST)["changes"] == [change]


def test_default_drops_move_with_the_length(copied):
    assert train(copied, "--end_epoch", "5", "--allow_change", "end_epoch") == 0
    changes = [(change["name"], change["before"], change["after"]) for change in read(copied, "config.json")["changes"]]
    assert changes == [("end_epoch", 3, 5), ("lr_decay_schedule", [2, 3], [3, 4])]
    assert [record["lr"] for record in read_records(copied)] == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005])


def test_other_precision_is_refused_without_permission(stopped, refused):
    assert "--precision fp32 -> bf16" in refused(train, stopped, "--precision", "bf16")


def test_permission_is_suggested_only_where_it_suffices(stopped, refused):
    assert "(--allow_change end_epoch " in refused(train, stopped, "--end_epoch", "4")
    assert "(--allow_change end_epoch lr_decay_schedule " in refused(train, stopped, "--end_epoch", "5")
    error = refused(train, stopped, "--end_epoch", "4", "--seed", "5")
    assert "--end_epoch 3 -> 4" in error
    assert "--allow_change" not in error


def test_precision_changes_by_permission(stopped):
    assert train(stopped, "--precision", "bf16", "--allow_change", "precision") == 0
    change = {"epoch": 2, "name": "precision", "before": "fp32", "after": "bf16"}
    assert read(stopped, "config.json")["changes"] == [change]


def test_killed_while_a_finished_run_is_extended_leaves_no_finished_results(copied, monkeypatch):
    monkeypatch.setattr(main, "Logger", lambda *_: 1 / 0)  # just after the exports
    with pytest.raises(ZeroDivisionError):
        train(copied, "--end_epoch", "5", "--allow_end_epoch_change")
    results = read(copied)
    assert results["status"] == "failed"
    assert results["epochs"] == 3
    assert read(copied, "config.json")["end_epoch"] == 5


def test_results_say_running_before_config_is_replaced(copied, monkeypatch):
    write = run_directory.write_atomic
    written = []

    def record(path, content):
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(run_directory, "write_atomic", record)
    assert train(copied, "--end_epoch", "4", "--allow_end_epoch_change") == 0
    assert written[:2] == ["results.json", "config.json"]
    assert written[-1] == "results.json"


def test_stale_best_checkpoint_is_not_taken(finished, stopped):
    """Another run's, with a lower error."""
    stale = load_checkpoint(stopped / PREVIOUS)
    for record in stale["history"]:
        record["val"]["top1_error"] -= 1
    write_checkpoint(stopped / BEST, stale)
    assert train(stopped) == 0
    history = load_checkpoint(stopped / BEST)["history"]
    assert history == load_checkpoint(stopped / LAST)["history"][: len(history)]
    assert bits(read(stopped)["test"]["last"]) == bits(read(finished)["test"]["last"])


def test_lost_best_checkpoint_of_the_last_epoch_is_linked_again(copied):
    history = load_checkpoint(copied / LAST)["history"]
    history[-1]["val"]["top1_error"] = 0.0
    forge(copied / LAST, history=history, finished=False)
    (copied / BEST).unlink()
    assert train(copied) == 0
    assert read(copied)["best"]["epoch"] == 2
    assert load_checkpoint(copied / BEST)["epoch"] == 2


@pytest.mark.parametrize("resumes", [False, True])
def test_results_whose_checkpoints_were_removed_are_kept(resumes, finished, copied, refused):
    for file in copied.glob("*.pth"):  # as a user may, to save room
        file.unlink()
    before = files(copied)
    words = ["--resume", str(finished)] if resumes else []
    error = refused(train, copied, *words)
    assert "whose checkpoints are gone" in error
    assert "--overwrite" in error
    assert files(copied) == before


FOREIGN = ["checkpoint_final.pth", "predictions.npz", "val.json", "results.json", "config.json", "experiment.log"]


@pytest.mark.parametrize("name", FOREIGN)
def test_directory_with_files_of_something_else_is_refused(name, tmp_path, refused):
    file = tmp_path / "run" / name
    file.parent.mkdir()
    file.write_text("precious")
    assert f"{name} is not this run's" in refused(train, file.parent)
    assert file.read_text() == "precious"


def test_directory_of_a_run_that_stopped_before_its_first_save_is_used_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"status": "interrupted", "epochs": 0}')
    (tmp_path / "run" / "experiment.log").write_text("first start\n")
    assert train(tmp_path / "run") == 0
    assert len(read_records(tmp_path / "run")) == 3


def test_only_temporary_files_of_a_run_are_removed(stopped):
    (stopped / "notes.tmp").write_text("precious")
    (stopped / f"checkpoint_last.pth.{'0' * 32}.tmp").write_text("left by a killed run")
    assert train(stopped) == 0
    names = [file.name for file in stopped.glob("*.tmp")]
    assert names == ["notes.tmp"]


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_are_written_again_but_never_read_back(name, finished, copied):
    (copied / name).write_text("[not JSON")
    assert train(copied) == 0
    assert (copied / name).read_bytes() == (finished / name).read_bytes()


def test_finished_run_is_known_by_its_checkpoint(copied, capsys):
    before = files(copied)
    forge(copied / LAST)  # the same content, in another file
    before[copied / LAST] = (copied / LAST).read_bytes()
    assert train(copied) == 0
    assert "is finished" in capsys.readouterr().out
    assert files(copied) == before


FORGED = {"args": {"width": "x", "help": True}, "starts": [{"epoch": 0}]}


@pytest.mark.parametrize("entry", FORGED)
def test_forged_content_with_right_checksums_is_one_line_that_names_the_file(entry, copied, refused):
    forge(copied / LAST, **{entry: FORGED[entry]})
    before = files(copied)
    assert str(copied / LAST) in refused(train, copied)
    assert files(copied) == before


def test_val_only_refuses_forged_flags(copied, tmp_path, refused):
    forge(copied / LAST, args=FORGED["args"])
    assert str(copied / LAST) in refused(val_only, copied, tmp_path / "out")


def test_val_only_does_not_need_the_starts(copied, tmp_path):
    forge(copied / LAST, starts=FORGED["starts"])
    assert val_only(copied, tmp_path / "out") == 0


def set_momentum(directory: Path, tensor: torch.Tensor | None) -> None:
    """Of the first weight, in a run of which the last epoch is left to train."""
    (directory / PREVIOUS).rename(directory / LAST)
    optimizer = load_checkpoint(directory / LAST)["optimizer"]
    optimizer["state"][0] = {"momentum_buffer": tensor} if tensor is not None else {}
    forge(directory / LAST, optimizer=optimizer)


def test_momentum_is_required_of_every_trained_weight(stopped, refused):
    set_momentum(stopped, None)
    assert "momentum is missing" in refused(train, stopped)


def test_momentum_of_another_type_is_cast(stopped):
    set_momentum(stopped, torch.zeros(4, 3, 3, 3, dtype=torch.float64))
    assert train(stopped) == 0
