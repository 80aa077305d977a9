"""What happens to long runs, done to a short one: kills, full disks, two at once, numbers that are not finite."""

import contextlib
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import content, files, one_line, run, small_set  # noqa: F401  (small_set works by being here)

import main
from models import MODELS
from utils.checkpoint import load_checkpoint
from utils.run_directory import LAST

ROOT = Path(main.__file__).parent
STEPS = 2  # in an epoch of `run`, of which there are three


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_set):  # noqa: F811
    directory = tmp_path_factory.mktemp("experiments") / "finished"
    assert run(directory) == 0
    return content(directory)


def before_step(monkeypatch, epoch: int, action) -> None:
    """Have `action(model)` happen in the middle of an epoch, the first time that it is trained."""
    step, calls = main.train_step, []

    def watched(model, *args):
        calls.append(None)
        if len(calls) == epoch * STEPS + 2:
            action(model)
        step(model, *args)

    monkeypatch.setattr(main, "train_step", watched)


class Killed(BaseException):
    """The end, as by kill -9: from now on no file changes any more."""


SHORT = ("--end_epoch", "2", "--val_split", "0.3")


@pytest.fixture(scope="module")
def short(tmp_path_factory, small_set):  # noqa: F811
    directory = tmp_path_factory.mktemp("experiments") / "short"
    assert run(directory, *SHORT) == 0
    return content(directory)


def die_at_rename(number: int, monkeypatch) -> list:
    """Files come and change by renames: the one of this number, from 0, and all later ones fail. Returns where
    their targets will be listed."""
    targets = []

    def replace(source, target, real=os.replace):
        targets.append(Path(target).name)
        if len(targets) > number:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return targets


def test_killed_at_any_rename_the_same_command_ends_in_the_same_bits(short, tmp_path, monkeypatch):
    moments, is_killed = 0, True
    while is_killed:
        directory = tmp_path / str(moments)
        with monkeypatch.context() as patch:
            targets = die_at_rename(moments, patch)
            try:
                assert run(directory, *SHORT) == 0
                is_killed = False
            except Killed:
                moments += 1
        records = directory / "metrics.jsonl"
        for line in records.read_text().splitlines(keepends=True) if records.exists() else ():
            assert json.loads(line) and line.endswith("\n")
        assert run(directory, *SHORT) == 0
        assert content(directory) == short, targets
    assert moments > 2 * 5  # five files an epoch


