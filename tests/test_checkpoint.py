"""Checkpoints that are whole, and every kind that is not: what is said, what is gone on from, what stays as it was."""

import errno
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import Split
from utils.errors import UserError

import data
import main
from utils import checkpoint as module
from utils.checkpoint import load_checkpoint, serialise, write_atomic
from utils.run_directory import BEST, DAMAGED, LAST, NEW, PREVIOUS, RunDirectory

sys.path.insert(0, str(Path(main.__file__).parent / "scripts"))
from torture import content

RUN = (
    "--PSKD --BYOT --data_type synthetic --image_size 16 --width 8 --num_resnet_blocks 2 --batch_size 16 --lr 0.05"
    " --end_epoch 3 --device cpu --precision fp32"
)


@pytest.fixture(scope="module", autouse=True)
def small_set():
    """Stands in for the synthetic images: 32 + 20 of 10 classes."""
    random_ = np.random.RandomState(0)
    train, test = (
        Split(random_.randint(0, 256, (num, 16, 16, 3)).astype(np.uint8), np.arange(num) % 10) for num in (32, 20)
    )
    row = data.DATASETS["synthetic"]
    names = [f"class {label}" for label in range(10)]
    data.DATASETS["synthetic"] = row._replace(num_classes=10, read=lambda root, workers: (train, test, names))
    yield
    data.DATASETS["synthetic"] = row


def run(directory: Path, *words: str) -> int:
    """The command, with `directory` as its run directory."""
    where = ["--experiments_dir", str(directory.parent), "--run_name", directory.name]
    return main.main([*RUN.split(), *words, *where])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_set):
    directory = tmp_path_factory.mktemp("experiments") / "finished"
    assert run(directory) == 0
    return directory


@pytest.fixture
def directory(finished, tmp_path):
    """A copy of the finished run, as if its last epoch's records had not been written."""
    shutil.copytree(finished, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").write_text(json.dumps({**results, "status": "running"}))
    return tmp_path / "run"


def files(directory: Path) -> dict:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file() and p.name != ".lock"}


