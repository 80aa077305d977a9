"""Where the program is, how many threads it may use, the mark `slow`, and what several test files share."""

import os
import shutil
import signal
import sys
from pathlib import Path

# One thread per process: the networks are tiny, and tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: leave out with `-m "not slow"`, see scripts/test.sh')
    # A shell's background and nohup ignore them; the tests send them to themselves and to programs that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run (`helpers.FLAGS`), which tests read and copy but do not change."""
    from helpers import train

    directory = tmp_path_factory.mktemp("experiments") / "finished"
    assert train(directory) == 0
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def refused(capsys):
    """refused(command, *arguments) -> the line in which a command says why it ends with status 1."""
    from helpers import one_line

    def call(command, *arguments) -> str:
        capsys.readouterr()  # what was printed before
        assert command(*arguments) == 1
        return one_line(capsys)

    return call


@pytest.fixture(scope="session")
def gpu_library(tmp_path_factory) -> Path:
    """What plays CUDA; skips where it cannot be built."""
    import emulated_gpu

    try:
        return emulated_gpu.build(tmp_path_factory.mktemp("emulated_gpu"))
    except emulated_gpu.Unavailable as e:
        if os.environ.get("REQUIRE_EMULATED_GPU"):  # where nothing may be skipped
            raise
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def gpu(gpu_library):
    """gpu(function, *arguments, compute=True) calls a function in a process with emulated GPUs: two of the newest, one
    without bf16 and TF32, a small one, and one that is too old for fp16."""
    import emulated_gpu

    with emulated_gpu.process(gpu_library, "90:80 90:80 70:16 86:8 61:8") as call:  # "capability:GiB" of each
        yield call


@pytest.fixture
def summary(tmp_path, capsys):
    """summary(*words) -> output of summarize.py on tmp_path."""
    import summarize

    def call(*words, path=tmp_path):
        summarize.main([str(path), *words])
        return capsys.readouterr().out

    return call
