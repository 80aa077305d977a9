"""Checkpoints that are intact, and every kind that is not: one line, the previous one, nothing else touched."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import files, one_line, read_records, run

from utils.checkpoint import LAST, PREVIOUS, find_checkpoint, load_checkpoint
from utils.errors import UserError

FLAGS = ("--PSKD", "--BYOT", "--num_resnet_blocks", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("experiments") / "finished"
    assert run(directory, *FLAGS) == 0
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The run as it was after its first epoch."""
    directory = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.copyfile(directory / PREVIOUS, directory / LAST)
    return directory


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def changed(content: bytes, **entries) -> bytes:
    return saved({**torch.load(io.BytesIO(content), weights_only=True), **entries})


def without(content: bytes, entry: str) -> bytes:
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    del checkpoint[entry]
    return saved(checkpoint)


BAD = {  # made of an intact file's bytes, and words of the message
    "empty": (lambda intact: b"", "truncated"),
    "truncated": (lambda intact: intact[: len(intact) // 2], "truncated"),
    "zeros": (lambda intact: bytes(len(intact)), "of another format"),
    "flipped bit": (lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 16]) + b[len(b) // 2 + 1 :], "checksum"),
    "text": (lambda intact: b"<html>404 not found</html>\n", "of another format"),
    "pickle with code": (lambda intact: pickle.dumps(RunsCode()), "of another format"),
    "archive with code": (lambda intact: saved({"model": RunsCode()}), "Weights only load failed"),
    "tensor": (lambda intact: saved(torch.zeros(3)), "it holds a Tensor"),
    "epoch as text": (lambda intact: changed(intact, epoch="0"), "epoch is missing or of another type"),
    "large epoch": (lambda intact: changed(intact, epoch=10**12), "its history"),
    "arguments with tensors": (lambda intact: changed(intact, args={"lr": torch.zeros(2)}), "Tensor is not JSON"),
    "an older version's": (lambda intact: without(intact, "data"), "an older version wrote it"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line_and_the_previous_one_taken(name, copied, monkeypatch):
    monkeypatch.chdir(copied)
    make, words = BAD[name]
    (copied / LAST).write_bytes(make((copied / LAST).read_bytes()))
    with pytest.raises(UserError) as error:
        load_checkpoint(copied / LAST)
    assert str(copied / LAST) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
    checkpoint, path, note = find_checkpoint(copied)
    assert path == copied / PREVIOUS and checkpoint["epoch"] == 0
    assert note == f"{error.value}: using {copied / PREVIOUS}" and not Path("made by a checkpoint").exists()


def other_settings(path: Path) -> None:
    """An intact file, but with settings of the optimiser that the flags do not have."""
    checkpoint = load_checkpoint(path.with_name(PREVIOUS))
    checkpoint["optimizer"]["param_groups"][0] |= {"lr": 9.0, "momentum": 0.0, "weight_decay": 0.5, "nesterov": False}
    torch.save(checkpoint, path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: None, other_settings])
def test_whatever_became_of_the_last_one_the_same_command_ends_in_the_same_weights(make, copied, finished, capsys):
    (copied / LAST).unlink()
    make(copied / LAST)
    assert run(copied, *FLAGS) == 0
    assert f"continuing from {copied}" in capsys.readouterr().out
    ours, theirs = (load_checkpoint(directory / LAST) for directory in (copied, finished))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert ours["history"] == read_records(copied)


def test_without_an_intact_one_nothing_is_touched(copied, capsys):
    for name in (LAST, PREVIOUS):
        (copied / name).write_bytes(b"PK")
    before = files(copied)
    assert run(copied, *FLAGS) == 1
    assert (
        f"{PREVIOUS} is not a valid checkpoint (truncated or of another format): start over" in one_line(capsys)
        and files(copied) == before
    )
    (copied / LAST).unlink()
    (copied / LAST).mkdir()
    assert run(copied, *FLAGS, "--overwrite") == 1 and f"{copied / LAST}: Is a directory" in one_line(capsys)


FORGED = [  # entries that do not fit the flags that they came with
    ("model", lambda c: {**c["model"], "fc.weight": torch.zeros(5, 16)}),
    ("model", lambda c: {**c["model"], "fc.weight": c["model"]["fc.weight"] * float("nan")}),
    ("objective", lambda c: {**c["objective"], "targets.memory": torch.zeros(7, 10)}),
    ("optimizer", lambda c: {}),
    ("optimizer", lambda c: {**c["optimizer"], "state": {}}),
    ("optimizer", lambda c: {**c["optimizer"], "state": {0: {"momentum_buffer": torch.zeros(1)}}}),
    (
        "optimizer",
        lambda c: {**c["optimizer"], "state": {0: {"momentum_buffer": torch.full((4, 3, 3, 3), float("inf"))}}},
    ),
]


@pytest.mark.parametrize(("name", "make"), FORGED)
def test_an_entry_that_does_not_fit_the_flags_is_named(name, make, copied, capsys):
    content = (copied / LAST).read_bytes()
    (copied / LAST).write_bytes(changed(content, **{name: make(torch.load(io.BytesIO(content), weights_only=True))}))
    before = files(copied)
    assert run(copied, *FLAGS) == 1
    assert f"{copied / LAST}: its {name} state does not match these flags" in one_line(capsys)
    assert files(copied) == before