def one_line(capsys) -> str:
    """What was printed as an error, without the final newline."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    return error.strip()


class RunsCode:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def changed(content_: bytes, **entries) -> bytes:
    return saved({**torch.load(io.BytesIO(content_), weights_only=True), **entries})


def flipped(content_: bytes) -> bytes:
    """One bit of one weight."""
    at = len(content_) // 2
    return content_[:at] + bytes([content_[at] ^ 16]) + content_[at + 1 :]


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"a text")
    return buffer.getvalue()


# Name, the bad file's bytes made of the whole one's and of a path that a pickle may try to create, and words.
BAD = [
    ("empty", lambda whole, mark: b"", "is empty"),
    ("truncated", lambda whole, mark: whole[: len(whole) // 2], "is truncated or no checkpoint"),
    ("without its last byte", lambda whole, mark: whole[:-1], "is truncated or no checkpoint"),
    ("only zeros", lambda whole, mark: bytes(len(whole)), "is truncated or no checkpoint"),
    ("flipped bit", lambda whole, mark: flipped(whole), "is damaged: the checksum"),
    ("text", lambda whole, mark: b"<html>404 not found</html>\n", "is truncated or no checkpoint"),
    ("pickle with code", lambda whole, mark: pickle.dumps(RunsCode(mark)), "is truncated or no checkpoint"),
    (
        "archive with code",
        lambda whole, mark: saved({"model": RunsCode(mark)}),
        "it holds more than tensors and numbers",
    ),
    ("other zip", lambda whole, mark: zipped("readme.txt"), "is no checkpoint of this program"),
    ("zip with a pickle", lambda whole, mark: zipped("archive/data.pkl"), "is no checkpoint of this program"),
    ("tensor", lambda whole, mark: saved(torch.zeros(3)), "it holds a Tensor"),
    ("weights alone", lambda whole, mark: saved({"conv1.weight": torch.zeros(3)}), "it lacks model, optimizer"),
    ("no optimizer", lambda whole, mark: changed(whole, optimizer=None), "it lacks optimizer"),
    ("model of lists", lambda whole, mark: changed(whole, model=[1, 2]), "it lacks model"),
    ("epoch as text", lambda whole, mark: changed(whole, epoch="2"), "it lacks epoch"),
    ("no epoch", lambda whole, mark: changed(whole, epoch=-1, history=[]), "its history is not one of its epochs"),
    ("epochs of nothing", lambda whole, mark: changed(whole, epoch=1, history=[{}, 3]), "its history is not one of"),
    ("history too short", lambda whole, mark: changed(whole, history=[]), "its history is not one of its epochs"),
]
bad = pytest.mark.parametrize(("make", "words"), [pytest.param(*row, id=name) for name, *row in BAD])


@bad
def test_a_bad_file_is_refused_in_one_line_that_names_it(make, words, finished, tmp_path):
    file, mark = tmp_path / "some.pth", tmp_path / "mark"
    file.write_bytes(make((finished / LAST).read_bytes(), mark))
    with pytest.raises(UserError) as error:
        load_checkpoint(file)
    assert str(file) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
    assert not mark.exists()


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(directory, monkeypatch, capsys):
    def forbidden(file, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    before = files(directory)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", forbidden)
        patch.setattr(os, "access", lambda file, mode: False)
        assert run(directory) == 1
    assert f"{directory / LAST} cannot be read: Permission denied" in one_line(capsys)
    assert files(directory) == before


@bad
def test_a_bad_last_one_falls_back_to_the_previous(make, words, directory, tmp_path):
    (directory / LAST).write_bytes(make((directory / LAST).read_bytes(), tmp_path / "mark"))
    run_directory, said = RunDirectory(directory), []
    flags = vars(main.parse_args([*RUN.split(), "--run_name", "run"]))
    assert run_directory.starting_point(flags, said.append)["epoch"] == 1
    run_directory.close()
    assert str(directory / LAST) in said[0] and words in said[0] and f"going on from {PREVIOUS}" in said[0]
    assert not (tmp_path / "mark").exists()


def test_a_directory_in_the_place_of_a_file_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"some\.pth cannot be read: Is a directory"):
        (tmp_path / "some.pth").mkdir()
        load_checkpoint(tmp_path / "some.pth")
    with pytest.raises(UserError, match=r"none\.pth cannot be read: No such file"):
        load_checkpoint(tmp_path / "none.pth")


def test_no_changed_bit_goes_unnoticed(finished, tmp_path):
    """Wherever in the file: it is refused, or (in a zip's padding, dates, ...) changes nothing of what is read."""
    small = torch.load(finished / LAST, weights_only=True)
    small |= {"model": {"w": torch.arange(64.0)}, "optimizer": {}, "objective": {}}
    whole = bytes(serialise(small))
    file = tmp_path / "small.pth"
    choose, refused = random.Random(0), 0
    for _ in range(300):
        at, bit = choose.randrange(len(whole)), 1 << choose.randrange(8)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            found = load_checkpoint(file)
        except UserError:
            refused += 1
            continue
        assert torch.equal(found.pop("model")["w"], small["model"]["w"])
        assert all(found[name] == small[name] for name in found)
    assert refused > 100


def spoil(directory: Path, state: str) -> None:
    """Bring a run directory of three epochs into a state that a crash or a bad disk may leave."""
    last, previous = directory / LAST, directory / PREVIOUS
    if state == "last missing":
        last.unlink()
    elif state == "last damaged":
        last.write_bytes(flipped(last.read_bytes()))
    elif state == "last is a directory":
        last.unlink()
        last.mkdir()
    elif state == "new left over":
        (directory / NEW).write_bytes(last.read_bytes()[:1000])
        (directory / f"{BEST}.tmp").write_bytes(b"half")
        (directory / "metrics.jsonl.tmp").write_bytes(b'{"epo')
    elif state == "previous damaged":
        previous.write_bytes(flipped(previous.read_bytes()))
    elif state == "records torn":
        for name in ("metrics.jsonl", "results.json", "config.json"):
            (directory / name).write_bytes((directory / name).read_bytes()[:-20])
    elif state == "records missing":
        for name in ("metrics.jsonl", "results.json", "config.json"):
            (directory / name).unlink()
        shutil.rmtree(directory / "tensorboard")


STATES = ["last missing", "last damaged", "last is a directory", "new left over", "previous damaged", "records torn"]


@pytest.mark.parametrize("state", [*STATES, "records missing"])
def test_from_every_state_the_same_command_ends_in_the_same_bits(state, directory, finished, capsys):
    spoil(directory, state)
    assert run(directory) == 0
    said = capsys.readouterr().out
    assert (f"going on from {PREVIOUS}" in said) == state.startswith("last ")
    found, wanted = content_without_damaged(directory), content_without_damaged(finished)
    if state == "previous damaged":  # nothing was left to save
        found, wanted = ({k: v for k, v in side.items() if PREVIOUS not in k} for side in (found, wanted))
    assert found == wanted
    assert (directory / DAMAGED).exists() == (state in ("last damaged", "last is a directory"))


def content_without_damaged(directory: Path) -> dict:
    """As the torture's, but for the file that was put aside."""
    aside = directory / DAMAGED
    moved = aside.exists() and aside.rename(directory.parent / "aside")
    found = content(directory)
    if moved:
        moved.rename(aside)
    return found


def test_after_a_fall_back_a_crash_leaves_a_whole_one_at_every_moment(directory, monkeypatch):
    """The damaged last one must not become the previous one while the new one is not yet in place."""
    spoil(directory, "last damaged")
    replace = os.replace

    def checked(source, target):
        replace(source, target)
        names = [name for name in (LAST, PREVIOUS) if (directory / name).exists()]
        assert any(not isinstance(attempt(directory / name), UserError) for name in names)

    monkeypatch.setattr(os, "replace", checked)
    assert run(directory) == 0


def attempt(file: Path):
    try:
        return load_checkpoint(file)
    except UserError as e:
        return e


@pytest.mark.parametrize("state", ["both damaged", "last damaged, no previous"])
def test_where_none_is_whole_nothing_is_touched(state, directory, capsys):
    spoil(directory, "last damaged")
    if state == "both damaged":
        spoil(directory, "previous damaged")
    else:
        (directory / PREVIOUS).unlink()
    before = files(directory)
    assert run(directory) == 1
    error = one_line(capsys)
    for words in (str(directory / LAST), "checksum", "--overwrite"):
        assert words in error
    assert (str(directory / PREVIOUS) in error) == (state == "both damaged")
    assert files(directory) == before
    assert run(directory, "--overwrite") == 0  # as the line says


# The command given on a directory that holds another experiment, and what the refusal names.
OTHERS = [
    ("--classifier_type resnet34", "--classifier_type resnet18 -> resnet34"),
    ("--classifier_type resnet50", "--classifier_type resnet18 -> resnet50"),
    ("--width 16", "--width 8 -> 16"),
    ("--num_resnet_blocks 3", "--num_resnet_blocks 2 -> 3"),
    ("--classes 5", "--classes None -> 5"),
    ("--data_type cifar100", "--data_type synthetic -> cifar100"),
    ("--limit_train 20", "--limit_train None -> 20"),
    ("--val_split 0.5", "--val_split None -> 0.5"),
    ("--DML", "--DML False -> True"),
    ("--alpha_T 0.5", "--alpha_T 0.8 -> 0.5"),
    ("--lr 0.1 --seed 5", "--lr 0.05 -> 0.1, --seed 4 -> 5"),
    ("--precision bf16", "--precision fp32 -> bf16"),
    ("--end_epoch 4", "--end_epoch 3 -> 4, on which PS-KD's alpha_t depends: give --allow_end_epoch_change"),
    ("--end_epoch 2", "--end_epoch 3 -> 2, on which PS-KD's alpha_t depends"),
    ("--end_epoch 2 --allow_end_epoch_change", "has 3 epochs already, more than --end_epoch 2"),
]


@pytest.mark.parametrize(("words", "named"), OTHERS)
@pytest.mark.parametrize("place", ["same directory", "resumed elsewhere"])
def test_another_experiment_is_refused_by_name(words, named, place, finished, tmp_path, capsys):
    before = files(finished)
    if place == "same directory":
        assert run(finished, *words.split()) == 1
    else:
        assert run(tmp_path / "new", *words.split(), "--resume", str(finished)) == 1
        assert not (tmp_path / "new").exists()
    error = one_line(capsys)
    assert str(finished / LAST) in error and named in error.replace("another --end_epoch", "--end_epoch")
    assert files(finished) == before


def test_a_longer_schedule_on_request(directory):
    assert run(directory, "--end_epoch", "4", "--allow_end_epoch_change") == 0
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 4


# Entries that do not fit the flags they came with, and which one is named.
FORGED = [
    ("model", lambda c: {**c["model"], "fc.weight": torch.zeros(5, 16)}),
    ("model", lambda c: {k: v for k, v in c["model"].items() if k != "fc.bias"}),
    ("objective", lambda c: {"targets.memory": torch.zeros(7, 10), "targets.weight": torch.zeros(())}),
    ("objective", lambda c: {}),
    ("optimizer", lambda c: {}),
    ("optimizer", lambda c: {"state": {}, "param_groups": []}),
    ("optimizer", lambda c: {"state": 3, "param_groups": c["optimizer"]["param_groups"]}),
    ("optimizer", lambda c: {"state": {}, "param_groups": "broken"}),
]


@pytest.mark.parametrize(("name", "make"), FORGED)
def test_an_entry_that_does_not_fit_is_named(name, make, directory, capsys):
    whole = (directory / LAST).read_bytes()
    (directory / LAST).write_bytes(changed(whole, **{name: make(torch.load(directory / LAST, weights_only=True))}))
    before = files(directory)
    assert run(directory) == 1
    error = one_line(capsys)
    assert re.search(rf"{re.escape(str(directory / LAST))} does not fit: its {name} is of another run", error)
    after = files(directory)
    assert {**after, "results.json": b""} == {**before, "results.json": b""}


def test_val_only_names_a_damaged_file(directory, tmp_path, capsys):
    evaluate = ["--val_only", "--resume", str(directory), "--experiments_dir", str(tmp_path), "--run_name", "again"]
    spoil(directory, "last damaged")
    assert main.main([*RUN.split(), *evaluate]) == 0
    assert f"going on from {PREVIOUS}" in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "val.json").read_text())["epoch"] == 1
    spoil(directory, "previous damaged")
    assert main.main([*RUN.split(), *evaluate]) == 1
    assert str(directory / PREVIOUS) in one_line(capsys)


