"""Other people's machines: file systems, streams, encodings, signals, and repositories around this one."""

import errno
import importlib.util
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT
from helpers import run

import main
from utils import machine, parser
from utils.errors import Interrupted, UserError, print_error, signals_raise, tell
from utils.files import write_atomic, write_output


def fail_to_sync_directories(monkeypatch, number: int) -> None:
    sync = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_directories_that_cannot_be_synced_are_written_all_the_same(number, tmp_path, monkeypatch):
    fail_to_sync_directories(monkeypatch, number)
    open_files = os.listdir("/proc/self/fd")
    write_atomic(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["file"]
    assert os.listdir("/proc/self/fd") == open_files


def test_a_directory_that_fails_to_sync_is_an_error_that_leaves_no_file_open(tmp_path, monkeypatch):
    fail_to_sync_directories(monkeypatch, errno.EIO)
    open_files = os.listdir("/proc/self/fd")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "file", b"content")
    assert os.listdir("/proc/self/fd") == open_files


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(pipe, b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_link_stays_one_and_its_target_is_replaced(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    args = main.parse_args(["--device=cpu", "--experiments_dir=~/exp", "--data_path=~/data", "--resume=~/run"])
    assert args.experiments_dir == f"{tmp_path}/exp"
    assert args.data_path == f"{tmp_path}/data"
    assert args.resume == f"{tmp_path}/run"
    assert parser.path_type("~/exp") == tmp_path / "exp"
    assert parser.path_type("a~") == Path("a~")


def script(code: str, *, redirect: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run code as a script whose `main` is run by run_command, in a shell with these redirections."""
    code = f"import sys\nfrom utils.errors import print_error, run_command\n{code}\nrun_command(main)"
    line = ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, code]
    return subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True)


CLOSED = [(">&-", b"", b"error: a message\n"), ("2>&-", b"out\n", b""), ("<&- >&- 2>&-", b"", b"")]


@pytest.mark.parametrize(("redirect", "out", "err"), CLOSED)
@pytest.mark.parametrize("status", [0, 1])
def test_closed_streams_change_no_status(status, redirect, out, err):
    talk = "print('out'), sys.stdout.flush(), sys.stderr.isatty(), print_error('a message')"
    found = script(f"def main():\n    {talk}\n    return {status}", redirect=redirect)
    assert (found.returncode, found.stdout, found.stderr) == (status, out, err)


def test_no_file_gets_the_number_of_a_closed_stream():
    assert script("def main(): return open('README.md').fileno() <= 2", redirect="<&- >&- 2>&-").returncode == 0


class Full(io.StringIO):
    """A stream to a full disk."""

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_line_that_cannot_be_written_stops_nothing(name, monkeypatch):
    stream = Full()
    monkeypatch.setattr(sys, name, stream)
    tell("a line", None if name == "stdout" else stream)
    assert stream.getvalue() == "a line\n"


def test_a_full_disk_behind_standard_output_is_no_success():
    found = script("def main():\n    print('lost')", redirect=">/dev/full")
    assert found.returncode != 0
    assert b"No space left" in found.stderr


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", rb"caf\udce9 \xfc \u20ac"), ("latin-1", rb"caf\udce9 " + b"\xfc" + rb" \u20ac")]
)
def test_what_an_output_cannot_show_is_escaped(encoding, shown):
    found = script(r"def main(): print('caf\udce9 \xfc \u20ac')", PYTHONIOENCODING=encoding)
    assert found.returncode == 0
    assert found.stdout == shown + b"\n"
    assert found.stderr == b""


def test_a_name_cannot_forge_a_line(capsys):
    print_error("class b\x1b[31m\nerror: forged\udce9 ü")
    assert capsys.readouterr().err == "error: class b\\x1b[31m\\nerror: forged\\udce9 ü\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_ask_to_end_interrupt(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as interrupted, signals_raise():
        os.kill(os.getpid(), number)
    assert interrupted.value.number == number
    assert signal.getsignal(number) is before


SCRIPTS = ("benchmark", "plot", "predict", "summarize", "train_table")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["main", *(f"scripts/{name}" for name in SCRIPTS)])
def test_every_program_finds_its_modules_and_refuses_a_value_that_is_none(program, tmp_path):
    """PYTHONSAFEPATH leaves the program's folder out of Python's search path."""
    command = [sys.executable, str(ROOT / f"{program}.py"), "--out=--"]
    found = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True)
    assert found.returncode == 2
    assert found.stderr.endswith(b": error: argument --out: '--' is not a value\n")


def test_a_machine_that_starts_no_further_thread_is_told_in_one_line(refused, tmp_path, monkeypatch):
    message = "can't start new thread"  # Python's
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError(message)))
    assert "ulimit -u" in refused(run, tmp_path / "run")


def test_windows_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"^error: Linux and macOS only"):
        runpy.run_path(str(ROOT / "main.py"))


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def commit_of_copy(folder: Path) -> str | None:
    """What is recorded where this code lies in `folder`."""
    spec = importlib.util.spec_from_file_location("copied_machine", folder / "utils" / "machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._git_commit()


@pytest.fixture
def copied(tmp_path) -> Path:
    """This code, unpacked inside a repository of something else."""
    (tmp_path / "other" / "code" / "utils").mkdir(parents=True)
    shutil.copy(machine.__file__, tmp_path / "other" / "code" / "utils")
    git(tmp_path / "other", "init")
    git(tmp_path / "other", "commit", "--allow-empty", "-m", "first")
    return tmp_path / "other" / "code"


def test_no_commit_of_another_repository_is_recorded(copied, monkeypatch):
    assert commit_of_copy(copied) is None
    monkeypatch.setenv("GIT_DIR", str(copied.parent / ".git"))
    assert commit_of_copy(copied) is None


def test_the_commit_of_this_code_is_recorded_though_git_is_told_of_another(copied, monkeypatch):
    git(copied, "init")
    git(copied, "add", "utils/machine.py")
    git(copied, "commit", "-m", "code")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=copied, check=True, capture_output=True, text=True)
    monkeypatch.setenv("GIT_DIR", str(copied.parent / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(copied.parent / ".git" / "index"))
    assert commit_of_copy(copied) == commit.stdout.strip()
    with open(copied / "utils" / "machine.py", "a") as file:
        file.write("\n")
    assert commit_of_copy(copied) == f"{commit.stdout.strip()} with changes"


def test_the_command_line_needs_no_torchvision():
    code = "import sys\nimport main\nmain.default_args()\nassert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
