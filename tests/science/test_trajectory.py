"""Training runs that the published script made in float64, against ours from the same weights and batches.

`golden/README.md` has the recipe by which both are made, and says what the files hold.
"""

import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import AGREEMENT
from torch.distributions import Categorical
from torch.utils.data import DataLoader, TensorDataset

from loss import build_objective
from main import parse_args
from models import build_model
from utils.engine import TrainStep, build_optimizer, build_schedule, evaluate, predict, train_one_epoch

NARROW = "--width 16 --lr 0.01"
ALL = "--PSKD --BYOT --DML --DML_as_published"
CASES = {  # file -> flags
    "r18_w16_none": NARROW,
    "r18_w16_PSKD": f"{NARROW} --PSKD",
    "r18_w16_BYOT": f"{NARROW} --BYOT",
    "r18_w16_PSKD_BYOT_DML": f"{NARROW} {ALL}",
    "r18_w64_PSKD_BYOT_DML": f"--width 64 --lr 0.01 {ALL}",
    "x50_w16_PSKD_BYOT_DML": f"--width 16 --lr 1e-4 {ALL} --classifier_type resnext50_32x4d",
    "r50_w16_PSKD_BYOT_DML": f"--width 16 --lr 1e-4 {ALL} --classifier_type resnet50",
}
NETWORKS = ("r18", "x50", "r50")
LOSS_BOUNDS = dict(zip(NETWORKS, AGREEMENT["losses of training runs"], strict=True))
BOUNDS = dict(zip(NETWORKS, AGREEMENT["state after training runs"], strict=True))


def draw(name: str, *shape: int) -> torch.Tensor:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(random.standard_normal(shape))


def norm_and_probe(name: str, tensor: torch.Tensor) -> tuple[float, float]:
    return tensor.norm().item(), (tensor * draw(f"probe {name}", *tensor.shape)).sum().item()


def initial_value(name: str, like: torch.Tensor) -> torch.Tensor:
    if like.ndim > 1:
        fan_in = like[0].numel()
        return draw(name, *like.shape) * (2 / fan_in) ** 0.5
    if name.endswith(("bias", "running_mean", "num_batches_tracked")):
        return torch.zeros_like(like)
    return torch.ones_like(like)


def loader(name: str, seed: int, order, batch_size: int) -> DataLoader:
    """Batches (images, labels, index) of the rows in `order`."""
    num_samples = len(order)
    labels = torch.from_numpy(np.random.RandomState(seed).randint(0, 100, num_samples))
    images = TensorDataset(draw(name, num_samples, 3, 32, 32), labels, torch.arange(num_samples))
    batches = DataLoader(images, batch_size, sampler=order)
    batches.num_samples = num_samples  # which the engine reads
    return batches


def logged(args, logits: torch.Tensor, loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> dict[str, float]:
    """What the published script logs of a step. In place of BYOT's KL it has a cross-entropy, larger by an entropy."""
    entropy = 0
    if args.BYOT:
        entropy = 3 * 0.1 * 3**2 * Categorical(logits=logits / 3).entropy().mean().item()
    found = {"logged_total": loss.item() + entropy, "logged_ce": parts["ce"].item()}
    if args.BYOT:
        found["logged_byot"] = sum(parts[f"byot_{name}"].item() for name in ("ce", "kl", "hint")) + entropy
    if args.DML:
        found["logged_dml"] = parts["dml"].item()
    return found


def final_state(model, initial: dict[str, torch.Tensor], optimizer) -> dict[str, list]:
    parameters = dict(model.named_parameters())
    found = {"names": [], "final": []}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        momentum = np.nan, np.nan
        if name in parameters:
            momentum = norm_and_probe(name, optimizer.state[parameters[name]]["momentum_buffer"])
        change = (tensor - initial[name]).norm().item()
        found["names"].append(name)
        found["final"].append([*norm_and_probe(name, tensor), change, *momentum])
    return found


def train(args) -> dict:
    """The arrays of a golden file, by name."""
    model = build_model(args, 100).double()
    initial = {name: initial_value(name, tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(initial)
    objective = build_objective(args, 100, 100).double()
    optimizer, schedule = build_optimizer(args, model), build_schedule(args)
    step = TrainStep(model, objective, optimizer, torch.device("cpu"), args.precision)

    # training loop
    steps, epochs = [], []
    objective.register_forward_hook(lambda _, inputs, result: steps.append((inputs[0].logits.detach(), *result)))
    rates = []
    for epoch in range(args.end_epoch):
        rate = optimizer.param_groups[0]["lr"] = schedule(epoch)
        model.train()
        objective.train().set_epoch(epoch)
        train_one_epoch(step, loader("images", 1, np.random.RandomState(10 + epoch).permutation(100), 16))
        rates += [rate] * (len(steps) - len(rates))
        predictions = predict(model, loader("validation", 2, range(50), 50), args.precision)
        epochs.append(evaluate(*predictions, ["final"])["final"])

    found = {"lr": rates, **final_state(model, initial, optimizer)}
    logs = [logged(args, *values) for values in steps]
    for name in logs[0]:
        found[name] = [log[name] for log in logs]
    for name in ("nll", "ece", "aurc", "eaurc"):
        found[f"val_{name}"] = [val[name] for val in epochs]
    for name in ("top1", "top5"):
        found[f"val_{name}"] = [100 - val[f"{name}_error"] for val in epochs]
    if args.PSKD:
        found["memory_norm"], found["memory_probe"] = norm_and_probe("memory", objective.soften.memory)
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if "w64" in case else []) for case in CASES]
)
def test_training_run(case):
    words = f"--device cpu --precision fp32 --end_epoch 3 --lr_decay_schedule 2 {CASES[case]}"
    ours = train(parse_args(words.split()))
    golden = dict(np.load(ROOT / "tests" / "golden" / f"{case}.npz"))
    for name in ("lr", "names"):
        assert ours.pop(name) == golden.pop(name).tolist()
    assert ours.keys() == golden.keys()
    network = case[:3]
    for name, expected in golden.items():
        if name.startswith("val_top"):
            expected = expected.round(4)  # percent from a float32
        scale = np.nanmax(np.abs(expected), axis=0, initial=1)  # of each column
        bound = LOSS_BOUNDS[network] if name.startswith("logged") else BOUNDS[network]
        np.testing.assert_allclose(ours[name] / scale, expected / scale, rtol=0, atol=bound, err_msg=name)
