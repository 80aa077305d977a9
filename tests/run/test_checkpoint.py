"""Checkpoints that are intact, and every kind that is not: one line, the previous one, nothing else touched."""

import io
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_identical, files, forge, read_checkpoint, read_records, train

from utils.checkpoint import LAST, PREVIOUS, find_checkpoint


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loaded(content: bytes) -> dict:
    return torch.load(io.BytesIO(content), weights_only=True)


def changed(content: bytes, **entries) -> bytes:
    return saved({**loaded(content), **entries})


def flip_a_bit(content: bytes) -> bytes:
    """In a statistic of BatchNorm: elsewhere it might be padding."""
    statistic = loaded(content)["model"]["bn1.running_var"].numpy().tobytes()
    altered = bytearray(content)
    altered[content.index(statistic)] ^= 16
    return bytes(altered)


BAD = {  # made of an intact file's bytes, and words of the message
    "empty": (lambda intact: b"", "truncated"),
    "truncated": (lambda intact: intact[: len(intact) // 2], "truncated"),
    "flipped bit": (flip_a_bit, "checksum"),
    "text": (lambda intact: b"<html>404 not found</html>\n", "of another format"),
    "pickle with code": (lambda intact: pickle.dumps(RunsCode()), "of another format"),
    "archive with code": (lambda intact: saved({"model": RunsCode()}), "Weights only load failed"),
    "tensor": (lambda intact: saved(torch.zeros(3)), "it holds a Tensor"),
    "epoch as text": (lambda intact: changed(intact, epoch="0"), "its history"),
    "large epoch": (lambda intact: changed(intact, epoch=10**12), "its history"),
    "unknown entry": (lambda intact: changed(intact, foreign=1), "foreign"),
    "arguments with tensors": (lambda intact: changed(intact, args={"lr": torch.zeros(2)}), "Tensor is not JSON"),
}


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
def test_previous_checkpoint_is_taken_in_place_of_a_bad_one_whose_code_does_not_run(make, words, copied, monkeypatch):
    monkeypatch.chdir(copied)
    intact = (copied / LAST).read_bytes()
    (copied / LAST).write_bytes(make(intact))
    checkpoint, note = find_checkpoint(copied)
    assert checkpoint.file == copied / PREVIOUS
    assert checkpoint.epoch == 1
    assert note.startswith(f"{copied / LAST} is not a valid checkpoint")
    assert words in note
    assert "\n" not in note
    assert note.endswith(f"using {copied / PREVIOUS}")
    assert not Path("made by a checkpoint").exists()


def leave_nothing(path: Path) -> None:
    pass


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def other_settings(path: Path) -> None:
    """An intact file, but with settings of the optimiser that the flags do not have."""
    optimizer = read_checkpoint(path.parent, PREVIOUS)["optimizer"]
    optimizer["param_groups"][0] |= {"lr": 9.0, "momentum": 0.0, "weight_decay": 0.5, "nesterov": False}
    forge(path.with_name(PREVIOUS), path, optimizer=optimizer)


def test_a_resume_with_other_threads_says_so(copied, capsys, monkeypatch):
    (copied / LAST).unlink()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert train(copied) == 0
    assert re.search(r"note: they ran on .+: rounding differs", capsys.readouterr().out)


@pytest.mark.parametrize("make", [leave_nothing, os.mkfifo, link_to_device, other_settings])
def test_whatever_became_of_the_last_one_the_same_command_ends_in_the_same_weights(make, copied, finished, capsys):
    (copied / LAST).unlink()
    make(copied / LAST)
    assert train(copied) == 0
    assert f"continuing from {copied}" in capsys.readouterr().out
    ours = read_checkpoint(copied)
    assert_identical(ours["model"], read_checkpoint(finished)["model"])
    assert ours["history"] == read_records(copied)


def test_without_an_intact_one_nothing_is_touched(copied, refused):
    for name in (LAST, PREVIOUS):
        (copied / name).write_bytes(b"PK")
    before = files(copied)
    error = refused(train, copied)
    assert f"{PREVIOUS} is not a valid checkpoint (truncated or of another format): start over" in error
    assert files(copied) == before


def test_folder_in_place_of_a_checkpoint_is_named(copied, refused):
    (copied / LAST).unlink()
    (copied / LAST).mkdir()
    assert f"{copied / LAST}: Is a directory" in refused(train, copied, "--overwrite")


NOT_FINITE_WEIGHT = torch.full((10, 32), math.nan)
NOT_FINITE_MOMENTUM = torch.full((4, 3, 3, 3), math.inf)
FORGED = [  # states, and entries of them (or none at all) that do not fit the flags that they came with
    ("model", {"fc.weight": torch.zeros(5, 32)}),
    ("model", {"fc.weight": NOT_FINITE_WEIGHT}),
    ("objective", {"soften.memory": torch.zeros(7, 10)}),
    ("optimizer", {"state": {}}),
    ("optimizer", {}),
    ("optimizer", {"state": {0: {"momentum_buffer": torch.zeros(1)}}}),
    ("optimizer", {"state": {0: {"momentum_buffer": NOT_FINITE_MOMENTUM}}}),
]


@pytest.mark.parametrize(("name", "entries"), FORGED)
def test_state_that_does_not_fit_the_flags_is_named(name, entries, copied, refused):
    state = read_checkpoint(copied, PREVIOUS)[name] | entries if entries else {}
    forge(copied / PREVIOUS, copied / LAST, **{name: state})
    before = files(copied)
    error = refused(train, copied)
    assert f"{copied / LAST}: its {name} state does not match these flags" in error
    assert files(copied) == before
