"""Golden numbers, computed by the published script or independently of it, against ours.

`golden/README.md` says what they are. "Head" 1, 2, 3 there is exit 1, 2, 3 here. Where the golden total holds a
cross-entropy and ours the KL, they differ by an entropy, which is added where they are compared.
"""

import json
from math import prod

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import AGREEMENT

from loss import build_objective
from main import parse_args
from models import MODELS, Outputs, build_model
from utils.engine import build_schedule
from utils.metrics import classification_metrics


def load_tensors(name):
    arrays = np.load(ROOT / "tests" / "golden" / name)
    return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


LOSSES = load_tensors("losses.npz")
METRICS = load_tensors("metrics.npz")
NETWORKS = json.loads((ROOT / "tests" / "golden" / "models.json").read_text())
TENSORS = ("outputs", "mid1", "mid2", "mid3", "fea_final", "fea1", "fea2", "fea3")
LABELS = LOSSES["in_labels"]
INDEX = torch.arange(8)
BOUNDS = {torch.float64: AGREEMENT["losses and gradients"][0], torch.float32: 2e-6}
PROBE_BOUNDS = dict(zip(("logits", "feature"), AGREEMENT["networks"], strict=True))


def assert_close(ours, golden, bound=BOUNDS[torch.float64], relative_to=None):
    """Relative to the largest entry: with the golden beta the features' gradients are tiny."""
    if relative_to is None:
        relative_to = golden
    scale = relative_to.abs().max().clamp_min(1e-300)
    difference = (ours.double() - golden).abs().max()
    assert difference / scale < bound


def flags(*words: str):
    return parse_args(["--device", "cpu", "--precision", "fp32", *words])


def golden_inputs(dtype=torch.float64) -> dict[str, torch.Tensor]:
    return {name: LOSSES[f"in_{name}"].clone().to(dtype).requires_grad_() for name in TENSORS}


def as_outputs(x: dict) -> Outputs:
    exit_logits = x["mid1"], x["mid2"], x["mid3"]
    exit_features = x["fea1"], x["fea2"], x["fea3"]
    return Outputs(x["outputs"], x["fea_final"], exit_logits, exit_features)


def objective_with_past(*words: str, alpha_T="0.37"):
    """The objective of those flags in the last of two epochs, in which alpha_t = alpha_T (1 + 1) / 2, the golden one;
    with PS-KD, told the golden bank as past."""
    objective = build_objective(flags(*words, "--alpha_T", alpha_T, "--end_epoch", "2"), 8, 100).double()
    if "--PSKD" in words:
        objective.soften.memory.copy_(LOSSES["in_bank"])
    objective.set_epoch(1)
    return objective


# The complete loss, in 12 combinations of methods and two types.


@pytest.fixture(scope="module", params=range(12))
def case(request):
    return request.param


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def flags_of_case(case) -> list[str]:
    words = []
    names = ("--PSKD", "--BYOT", "--DML")
    for name, is_on in zip(names, LOSSES["case_flags_PSKD_BYOT_DML"][case], strict=True):
        if is_on:
            words.append(name)
    if "--DML" in words and not LOSSES["case_dml_form"][case]:
        words.append("--DML_as_published")
    return words


@pytest.fixture(scope="module")
def result(case, dtype):
    """Inputs, which have their gradients, loss and parts."""
    x = golden_inputs(dtype)
    objective = objective_with_past(*flags_of_case(case)).to(dtype)
    loss, parts = objective(as_outputs(x), LABELS, INDEX)
    loss.backward()
    return x, loss.detach(), parts


def byot_entropy(case):
    """alpha tau^2 (cross-entropy - KL) for each of three exits, the teacher being the same; 0 without BYOT."""
    if "--BYOT" not in flags_of_case(case):
        return 0
    entropy = LOSSES["kd_value_T3"] - LOSSES["kd_true_kl_T3"]
    return 3 * 0.1 * 3**2 * entropy


def test_total_loss(case, dtype, result):
    _, loss, _ = result
    assert_close(loss + byot_entropy(case), LOSSES["case_total"][case], BOUNDS[dtype])


def test_cross_entropy_part(case, dtype, result):
    _, _, parts = result
    assert_close(parts["ce"], LOSSES["case_ce_final"][case], BOUNDS[dtype])


def test_byot_part(case, dtype, result):
    _, _, parts = result
    byot = torch.zeros(())
    for name, value in parts.items():
        if name.startswith("byot"):
            byot = byot + value
    golden = LOSSES["case_byot_part"][case]
    assert_close(byot + byot_entropy(case), golden, BOUNDS[dtype], relative_to=LOSSES["case_total"][case])


def test_dml_part(case, dtype, result):
    _, _, parts = result
    dml = parts.get("dml", torch.zeros(()))
    assert_close(dml, LOSSES["case_dml_part"][case], BOUNDS[dtype])


