"""The captured step, on an emulated graph where there is no GPU, and on the GPU where there is one."""

import contextlib
import copy
import types

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import main
from data.files import Split
from data.loader import Loader
from loss import build_objective
from models import build_model
from utils import cuda_graph
from utils.engine import Meter, learning_rate, predict, train_one_epoch, train_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_IMAGES, BATCH, EPOCHS, DROP = 44, 8, 3, 2  # five whole batches and a last one of four
# What makes the processor wait for the device.
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten._unique2"}
COMBINATIONS = (
    "--PSKD --BYOT --DML",
    "--PSKD --DML --DML_on_output --classifier_type resnet34",
    "--BYOT --DML --DML_as_published",
    "",
)


def has_fake_gpu() -> bool:
    """Old PyTorch asks the driver even of a tensor without memory."""
    with FakeTensorMode(), contextlib.suppress(RuntimeError, AssertionError):
        return torch.zeros(1).to(CUDA).device.type == "cuda"
    return False


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Graph(TorchDispatchMode):
    """CUDAGraph's two acts on a CPU: note the operations on tensors, and do them again on the same memory.

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
    def capture(self):
        with self:
            yield
        with torch.no_grad():
            for tensor, value in filter(None, self.before.values()):
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def emulated(monkeypatch):
    """Graphs made with it, in order."""
    graphs = []
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.capture())
    return graphs


def loader(device, **training) -> Loader:
    random = np.random.RandomState(0)
    split = Split(random.randint(0, 256, (NUM_IMAGES, 16, 16, 3), dtype=np.uint8), random.randint(0, 10, NUM_IMAGES))
    return Loader(split, [str(k) for k in range(10)], (0.5,) * 3, (0.25,) * 3, 16, device, **training)


def train(step, device, flags: str) -> dict:
    """Everything that some epochs leave behind; the learning rate drops and PS-KD's alpha_t grows on the way."""
    args = main.parse_args(f"{flags} --width 4 --device cpu --end_epoch {EPOCHS}".split())
    images = loader(device, augmentation="crop", batch_size=BATCH, seed=1)
    model = build_model(args, 10).to(device, memory_format=torch.channels_last).train()
    objective = build_objective(args, NUM_IMAGES, 10).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    meter, means = Meter(device), []
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = learning_rate(0.1, 0.1, [DROP], epoch)
        objective.set_epoch(epoch)
        images.set_epoch(epoch)
        done = train_one_epoch(model, objective, optimizer, images, contextlib.nullcontext, meter, step)
        means.append(done["train"])
    states = {"model": model.state_dict(), "objective": objective.state_dict(), "means": means}
    return copy.deepcopy(states)


def assert_same(one, other, **tolerance):
    torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_a_replayed_step_is_the_step(flags, emulated):
    assert_same(train(cuda_graph.GraphedStep(), CPU, flags), train(train_step, CPU, flags))
    assert len(emulated) == 2  # one for each learning rate
    replayed = {str(func).rsplit(".", 1)[0] for func, *_ in emulated[0].operations}
    assert "aten.convolution_backward" in replayed and not replayed & WAITING
    masks = [t for func, args, *_ in emulated[0].operations if "aten.index" in str(func) for t in tensors(args[1:])]
    assert not [mask for mask in masks if mask.dtype == torch.bool]  # how many of it are true, the processor must ask


@pytest.mark.skipif(not has_fake_gpu(), reason="this PyTorch has no GPU tensors without a driver")
@pytest.mark.parametrize("augmentation", ["crop", "resized_crop", None])
@pytest.mark.parametrize("flags", COMBINATIONS)
def test_on_a_gpu_every_tensor_is_on_it(flags, augmentation, monkeypatch):
    """On a GPU that computes nothing but shapes, types and devices, which is enough to find a tensor left behind."""
    args = main.parse_args([*flags.split(), "--width", "4", "--device", "cpu"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = loader(CUDA, augmentation=augmentation, batch_size=BATCH)
        with CUDA:
            model, objective = build_model(args, 10).train(), build_objective(args, NUM_IMAGES, 10).train()
        meter = Meter(CUDA)
        for batch, labels, index in images:
            with torch.no_grad():
                outputs = model(batch)
                loss, parts = objective(outputs, labels, index)
                meter.update(parts, outputs.logits, labels, len(labels))
        logits, labels = predict(model.eval(), loader(CUDA), contextlib.nullcontext)
    assert {t.device.type for t in (batch, labels, index, loss, logits, meter.sums)} == {"cuda"}
    assert logits.shape == (1 + len(model.exits), NUM_IMAGES, 10) and logits.dtype == torch.float32


@on_gpu
@pytest.mark.parametrize("flags", COMBINATIONS)
def test_on_the_gpu_the_replayed_step_is_the_step(flags):
    eager = train(train_step, CUDA, flags)
    assert_same(train(cuda_graph.GraphedStep(), CUDA, flags), eager, rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("flags", COMBINATIONS)
def test_the_gpu_computes_what_the_processor_does(flags):
    main.set_up_torch(0, CUDA, "fp32")
    on_device = tree_map_only(torch.Tensor, torch.Tensor.cpu, train(train_step, CUDA, flags))
    assert_same(on_device, train(train_step, CPU, flags), rtol=1e-2, atol=1e-3)
