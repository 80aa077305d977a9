"""Checkpoints that are intact, and every kind that is not: one line, the previous one, nothing else touched."""

import io
import math
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from test_main import files, one_line, read, read_records, run

from utils import checkpoint as module
from utils.checkpoint import LAST, PREVIOUS, find_checkpoint, load_checkpoint, write_atomic
from utils.runtime import UserError

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


def flipped(content: bytes) -> bytes:
    """One bit of one weight."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"a text")
    return buffer.getvalue()


BAD = {  # from an intact file's bytes, and words of the message
    "empty": (lambda intact: b"", "is empty"),
    "truncated": (lambda intact: intact[: len(intact) // 2], "is truncated"),
    "without its last byte": (lambda intact: intact[:-1], "is truncated"),
    "zeros": (lambda intact: bytes(len(intact)), "is truncated or not a checkpoint"),
    "flipped bit": (lambda intact: flipped(intact), "is damaged: the checksum"),
    "text": (lambda intact: b"<html>404 not found</html>\n", "not a checkpoint"),
    "pickle with code": (lambda intact: pickle.dumps(RunsCode()), "not a checkpoint"),
    "archive with code": (lambda intact: saved({"model": RunsCode()}), "is not a checkpoint of this program"),
    "zip with a pickle": (lambda intact: zipped("archive/data.pkl"), "is not a checkpoint of this program"),
    "tensor": (lambda intact: saved(torch.zeros(3)), "it holds a Tensor"),
    "weights only": (lambda intact: saved({"conv1.weight": torch.zeros(3)}), "model, optimizer"),
    "epoch as text": (lambda intact: changed(intact, epoch="0"), "epoch missing or of another type"),
    "large epoch": (lambda intact: changed(intact, epoch=10**12), "its history"),
    "records of nothing": (
        lambda intact: changed(intact, history=[{"epoch": 0, "val": {"top1_error": 1}}]),
        "its history",
    ),
    "record that is no dict": (lambda intact: changed(intact, history=[3]), "its history"),
    "arguments with tensors": (lambda intact: changed(intact, args={"lr": torch.zeros(2)}), "its history"),
    "arguments with numbers as keys": (lambda intact: changed(intact, args={1: 2}), "its args"),
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
    assert note == f"{error.value}: continuing from {PREVIOUS}" and not Path("made by a checkpoint").exists()


@pytest.mark.parametrize("kind", ["pipe", "endless", "directory", "missing", "flipped"])
def test_whatever_is_in_its_place_the_same_command_ends_in_the_same_weights(kind, copied, finished, capsys):
    last, intact = copied / LAST, (copied / LAST).read_bytes()
    last.unlink()
    make = {"pipe": os.mkfifo, "endless": lambda path: path.symlink_to("/dev/zero"), "directory": Path.mkdir}
    make |= {"missing": str, "flipped": lambda path: path.write_bytes(flipped(intact))}
    make[kind](last)
    assert run(copied, *FLAGS) == 0
    assert f"continuing from {PREVIOUS}" in capsys.readouterr().out
    assert load_checkpoint(last)["history"] == read_records(copied)
    ours, theirs = (load_checkpoint(directory / LAST)["model"] for directory in (copied, finished))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_without_an_intact_one_nothing_is_touched(copied, monkeypatch, capsys):
    (copied / LAST).write_bytes(b"PK")
    with monkeypatch.context() as patch:  # one that may not be read is not taken for damaged
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(UserError, match=f"{LAST} is truncated"):
            find_checkpoint(copied)
    (copied / PREVIOUS).write_bytes(b"")
    before = files(copied)
    assert run(copied, *FLAGS) == 1
    error = one_line(capsys)
    assert all(words in error for words in (str(copied / LAST), f"{PREVIOUS} is empty", "--overwrite"))
    assert files(copied) == before
    assert run(copied, *FLAGS, "--overwrite") == 0


def test_no_changed_bit_goes_unnoticed(copied, tmp_path):
    """Anywhere in the file: it is refused, or (in a zip's padding, dates, ...) changes nothing of what is read."""
    small = {**load_checkpoint(copied / LAST), "model": {"w": torch.arange(64.0)}, "optimizer": {}, "objective": {}}
    intact, file, refused = saved(small), tmp_path / "small.pth", 0
    choose = random.Random(0)
    for _ in range(200):
        at = choose.randrange(len(intact))
        file.write_bytes(intact[:at] + bytes([intact[at] ^ 1 << choose.randrange(8)]) + intact[at + 1 :])
        try:
            found = load_checkpoint(file)
        except UserError:
            refused += 1
            continue
        assert torch.equal(found.pop("model")["w"], small["model"]["w"])
        assert all(found[name] == small[name] for name in found)
    assert refused > 60


def momentum(checkpoint: dict, change) -> dict:
    state = {i: {"momentum_buffer": change(s["momentum_buffer"])} for i, s in checkpoint["optimizer"]["state"].items()}
    return {**checkpoint["optimizer"], "state": state}


FORGED = {  # entries that do not fit the flags that they came with
    "model": [
        lambda c: {**c["model"], "fc.weight": torch.zeros(5, 16)},
        lambda c: {**c["model"], "fc.weight": c["model"]["fc.weight"] * math.nan},
        lambda c: {key: value for key, value in c["model"].items() if key != "fc.bias"},
    ],
    "objective": [lambda c: {}, lambda c: {**c["objective"], "targets.memory": torch.zeros(7, 10)}],
    "optimizer": [
        lambda c: {},
        lambda c: {**c["optimizer"], "state": {}},
        lambda c: momentum(c, lambda tensor: tensor[None]),
        lambda c: momentum(c, lambda tensor: tensor * math.inf),
        lambda c: momentum(c, lambda tensor: None),
    ],
}


@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makes in FORGED.items() for make in makes])
def test_an_entry_that_does_not_fit_the_flags_is_named(name, make, copied, capsys):
    intact = (copied / LAST).read_bytes()
    (copied / LAST).write_bytes(changed(intact, **{name: make(torch.load(io.BytesIO(intact), weights_only=True))}))
    before = files(copied)
    assert run(copied, *FLAGS) == 1
    assert f"{copied / LAST} does not fit: its {name} is of another run" in one_line(capsys)
    results = copied / "results.json"
    assert {**files(copied), results: b""} == {**before, results: b""} and read(copied)["status"] == "failed"


def test_the_flags_decide_the_optimisers_settings_not_the_file(copied, finished):
    checkpoint = load_checkpoint(copied / LAST)
    checkpoint["optimizer"]["param_groups"][0] |= {"lr": 9.0, "momentum": 0.0, "weight_decay": 0.5, "nesterov": False}
    torch.save(checkpoint, copied / LAST)
    assert run(copied, *FLAGS) == 0
    ours, theirs = (load_checkpoint(directory / LAST) for directory in (copied, finished))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content(step, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(*((module, step) if step == "open" else (os, step)), fail, raising=False)
    with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\)"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