def test_gone_on_with_elsewhere_the_best_epoch_so_far_comes_along(directory, finished, tmp_path, monkeypatch):
    """Also where no later epoch is better."""
    start = torch.load(directory / PREVIOUS, weights_only=True)
    start["history"][0]["val"]["top1_error"] = -1.0
    first = {**start, "epoch": 0, "history": start["history"][:1]}
    (directory / PREVIOUS).write_bytes(saved(start))
    (directory / BEST).write_bytes(saved(first))
    assert run(tmp_path / "new", "--resume", str(directory / PREVIOUS)) == 0
    assert load_checkpoint(tmp_path / "new" / BEST)["epoch"] == 0
    assert load_checkpoint(tmp_path / "new" / LAST)["epoch"] == 2
    assert json.loads((tmp_path / "new" / "results.json").read_text())["best"]["epoch"] == 0


def test_gone_on_with_elsewhere_a_finished_run_is_whole_there(finished, tmp_path):
    assert run(tmp_path / "new", "--resume", str(finished)) == 0
    assert files(tmp_path / "new").keys() >= {LAST, BEST, "metrics.jsonl", "results.json", "config.json"}
    assert load_checkpoint(tmp_path / "new" / LAST)["epoch"] == 2


def test_a_best_epoch_that_is_gone_costs_only_its_own_numbers(tmp_path):
    words = ("--val_split", "0.3", "--saveckp_freq", "1")
    assert run(tmp_path / "run", *words) == 0
    middle = torch.load(tmp_path / "run" / "checkpoint_epoch1.pth", weights_only=True)
    middle["history"][0]["val"]["top1_error"] = -1.0
    (tmp_path / "alone.pth").write_bytes(saved(middle))
    assert run(tmp_path / "new", *words, "--resume", str(tmp_path / "alone.pth")) == 0
    assert json.loads((tmp_path / "new" / "results.json").read_text())["test"].keys() == {"last"}


