"""The training step captured or compiled: on an emulated graph, on a GPU without arithmetic, and on a real one."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import main
from data.loader import Loader
from data.readers import Split
from loss import build_objective
from models import build_model
from utils import distributed, engine
from utils.compile import CompiledNetwork
from utils.cuda_graph import GraphedStep
from utils.errors import describe_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Five full batches and a last one of four in each of three epochs; the learning rate drops in the last.
SMALL = "--device cpu --precision fp32 --width 4 --image_size 16 --limit_train 44 --batch_size 8 --end_epoch 3"
ALL = "--PSKD --BYOT --DML"
COMBINATIONS = (ALL, "--PSKD --DML --DML_on_output --classifier_type resnet34", "--BYOT --DML --DML_as_published", "")
# Operations for which the processor waits for the device.
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten._unique2"}
EXACT = {"rtol": 0, "atol": 0}
# For 18 steps in float64: they amplify a relative error of 1e-12 to less than this, and one of 1e-7 to order one.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def parse(words: str):
    return main.parse_args(f"{SMALL} --lr_decay_schedule 2 {words}".split())


def loader(args, device, dtype, **training) -> Loader:
    random, num, size = np.random.RandomState(0), args.limit_train, args.image_size
    split = Split(random.randint(0, 256, (num, size, size, 3), dtype=np.uint8), random.randint(0, 10, num))
    record = {"class_names": [str(k) for k in range(10)], "mean": [0.5] * 3, "std": [0.25] * 3}
    images = Loader(split, record, size, device, **training)
    images.scale, images.shift = images.scale.to(dtype), images.shift.to(dtype)
    return images


def train(device, words: str, dtype=torch.float64, graph=False, compile=False, transform=None) -> dict:
    """What the epochs of a run leave behind."""
    args = parse(words)
    images = loader(args, device, dtype, augmentation="crop", batch_size=args.batch_size)
    model = build_model(args, 10).to(device, dtype, memory_format=torch.channels_last)
    objective = build_objective(args, args.limit_train, 10).to(device, dtype)
    optimizer, schedule = engine.build_optimizer(args, model), engine.build_schedule(args)
    network = CompiledNetwork(model) if compile else model
    step = engine.TrainStep(network, objective, optimizer, device, args.precision, compile, transform)
    step = GraphedStep(step) if graph else step
    epochs = []
    for epoch in range(args.end_epoch):
        optimizer.param_groups[0]["lr"] = schedule(epoch)
        model.train()
        objective.train().set_epoch(epoch)
        images.set_epoch(epoch)
        torch.manual_seed(epoch)
        epochs.append(engine.train_one_epoch(step, images))
        logits, _ = engine.predict(model, loader(args, device, dtype), args.precision)
    left = {"model": model.state_dict(), "objective": objective.state_dict(), "scaler": step.scaler.state_dict()}
    left |= {"logits": logits, "skipped": [e.get("skipped_steps", 0) for e in epochs]}
    return left | {"means": [e["train"] for e in epochs]}


@pytest.mark.parametrize("words", COMBINATIONS)
def test_captured_step_equals_the_plain_step_to_the_bit(words, emulated_graphs):
    torch.testing.assert_close(train(CPU, words, graph=True), train(CPU, words), **EXACT)
    assert len(emulated_graphs) == 2  # one for each learning rate
    replayed = [(str(func).rsplit(".", 1)[0], args) for func, args, *_ in emulated_graphs[0].operations]
    indices = [index for name, args in replayed if name == "aten.index" for index in tree_leaves(args[1])]
    assert not [index for index in indices if index.dtype == torch.bool]  # a mask makes the processor wait
    assert not {name for name, _ in replayed} & WAITING


def test_captured_fp16_step_skips_and_rescales_as_the_plain_one(emulated_graphs, monkeypatch):
    """With the fused optimiser of a GPU; so large a scale overflows in captured steps, too."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: sgd(*args, **options | {"fused": True}))
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**30))
    words = f"{ALL} --precision fp16"
    captured, plain = (train(CPU, words, torch.float32, graph=graph) for graph in (True, False))
    torch.testing.assert_close(captured, plain, **EXACT)
    assert 3 < sum(captured["skipped"]) < 18 and captured["skipped"][0] == 6
    replayed = {str(func).rsplit(".", 1)[0] for func, *_ in emulated_graphs[0].operations}
    assert "aten._amp_update_scale_" in replayed and not replayed & WAITING