def test_gradients(case, dtype, result):
    x, _, _ = result
    for name, tensor in x.items():
        gradient = tensor.grad
        if gradient is None:
            gradient = torch.zeros_like(tensor)
        assert_close(gradient, LOSSES[f"case_grad_{name}"][case], BOUNDS[dtype])


# Single losses.


@pytest.mark.parametrize("k", [1, 2, 3])
def test_byot_from_block_k(k):
    """Hint and gradients of the exits from k on are those of the golden case that teaches all exits."""
    x = golden_inputs()
    objective = objective_with_past("--BYOT", "--BYOT_from_k_block", str(k))
    loss, parts = objective(as_outputs(x), LABELS, INDEX)
    hint = sum(LOSSES[f"hint_value_{i}"] for i in range(k, 4))
    assert_close(parts["byot_hint"], 1e-6 * hint)
    loss.backward()
    byot_only = LOSSES["case_flags_PSKD_BYOT_DML"].tolist().index([0, 1, 0])
    for i in range(1, 4):
        for name in (f"mid{i}", f"fea{i}"):
            if i < k:
                assert x[name].grad is None
            else:
                assert_close(x[name].grad, LOSSES[f"case_grad_{name}"][byot_only])


@pytest.mark.parametrize("tau", [1, 2, 3, 4])
def test_kd_value_and_gradient_at_temperature(tau):
    x = golden_inputs()
    objective = objective_with_past("--BYOT", "--temperature", str(tau), "--alpha", "1", "--beta", "0")
    first_exit = Outputs(x["outputs"], x["fea_final"], (x["mid1"],), (x["fea1"],))
    loss, parts = objective(first_exit, LABELS, INDEX)
    assert_close(parts["byot_kl"], tau**2 * LOSSES[f"kd_true_kl_T{tau}"])
    loss.backward()  # with alpha = 1, what reaches mid1 is the KL's
    assert_close(x["mid1"].grad, tau**2 * LOSSES[f"kd_grad_mid1_T{tau}"])


def test_hint_on_signed_features():
    feature = LOSSES["hint_signed_fea"].clone().requires_grad_()
    logits = torch.zeros(8, 100, dtype=torch.float64)
    outputs = Outputs(logits, LOSSES["hint_signed_target"], (logits,), (feature,))
    objective = objective_with_past("--BYOT", "--beta", "1")
    loss, parts = objective(outputs, LABELS, INDEX)
    loss.backward()
    assert_close(parts["byot_hint"], LOSSES["hint_signed_value"])
    assert_close(feature.grad, LOSSES["hint_signed_grad"])


OUTPUTS = Outputs(LOSSES["in_outputs"], feature=None)


@pytest.mark.parametrize("number", range(4))
def test_progressive_targets_and_memory(number):
    alpha = LOSSES["soft_alphas"][number].item()
    [bound] = AGREEMENT["prediction memory"]
    targets = objective_with_past("--PSKD", alpha_T=str(alpha)).soften
    assert_close(targets(OUTPUTS, LABELS, INDEX), LOSSES["soft_targets"][number], bound)
    assert_close(targets.memory, LOSSES["bank_after_step"], bound)


def test_progressive_targets_of_the_first_epoch():
    targets = objective_with_past("--PSKD").soften
    targets.set_epoch(0)
    golden = LOSSES["soft_targets_epoch0_alpha0.37"]
    assert torch.equal(targets(OUTPUTS, LABELS, INDEX), golden)


@pytest.mark.parametrize("epochs", [300, 3])
def test_alpha_t_of_every_epoch(epochs):
    objective = build_objective(flags("--PSKD", "--end_epoch", str(epochs)), 1, 2)
    [bound] = AGREEMENT["learning rate and alpha_t of every epoch"]
    for epoch, golden in enumerate(LOSSES[f"schedule_alpha_t_end{epochs}"]):
        objective.set_epoch(epoch)
        assert objective.soften.alpha_t == pytest.approx(golden.item(), rel=bound, abs=0)
    assert epoch == epochs - 1


@pytest.mark.parametrize("epochs", [300, 3])
def test_learning_rate_of_every_epoch(epochs):
    schedule = build_schedule(flags("--end_epoch", str(epochs), "--lr_decay_schedule", "150", "225"))
    ours = [schedule(epoch) for epoch in range(epochs)]
    assert ours == LOSSES[f"schedule_lr_end{epochs}"].tolist()


# Metrics.


@pytest.mark.parametrize("name", ["typical", "ties"])
def test_metrics(name):
    ours = classification_metrics(METRICS[f"{name}_logits"], METRICS[f"{name}_labels"])
    ours["aurc_optimum"] = ours["aurc"] - ours["eaurc"]
    del ours["eaurc"]
    bound, ece_bound = AGREEMENT["metrics"]
    golden_names = {"nll": "nll_float64", "aurc": "aurc_tie_expected"}  # where names differ
    for our_name, value in ours.items():
        golden = METRICS[f"{name}_{golden_names.get(our_name, our_name)}"].item()
        rel = ece_bound if our_name == "ece" else bound
        assert value == pytest.approx(golden, rel=rel, abs=0), our_name


