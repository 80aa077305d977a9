"""The training step compiled, and captured on a GPU (test_device_path.py: on an emulated one)."""

import functools

import numpy as np
import pytest
import torch
from helpers import assert_identical
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only

import main
from data.loader import Loader
from data.readers import Split
from loss import build_objective
from models import build_model
from utils import distributed, engine, launch
from utils.compile import Compiled
from utils.cuda_graph import GraphedStep
from utils.launch import World
from utils.records import DataRecord

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Five full batches and a last one of four in each of three epochs; the learning rate drops in the last.
SMALL = "--device cpu --precision fp32 --width 4 --image_size 16 --limit_train 44 --batch_size 8 --end_epoch 3"
ALL = "--PSKD --BYOT --DML"
COMBINATIONS = (ALL, "--PSKD --DML --DML_on_output --classifier_type resnet34", "--BYOT --DML --DML_as_published", "")
# For 18 steps in float64: they amplify a relative error of 1e-12 to less than this, and one of 1e-7 to order one.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def parse(words: str):
    return main.parse_args(f"{SMALL} --lr_decay_schedule 2 {words}".split())


def loader(args, device, dtype, **training) -> Loader:
    random, num, size = np.random.RandomState(0), args.limit_train, args.image_size
    split = Split(random.randint(0, 256, (num, size, size, 3), dtype=np.uint8), random.randint(0, 10, num))
    record = DataRecord([str(k) for k in range(10)], [0.5] * 3, [0.25] * 3, {})
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
    network = Compiled(model) if compile else model
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


@pytest.mark.parametrize(
    "words, processes", [(f"{ALL} --num_resnet_blocks 2", 1), ("--num_resnet_blocks 1 --limit_train 47", 2)]
)
def test_compiled_step_equals_the_plain_step_to_the_bit_and_is_compiled_once(words, processes, monkeypatch):
    """Network and objective, PS-KD's memory included; the last batches, smaller by one to four, are not compiled. Of
    two processes only the first one is there: its shards of seven and of eight images are both of four."""
    monkeypatch.setattr(launch, "WORLD", World(size=processes))
    monkeypatch.setattr(distributed, "all_reduce_sum_", lambda tensor: tensor)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    assert_identical(train(CPU, words, compile=True), train(CPU, words))
    assert dict(counters["frames"]) == {"total": 2, "ok": 2}
    assert not counters["graph_break"]


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