def test_a_foreign_run_in_the_directory_is_not_gone_on_with(finished, directory, tmp_path, capsys):
    history = load_checkpoint(directory / LAST)["history"]
    history[0]["lr"] = 7.0
    (directory / LAST).write_bytes(changed((directory / LAST).read_bytes(), history=history))
    before = files(directory)
    assert run(directory, "--resume", str(finished)) == 1
    assert f"{directory} holds another run than {finished / LAST}" in one_line(capsys)
    assert files(directory) == before


@pytest.mark.parametrize("name", [BEST, "checkpoint_epoch0.pth"])
def test_going_back_within_a_directory_is_refused(name, directory, capsys):
    shutil.copyfile(directory / LAST, directory / "checkpoint_epoch0.pth")
    before = files(directory)
    assert run(directory, "--resume", str(directory / name)) == 1
    assert f"{directory / name} lies in the run's own directory" in one_line(capsys)
    assert files(directory) == before


def test_an_empty_directory_has_nothing_to_go_on_from(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "new"):
        assert run(directory, "--resume", str(tmp_path / "empty")) == 1
        assert f"{tmp_path / 'empty'} holds no {LAST}" in one_line(capsys)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content(step, tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomic(file, b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if step == "write":
        monkeypatch.setattr(module, "open", full, raising=False)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\).*whole"):
        write_atomic(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_file_system_without_links_or_locks_keeps_the_same(finished, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    assert run(tmp_path / "run") == 0
    assert content(tmp_path / "run") == content(finished)


def test_content_is_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def traced(*args, real, name):
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, functools.partial(traced, real=real, name=name))
    write_atomic(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the directory