def test_killed_before_the_last_figures_the_same_command_draws_them(short, tmp_path, monkeypatch):
    def dying(*args):
        die_at_rename(0, monkeypatch)
        raise Killed

    monkeypatch.setattr(main.Logger, "finish", dying)
    with pytest.raises(Killed):
        run(tmp_path / "run", *SHORT)
    monkeypatch.undo()
    assert run(tmp_path / "run", *SHORT) == 0
    assert content(tmp_path / "run") == short


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("epoch", [0, 1])
def test_signals_say_what_is_kept_and_the_same_command_goes_on(number, epoch, finished, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    before_step(monkeypatch, epoch, lambda model: os.kill(os.getpid(), number))
    assert run(directory) == 128 + number
    lines = capsys.readouterr().err.splitlines()
    same = "the same command"
    kept = (
        f"1 epoch is kept in {directory / LAST}; {same} goes on from there" if epoch else f"no epoch was done; {same}"
    )
    assert lines == ["", f"interrupted: {kept}" + ("" if epoch else " starts anew")]
    assert json.loads((directory / "results.json").read_text())["status"] == "interrupted"
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == epoch
    assert run(directory) == 0
    assert content(directory) == finished


def test_a_closed_terminal_ends_nothing_under_nohup(finished, tmp_path, monkeypatch):
    before_step(monkeypatch, 1, lambda model: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path / "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert content(tmp_path / "run") == finished


def test_a_signal_before_the_first_step_knows_what_was_done_before(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    before_step(monkeypatch, 1, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    assert run(directory) == 143
    build = main.build_loaders
    monkeypatch.setattr(main, "build_loaders", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or build(*args))
    assert run(directory) == 143
    assert capsys.readouterr().err.count(f"1 epoch is kept in {directory / LAST}; the same command") == 2
    assert run(directory, "--overwrite") == 143
    assert "nothing was done; what the run directory holds is as it was" in capsys.readouterr().err
    assert load_checkpoint(directory / LAST)["epoch"] == 0


@contextlib.contextmanager
def files_up_to(num_bytes: int):
    """No file may grow beyond; Python ignores the signal, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_nothing_that_was_there(finished, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    with contextlib.ExitStack() as stack:

        def fill(model):
            stack.enter_context(files_up_to((directory / LAST).stat().st_size - 1))

        before_step(monkeypatch, 1, fill)
        assert run(directory) == 1
    error = one_line(capsys)
    assert f"{directory}/checkpoint_new.pth cannot be written (File too large)" in error
    assert load_checkpoint(directory / LAST)["epoch"] == 0
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((directory / "results.json").read_text())["status"] == "failed"
    assert run(directory) == 0
    assert content(directory) == finished


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("num_bytes", [0, 1000, 5000])
def test_a_disk_without_room_for_any_file_ends_the_run(num_bytes, finished, tmp_path, capsys):
    directory = tmp_path / "run"
    with files_up_to(num_bytes):
        assert run(directory) == 1
    assert str(directory) in one_line(capsys)
    assert run(directory) == 0
    assert content(directory) == finished


@contextlib.contextmanager
def without_rights(directory: Path):
    """`directory` is read-only, and this process nobody in particular, for whom alone that counts."""
    is_root = os.geteuid() == 0
    directory.chmod(0o555)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o755)


@pytest.mark.parametrize("place", [".", "run"])
def test_read_only_directories_are_refused_in_one_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with without_rights(tmp_path / place):
        assert run(Path("new" if place == "." else "run")) == 1
    assert "cannot be used as a run directory: Permission denied" in one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and len(files(tmp_path / "run")) == 1


@pytest.mark.parametrize("name", ["run", "run/.lock", "run/tensorboard", "run/config.json", "run/metrics.jsonl"])
def test_something_else_in_a_files_place_is_named(name, tmp_path, capsys):
    thing = tmp_path / name
    thing.parent.mkdir(exist_ok=True)
    if thing.suffix or name.endswith("lock"):
        thing.mkdir()
    else:
        thing.write_text("mine")
    assert run(tmp_path / "run") == 1
    assert str(tmp_path / "run") in one_line(capsys)
    assert thing.is_dir() or thing.read_text() == "mine"


def test_two_runs_on_one_directory(tmp_path, capsys):
    directory = tmp_path / "run"
    directory.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    words = [sys.executable, "-c", hold, str(directory / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert run(directory) == 1
        assert f"{directory} is in use by another run" in one_line(capsys)
        assert [p.name for p in directory.iterdir()] == [".lock"]
        other.kill()
    assert run(directory) == 0  # the lock file of a dead process is no lock


def spoil_weight(name: str, value: float):
    def action(model):
        with torch.no_grad():
            model.get_parameter(name).fill_(value)

    return action


# What happens in the second epoch, and what the line names.
NOT_FINITE = [
    (spoil_weight("conv1.weight", math.nan), "ce, byot_ce, byot_kl"),
    (spoil_weight("exits.0.fc.weight", math.inf), "byot_ce, byot_kl"),
]


@pytest.mark.parametrize(("action", "named"), NOT_FINITE)
def test_numbers_that_are_not_finite_stop_the_run(action, named, finished, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, 1, action)
        assert run(directory) == 1
    error = one_line(capsys)
    assert error.startswith(f"error: epoch 2: {named}")
    for words in ("not finite", "the checkpoint of epoch 1 is kept", "--lr"):
        assert words in error
    assert load_checkpoint(directory / LAST)["epoch"] == 0
    assert json.loads((directory / "results.json").read_text())["status"] == "failed"
    assert run(directory) == 0
    assert content(directory) == finished


def test_a_rate_that_diverges_is_named(tmp_path, capsys):
    assert run(tmp_path / "run", "--lr", "1000", "--end_epoch", "20") == 1
    error = one_line(capsys)
    assert "not finite" in error and "try a lower --lr" in error


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1e12 bytes."),
        MemoryError("Unable to allocate 12.0 GiB"),
    ],
)
def test_out_of_memory_names_the_batch_size_and_what_to_lower(error, tmp_path, monkeypatch, capsys):
    def fail(model):
        raise error

    before_step(monkeypatch, 0, fail)
    assert run(tmp_path / "run") == 1
    line = one_line(capsys)
    for words in ("out of memory", "--batch_size 16", "cpu", "lower --batch_size, --image_size"):
        assert words in line


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    def fail(model):
        raise RuntimeError("a mistake in the code")

    before_step(monkeypatch, 0, fail)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        run(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "failed"


def test_a_bare_surrounding(tmp_path):
    """No terminal, no HOME, a working directory that nobody can write, LANG=C, one processor, and a path
    with a space and letters beyond ASCII."""
    experiments = tmp_path / "zwei Wörter 実験"
    experiments.mkdir()
    words = "--data_type synthetic --width 8 --limit_train 8 --limit_val 8 --end_epoch 1 --device cpu --precision fp32"
    command = [sys.executable, str(ROOT / "main.py"), *words.split(), "--experiments_dir", str(experiments)]
    processor = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [*command, "--run_name", "läuft so"],
        cwd="/proc",
        env={"LANG": "C", "PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {processor}),
    )
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert json.loads((experiments / "läuft so" / "results.json").read_text())["status"] == "finished"


def test_torture():
    """A few rounds; `scripts/torture.sh 50` is the whole of it."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "torture.sh"), "2"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = done.stdout.splitlines()[-1]
    assert counts == "2 kills, 2 resumes, 0 lost, 0 different"


def number(low: float, high: float):
    return st.floats(low, high).map(str)


def whole(low: int, high: int):
    return st.integers(low, high).map(str)


FLAGS = {
    "alpha_T": number(0, 1),
    "alpha": number(0, 1),
    "temperature": number(-2, 3).map(lambda x: str(10 ** float(x))),
    "beta": number(-8, 3).map(lambda x: str(10 ** float(x))),
    "BYOT_from_k_block": whole(1, 3),
    "image_size": st.sampled_from(["16", "24", "40"]),
    "classes": whole(2, 11),
    "limit_train": whole(1, 40),
    "limit_val": whole(1, 25),
    "val_split": number(0.001, 0.9),
    "classifier_type": st.sampled_from(list(MODELS)),
    "num_resnet_blocks": whole(1, 4),
    "width": st.sampled_from(["1", "2", "4", "8", "16"]),
    "batch_size": whole(1, 40),
    "lr": number(-6, 3).map(lambda x: str(10 ** float(x))),
    "lr_decay_rate": number(1e-12, 1),
    "lr_decay_schedule": st.lists(whole(1, 3), max_size=2),
    "weight_decay": number(0, 1),
    "seed": whole(0, 2**32 - 1),
    "saveckp_freq": whole(0, 3),
    "precision": st.sampled_from(["auto", "fp32", "tf32", "bf16"]),
}
USUAL = "--data_type synthetic --width 8 --image_size 16 --batch_size 16 --end_epoch 2 --device cpu --precision fp32"
SWITCHES = ["PSKD", "BYOT", "DML", "DML_on_output", "DML_as_published", "save_predictions", "sync_bn", "overwrite"]


@st.composite
def command_lines(draw) -> list[str]:
    """Any methods; of the other flags any few, each with any value that it may have by itself."""
    words = [f"--{name}" for name in SWITCHES[:3] if draw(st.booleans())]
    words += [f"--{name}" for name in SWITCHES[3:] if draw(st.integers(0, 9)) == 9]
    for name, values in FLAGS.items():
        if draw(st.booleans()):
            value = draw(values)
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return words


RANGES = {"top1_error": 100, "top5_error": 100, "nll": math.inf, "ece": 100, "aurc": 1000, "eaurc": 1000}


def metrics_of(record: dict) -> list[dict]:
    return [m for m in (record["val"], record["ensemble"], *record["exits"]) if m is not None]


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(command_lines())
def test_any_flags_are_refused_by_name_or_end_in_finite_metrics(words):
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main.main([*USUAL.split(), *words, "--experiments_dir", place, "--run_name", "run"])
        except SystemExit as e:
            assert e.code == 2 and "error: argument --" in err.getvalue() and not os.listdir(place)
            return
        if status:
            assert status == 1 and err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1
            assert "--" in err.getvalue()  # a flag: the one that is wrong, or the one to change
            return
        records = [json.loads(line) for line in Path(place, "run", "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert all(math.isfinite(value) for value in record["train"].values())
        for metrics in metrics_of(record):
            assert metrics.keys() == RANGES.keys()
            for name, value in metrics.items():
                assert math.isfinite(value) and -1e-9 <= value <= RANGES[name], (name, value)
