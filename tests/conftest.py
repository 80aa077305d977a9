"""Where the program is, the mark `slow`, what several test files share, and CUDA graphs emulated on a CPU."""

import contextlib
import os
import shutil
import sys
import types
from pathlib import Path

# One thread per process: the networks are tiny, and tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: leave out with `-m "not slow"`, see README')


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


class Graph(TorchDispatchMode):
    """What CUDAGraph does, on a CPU: record the operations on tensors, and repeat them on the same memory.

    As with the real one, nothing else of the program runs again, and capturing changes no tensor.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        for tensor in tensors((args, kwargs)):
            self.before.setdefault(tensor.untyped_storage().data_ptr(), (tensor, tensor.clone()))
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            self.before.setdefault(tensor.untyped_storage().data_ptr(), None)  # made within
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @contextlib.contextmanager
    def capture(self, error: Exception | None = None):
        with self:
            yield
        with torch.no_grad():
            for tensor, value in filter(None, self.before.values()):
                tensor.copy_(value)
        if error:  # as seen outside: another error, raised while the graph is closed
            failure = RuntimeError("CUDA error: operation failed due to a previous error during capture")
            failure.__context__ = error
            raise failure

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def emulated_graphs(monkeypatch):
    """Emulates CUDA graphs; the graphs that were made, in order."""
    made = []
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.capture())
    return made


@pytest.fixture
def summary(tmp_path, capsys):
    """summary(*words) -> output of summarize.py on tmp_path."""
    import summarize

    def call(*words, path=tmp_path):
        summarize.main([str(path), *words])
        return capsys.readouterr().out

    return call
