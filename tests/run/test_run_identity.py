"""Which run is this, and what may be removed: other runs' files, stale checkpoints, allowed changes, restarts."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import bits, files, one_line, read, read_records, train, val_only

import main
from utils import distributed
from utils.checkpoint import BEST, LAST, PREVIOUS, load_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("experiments") / "finished"
    assert train(directory) == 0
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def forge(file: Path, **entries) -> None:
    write_checkpoint(file, load_checkpoint(file) | entries)


def test_a_finished_run_can_be_extended_by_permission_and_records_it(copied):
    assert train(copied, "--end_epoch", "4", "--allow_end_epoch_change") == 0
    change = {"epoch": 3, "name": "end_epoch", "before": 3, "after": 4}
    assert read(copied, "config.json")["changes"] == [change] == load_checkpoint(copied / LAST)["changes"]
    assert len(read_records(copied)) == 4 and read(copied)["status"] == "finished"


def test_precision_changes_on_resume_by_permission_only(copied, capsys):
    (copied / LAST).unlink()  # two of three epochs
    assert train(copied, "--precision", "bf16") == 1 and "--precision fp32 -> bf16" in one_line(capsys)
    assert train(copied, "--precision", "bf16", "--allow_change", "precision") == 0
    change = {"epoch": 2, "name": "precision", "before": "fp32", "after": "bf16"}
    assert read(copied, "config.json")["changes"] == [change]


def test_killed_while_a_finished_run_is_extended_leaves_no_finished_results(copied, monkeypatch):
    monkeypatch.setattr(main, "Logger", lambda *_: 1 / 0)  # just after the exports
    with pytest.raises(ZeroDivisionError):
        train(copied, "--end_epoch", "5", "--allow_end_epoch_change")
    assert read(copied)["status"] == "failed" and read(copied)["epochs"] == 3
    assert read(copied, "config.json")["end_epoch"] == 5


def test_results_say_running_before_config_is_replaced(copied, monkeypatch):
    from utils import run_directory

    write, written = run_directory.write_atomic, []

    def record(path, content):
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(run_directory, "write_atomic", record)
    assert train(copied, "--end_epoch", "4", "--allow_end_epoch_change") == 0
    assert written[:2] == ["results.json", "config.json"] and written[-1] == "results.json"


def test_a_stale_best_checkpoint_is_not_taken(finished, copied):
    """Another run's, with a lower error."""
    stale = load_checkpoint(copied / PREVIOUS)
    for record in stale["history"]:
        record["val"]["top1_error"] -= 1
    write_checkpoint(copied / BEST, stale)
    (copied / LAST).unlink()
    assert train(copied) == 0
    best = load_checkpoint(copied / BEST)
    assert best["history"] == load_checkpoint(copied / LAST)["history"][: len(best["history"])]
    assert bits(read(copied)["test"]["last"]) == bits(read(finished)["test"]["last"])


def test_lost_best_checkpoint_of_the_last_epoch_is_linked_again(copied):
    last = load_checkpoint(copied / LAST)
    last["history"][-1]["val"]["top1_error"] = 0.0
    write_checkpoint(copied / LAST, last | {"finished": False})
    (copied / BEST).unlink()
    assert train(copied) == 0
    assert read(copied)["best"]["epoch"] == 2 and load_checkpoint(copied / BEST)["epoch"] == 2


@pytest.mark.parametrize("words", [(), ("--resume", "other")])
def test_results_whose_checkpoints_were_removed_are_kept(words, finished, copied, capsys):
    for file in copied.glob("*.pth"):
        file.unlink()
    before = files(copied)
    words = [str(finished) if word == "other" else word for word in words]
    assert train(copied, *words) == 1 and "whose checkpoints are gone" in one_line(capsys)
    assert files(copied) == before


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "predictions.npz"])
def test_a_directory_with_files_of_something_else_is_refused(name, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    assert train(tmp_path / "run") == 1 and f"{name} is not this run's" in one_line(capsys)
    assert (tmp_path / "run" / name).read_text() == "precious"


def test_only_temporary_files_of_a_run_are_removed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.tmp").write_text("precious")
    (tmp_path / "run" / f"checkpoint_last.pth.{'0' * 32}.tmp").write_text("left by a killed run")
    assert train(tmp_path / "run") == 0
    assert [file.name for file in (tmp_path / "run").glob("*.tmp")] == ["notes.tmp"]


def test_a_restart_obeys_overwrite_where_an_older_launch_had_used_it(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "launch_id", lambda: "older")
    assert train(tmp_path / "run", "--overwrite") == 0
    forge(tmp_path / "run" / LAST, finished=False)
    monkeypatch.setattr(distributed, "launch_id", lambda: "newer")
    monkeypatch.setattr(distributed, "is_restart", lambda: True)
    assert train(tmp_path / "run", "--overwrite", "--lr", "0.01") == 0
    assert [start["epoch"] for start in read(tmp_path / "run", "config.json")["starts"]] == [0]


def test_a_restart_of_the_same_launch_continues_though_overwrite_was_given(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "launch_id", lambda: "the same")
    assert train(tmp_path / "run", "--overwrite") == 0
    (tmp_path / "run" / LAST).unlink()
    monkeypatch.setattr(distributed, "is_restart", lambda: True)
    assert train(tmp_path / "run", "--overwrite") == 0
    assert [start["epoch"] for start in read(tmp_path / "run", "config.json")["starts"]] == [0, 2]


def test_exports_are_never_read_back(finished, copied):
    for name in ("config.json", "metrics.jsonl", "results.json"):
        (copied / name).write_text("[not JSON")
    assert train(copied) == 0
    for name in ("config.json", "metrics.jsonl", "results.json"):
        ours, theirs = ((directory / name).read_text() for directory in (copied, finished))
        assert ours.replace(str(copied.parent), "") == theirs.replace(str(finished.parent), "") or name == "config.json"


def test_a_finished_run_is_known_by_its_checkpoint_and_touches_nothing(copied, capsys):
    before = files(copied)
    forge(copied / LAST)  # the same content
    assert train(copied) == 0 and "is finished" in capsys.readouterr().out
    assert {path: content for path, content in files(copied).items() if path.name != LAST}.items() <= before.items()


FORGED = {"args": {"width": "x", "help": True}, "starts": [{"epoch": 0}]}


@pytest.mark.parametrize("entry", FORGED)
def test_forged_content_with_right_checksums_is_one_line_that_names_the_file(entry, copied, tmp_path, capsys):
    forge(copied / LAST, **{entry: FORGED[entry]})
    before = files(copied)
    assert train(copied) == 1 and str(copied / LAST) in one_line(capsys)
    assert files(copied) == before
    assert val_only(copied, tmp_path / "out") == (entry == "args")
    assert capsys.readouterr().err.count("\n") == (entry == "args")


def test_momentum_is_required_of_every_trained_weight(copied, capsys):
    (copied / PREVIOUS).rename(copied / LAST)
    last = load_checkpoint(copied / LAST)
    del last["optimizer"]["state"][0]
    write_checkpoint(copied / LAST, last)
    assert train(copied) == 1 and "momentum is missing" in one_line(capsys)
    last["optimizer"]["state"][0] = {"momentum_buffer": torch.zeros(4, 3, 3, 3, dtype=torch.float64)}
    write_checkpoint(copied / LAST, last)
    assert train(copied) == 0  # PyTorch casts it to its weight's type