# Networks.


RESNETS = [name for name in MODELS if "resne" in name]


def golden_network(name: str) -> dict:
    """ResNet-18 and -50 stand in the golden file under the published script's names."""
    if name not in NETWORKS:
        name = f"ResNetBeMyOwnTeacher{name[-2:]}"
    return NETWORKS[name]


def count_parameters(name: str, method: str, num_classes: int) -> int:
    with torch.device("meta"):
        model = build_model(flags("--classifier_type", name, method), num_classes)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", RESNETS)
def test_parameter_counts(name):
    golden = golden_network(name)
    total = golden.get("parameters_without_unused", golden["total_parameters"])
    more_classes = golden["total_parameters_200_classes"] - golden["total_parameters"]
    assert count_parameters(name, "--BYOT", 100) == total
    assert count_parameters(name, "--BYOT", 200) == total + more_classes
    assert count_parameters(name, "--PSKD", 100) == golden["backbone_plus_final_fc_parameters"]


def exit_parameters(model) -> list[torch.nn.Parameter]:
    """In the golden order: bottleneck exits one after the other; of attention exits, all bodies, all attentions, all
    classifiers."""
    if not hasattr(model.exits[0], "attention"):
        return list(model.exits.parameters())
    parameters = []
    for kind in ("body", "attention", "fc"):
        for exit_ in model.exits:
            parameters += getattr(exit_, kind).parameters()
    return parameters


def all_parameters(model) -> list[torch.nn.Parameter]:
    """In the golden order: backbone, exits, final classifier."""
    backbone = [p for name, p in model.named_parameters() if not name.startswith(("exits.", "fc."))]
    return [*backbone, *exit_parameters(model), *model.fc.parameters()]


def sine(*shape: int, step: float, start: float = 0) -> torch.Tensor:
    numbers = torch.arange(prod(shape)).double()
    return torch.sin(start + step * numbers).view(shape)


@torch.no_grad()
def fill_with_sine(model, golden: dict) -> None:
    """Parameters as the golden probe has them, after a check of their shapes."""
    shapes = dict(enumerate(golden["parameter_shapes"]))
    for unused in golden["unused_parameter_indices"]:
        del shapes[unused]
    for (i, shape), p in zip(shapes.items(), all_parameters(model), strict=True):
        assert list(p.shape) == shape, i
        scale = 0.1
        if p.ndim > 1:
            fan_in = p[0].numel()
            scale = (3 / fan_in) ** 0.5
        p.copy_(scale * sine(*shape, step=0.7, start=0.1 * (i + 1)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight += 1


@pytest.fixture(scope="module", params=[name for name in RESNETS if "probe" in golden_network(name)])
def probe(request):
    """Our outputs in training mode, with parameters and images filled by a sine, and the golden probe."""
    golden = golden_network(request.param)
    model = build_model(flags("--classifier_type", request.param, "--BYOT"), 100).double().train()
    fill_with_sine(model, golden)
    with torch.no_grad():
        outputs = model(sine(2, 3, 32, 32, step=0.37))
    return outputs, golden["probe"]


def assert_probe(kind: str, final, exits, golden: dict) -> None:
    for head, ours in zip(("final", "mid1", "mid2", "mid3"), (final, *exits), strict=True):
        expected = torch.tensor(golden[f"{head}_{kind}"], dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=PROBE_BOUNDS[kind], atol=0)


def test_probe_logits(probe):
    outputs, golden = probe
    assert_probe("logits", outputs.logits, outputs.exit_logits, golden["logits"])


@pytest.mark.parametrize(("power", "sums"), [(1, "feature_sum_per_image"), (2, "feature_sumsq_per_image")])
def test_probe_features(probe, power, sums):
    outputs, golden = probe
    final = (outputs.feature**power).sum(dim=1)
    exits = [(feature**power).sum(dim=1) for feature in outputs.exit_features]
    assert_probe("feature", final, exits, golden[sums])


@pytest.mark.parametrize("blocks", [2, 3])
def test_fewer_blocks_have_the_golden_shapes(blocks):
    """Backbone and the exits that N blocks have; the published script also trains one more, on the final map."""
    golden = NETWORKS[f"ResNetBeMyOwnTeacher18_blocks{blocks}"]
    first_of_extra_exit = 60 + 17 * (blocks - 1) + 3
    extra_exit = range(first_of_extra_exit, first_of_extra_exit + 14)
    left_out = {*golden["unused_parameter_indices"], *extra_exit}
    expected = [shape for i, shape in enumerate(golden["parameter_shapes"]) if i not in left_out]
    model = build_model(flags("--BYOT", "--num_resnet_blocks", str(blocks)), 100)
    assert [list(p.shape) for p in all_parameters(model)] == expected
