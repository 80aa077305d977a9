"""Which run is this: flags that may differ, what is exported, stale checkpoints, files of something else."""

import os
from pathlib import Path

import pytest
import torch
from helpers import bits, files, forge, read, read_checkpoint, train, val_only

from utils import run_directory
from utils.checkpoint import BEST, LAST, PREVIOUS, load_checkpoint
from utils.errors import UserError
from utils.resume import check_flags, check_length


@pytest.fixture
def stopped(copied) -> Path:
    """Two of three epochs: the last checkpoint is gone, the previous one is there."""
    (copied / LAST).unlink()
    return copied


DEFAULTS = {"lr": 0.1, "end_epoch": 300, "DML": False}
FILE = Path("run", LAST)


def test_other_flags_are_refused_by_name():
    with pytest.raises(UserError, match=r"^run/checkpoint_last.pth .*: DML True -> False, lr 0.1 -> 0.2; .*--weights"):
        check_flags(FILE, DEFAULTS | {"DML": True}, DEFAULTS | {"lr": 0.2}, DEFAULTS, [])


@pytest.mark.parametrize("others", [{}, {"lr": 0.2}])
def test_permission_is_suggested_only_where_it_suffices(others):
    with pytest.raises(UserError) as error:
        check_flags(FILE, DEFAULTS, DEFAULTS | {"end_epoch": 4, **others}, DEFAULTS, [])
    assert ("--allow_change end_epoch " in str(error.value)) == (not others)


def test_more_epochs_than_asked_for_are_refused():
    check_length(FILE, 3, 3)
    with pytest.raises(UserError, match="has 3 epochs already, more than --end_epoch 2"):
        check_length(FILE, 3, 2)


@pytest.mark.parametrize("name, before, after", [("end_epoch", 3, 4), ("precision", "fp32", "bf16")])
def test_run_goes_on_with_a_change_that_is_allowed(name, before, after, copied):
    if name == "precision":
        (copied / LAST).unlink()
    done = load_checkpoint(copied / (LAST if name == "end_epoch" else PREVIOUS)).epoch + 1
    assert train(copied, f"--{name}", str(after), "--allow_change", name) == 0
    assert read(copied)["status"] == "finished"
    change = {"name": name, "before": before, "after": after, "epoch": done}
    assert read(copied, "config.json")["changes"] == read_checkpoint(copied)["changes"] == [change]


def test_results_of_an_extended_run_say_running_before_config_is_replaced(copied, monkeypatch):
    write = run_directory.write_atomic
    written = []

    def record(path, content):
        written.append((path.name, b'"running"' in content))
        write(path, content)

    monkeypatch.setattr(run_directory, "write_atomic", record)
    assert train(copied, "--end_epoch", "4", "--allow_change", "end_epoch") == 0
    assert written[:2] == [("results.json", True), ("config.json", False)]
    assert written[-1] == ("results.json", False)


def test_stale_best_checkpoint_is_not_taken(finished, stopped):
    """Another run's, with a lower error."""
    history = read_checkpoint(stopped, PREVIOUS)["history"]
    first = history[0]["val"]["final"]
    first["top1_error"] = 1.0  # better than any later epoch
    forge(stopped / PREVIOUS, history=history)
    first["top1_error"] = 0.0
    forge(stopped / PREVIOUS, stopped / BEST, history=history)
    assert train(stopped) == 0
    assert not (stopped / BEST).exists()
    assert read(stopped)["test"].keys() == {"last"}
    assert bits(read(stopped)["test"]["last"]) == bits(read(finished)["test"]["last"])


def test_lost_best_checkpoint_of_the_last_epoch_is_linked_again(copied):
    history = read_checkpoint(copied)["history"]
    history[-1]["val"]["final"]["top1_error"] = 0.0
    forge(copied / LAST, history=history, finished=False)
    (copied / BEST).unlink()
    assert train(copied) == 0
    assert read(copied)["best"]["epoch"] == 2
    assert load_checkpoint(copied / BEST).epoch == 2


@pytest.mark.parametrize("resumes", [False, True])
def test_results_whose_checkpoints_were_removed_are_kept(resumes, finished, copied, refused):
    for file in copied.glob("*.pth"):  # as a user may, to save room
        file.unlink()
    before = files(copied)
    words = ["--resume", str(finished)] if resumes else []
    error = refused(train, copied, *words)
    assert "is there, but no checkpoint_last.pth to go on from" in error
    assert files(copied) == before


@pytest.mark.parametrize("name", [*run_directory.EXPORTS, "checkpoint_final.pth"])
def test_directory_with_files_of_something_else_is_refused(name, tmp_path, refused):
    (tmp_path / name).write_text("precious")
    assert f"{tmp_path / name} is there, but no {LAST}" in refused(train, tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_named_pipes_stop_nothing(stopped, finished):
    for name in (".lock", "config.json"):
        (stopped / name).unlink()
        os.mkfifo(stopped / name)
    assert train(stopped) == 0
    assert read(stopped, "config.json")["starts"][0] == read(finished, "config.json")["starts"][0]


def test_only_temporary_files_of_a_run_are_removed(stopped):
    foreign = {"notes.tmp", f"net.pt2.{'0' * 32}.tmp"}  # the second, of scripts/export.py at work
    for name in foreign:
        (stopped / name).write_text("precious")
    (stopped / f"checkpoint_last.pth.{'0' * 32}.tmp").write_text("left by a killed run")
    assert train(stopped) == 0
    assert {file.name for file in stopped.glob("*.tmp")} == foreign


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "results.json"])
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


DEEP = []
for _ in range(300):
    DEEP = [DEEP]
FORGED = {
    "args": {"width": "x", 5: True},
    "starts": [{"epoch": 0}],
    "data": {"class_names": "ab"},
    "test": {"last": {"epoch": 0, "temperatures": [1.0]}},
    "changes": DEEP,
}


@pytest.mark.parametrize("entry", FORGED)
def test_forged_content_with_right_checksums_is_one_line_that_names_the_file(entry, copied, tmp_path, refused):
    forge(copied / LAST, **{entry: FORGED[entry]})
    (copied / PREVIOUS).unlink()
    before = files(copied)
    assert str(copied / LAST) in refused(train, copied)
    assert str(copied / LAST) in refused(val_only, copied, tmp_path / "out")
    assert files(copied) == before


def test_momentum_of_another_type_is_cast(stopped):
    optimizer = read_checkpoint(stopped, PREVIOUS)["optimizer"]
    optimizer["state"][0] = {"momentum_buffer": torch.zeros(4, 3, 3, 3, dtype=torch.float64)}
    forge(stopped / PREVIOUS, optimizer=optimizer)
    assert train(stopped) == 0