def mix_at_times(images, labels):
    """On most batches MixUp, with a weight drawn on the processor; on the others nothing."""
    weight, y = torch.rand(()).item(), F.one_hot(labels, 10).to(images)
    if weight < 0.2:
        return images, labels
    return torch.lerp(images.flip(0), images, weight), torch.lerp(y.flip(0), y, weight)


def test_transform_runs_outside_the_captured_step(emulated_graphs):
    assert_equal = functools.partial(torch.testing.assert_close, **EXACT)
    assert_equal(*(train(CPU, ALL, graph=graph, transform=mix_at_times) for graph in (True, False)))
    assert len(emulated_graphs) == 2


def test_capture_that_fails_is_one_line_and_the_run_equals_the_plain_one(emulated_graphs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.capture(ValueError("not permitted")))
    torch.testing.assert_close(train(CPU, ALL, graph=True), train(CPU, ALL), **EXACT)
    lines = capsys.readouterr().err.splitlines()
    assert len(emulated_graphs) == len(lines) == 1 and "could not be captured (not permitted)" in lines[0]


def test_out_of_memory_in_a_capture_is_reported_as_such(emulated_graphs, monkeypatch):
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.capture(error))
    with pytest.raises(RuntimeError) as raised:
        train(CPU, ALL, graph=True)
    assert "out of memory with --batch_size 8" in describe_error(raised.value, parse(ALL))


@pytest.mark.parametrize(
    "words, processes", [(f"{ALL} --num_resnet_blocks 2", 1), ("--num_resnet_blocks 1 --limit_train 47", 2)]
)
def test_compiled_step_equals_the_plain_step_to_the_bit_and_is_compiled_once(words, processes, monkeypatch):
    """Network and objective, PS-KD's memory included; the last batches, smaller by one to four, are not compiled. Of
    two processes only the first one is there: its shards of seven and of eight images are both of four."""
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "all_reduce_sum_", lambda tensor: tensor)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    torch.testing.assert_close(train(CPU, words, compile=True), train(CPU, words), **EXACT)
    assert dict(counters["frames"]) == {"total": 2, "ok": 2} and not counters["graph_break"]


@pytest.mark.parametrize("words, augmentation", [(ALL, "crop"), (COMBINATIONS[1], "resized_crop")])
def test_every_tensor_is_on_the_gpu(words, augmentation):
    """On a GPU that computes nothing but shapes, types and devices."""
    args = parse(words)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.zeros(1).to(CUDA)
        except (RuntimeError, AssertionError):
            pytest.skip("this PyTorch has no GPU tensors without a driver")
        images = loader(args, CUDA, torch.float32, augmentation=augmentation, batch_size=args.batch_size)
        with CUDA:
            model, objective = build_model(args, 10).train(), build_objective(args, args.limit_train, 10).train()
        step = engine.TrainStep(model, objective, engine.build_optimizer(args, model), CUDA, "fp32")
        for batch, labels, index in images:
            with torch.no_grad():
                loss, parts, logits = step.forward(batch, labels, index, len(labels))
                step.meter.update(parts, logits, labels, len(labels))
        logits, _ = engine.predict(model, loader(args, CUDA, torch.float32), "fp32")
    assert {t.device.type for t in (batch, labels, index, loss, logits, step.meter.sums)} == {"cuda"}
    assert logits.shape == (4, args.limit_train, 10) and step.optimizer.defaults["fused"]


@on_gpu
@pytest.mark.parametrize("words", COMBINATIONS)
def test_captured_step_on_the_gpu_equals_the_plain_step_there_and_on_the_cpu(words):
    plain = train(CUDA, words)
    torch.testing.assert_close(train(CUDA, words, graph=True), plain, **TOLERANCE)
    torch.testing.assert_close(tree_map_only(torch.Tensor, torch.Tensor.cpu, plain), train(CPU, words), **TOLERANCE)


@on_gpu
def test_captured_losses_of_20_steps_agree_in_bf16_at_full_width():
    words = f"{ALL} --width 64 --precision bf16 --image_size 32 --limit_train 128 --batch_size 128 --end_epoch 20"
    captured, plain = (train(CUDA, words, torch.float32, graph=graph)["means"] for graph in (True, False))
    assert [mean["loss"] for mean in captured] == pytest.approx([mean["loss"] for mean in plain], rel=0.02)
