"""Golden numbers, computed by the published script or independently of it, against ours.

`golden/README.md` says what they are. "Head" 1, 2, 3 there is exit 1, 2, 3 here. Where the golden total holds a
cross-entropy and ours the KL, they differ by an entropy, which is added where they are compared.
"""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from loss import build_objective
from main import parse_args
from models import MODELS, Outputs, build_model
from utils.engine import build_schedule
from utils.metrics import classification_metrics

GOLDEN = ROOT / "tests" / "golden"
LOSSES = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / "losses.npz").items()}
METRICS = dict(np.load(GOLDEN / "metrics.npz"))
NETWORKS = json.loads((GOLDEN / "models.json").read_text())
TENSORS = ("outputs", "mid1", "mid2", "mid3", "fea_final", "fea1", "fea2", "fea3")
# Relative to the largest entry: with the golden beta the features' gradients are tiny.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PROBE_TOLERANCE = 1.8e-7  # the golden outputs of complete networks are kept in float32


def flags(*words: str):
    return parse_args(["--device", "cpu", "--precision", "fp32", *words])


def golden_inputs(dtype) -> dict[str, torch.Tensor]:
    return {name: LOSSES[f"in_{name}"].clone().to(dtype).requires_grad_() for name in TENSORS}


def as_outputs(x: dict) -> Outputs:
    return Outputs(x["outputs"], x["fea_final"], (x["mid1"], x["mid2"], x["mid3"]), (x["fea1"], x["fea2"], x["fea3"]))


def objective_with_past(words: list[str], dtype):
    """The objective of those flags; with PS-KD, told the golden bank as past and the golden alpha_t."""
    # alpha_T such that alpha_t = alpha_T (1 + 1) / 2 in the last of two epochs is the golden one
    objective = build_objective(flags(*words, "--alpha_T", "0.37", "--end_epoch", "2"), 8, 100).to(dtype)
    if "--PSKD" in words:
        objective.targets.memory.copy_(LOSSES["in_bank"])
    objective.set_epoch(1)
    return objective


def assert_close(ours, golden, dtype=torch.float64, relative_to=None):
    scale = (golden if relative_to is None else relative_to).abs().max().clamp_min(1e-300)
    assert ((ours.double() - golden).abs().max() / scale).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", range(12))
def test_objective_value_and_all_gradients(case, dtype):
    on = dict(zip(("PSKD", "BYOT", "DML"), LOSSES["case_flags_PSKD_BYOT_DML"][case].tolist(), strict=True))
    words = [f"--{name}" for name, is_on in on.items() if is_on]
    as_published = on["DML"] and not LOSSES["case_dml_form"][case]
    words += ["--DML_as_published"] if as_published else []
    x = golden_inputs(dtype)
    objective = objective_with_past(words, dtype)
    loss, parts = objective(as_outputs(x), LOSSES["in_labels"], torch.arange(8))

    entropy = 0.0
    if on["BYOT"]:  # alpha tau^2 (cross-entropy - KL) for each of three exits, the teacher being the same
        entropy = 3 * 0.1 * 9 * (LOSSES["kd_value_T3"] - LOSSES["kd_true_kl_T3"])
    assert_close(loss.detach() + entropy, LOSSES["case_total"][case], dtype)
    assert_close(parts["ce"], LOSSES["case_ce_final"][case], dtype)
    byot = torch.as_tensor(sum(value for name, value in parts.items() if name.startswith("byot")))
    assert_close(byot + entropy, LOSSES["case_byot_part"][case], dtype, LOSSES["case_total"][case])
    if on["DML"]:
        assert_close(parts["dml"], LOSSES["case_dml_part"][case], dtype)

    loss.backward()
    for name in TENSORS:
        gradient = x[name].grad if x[name].grad is not None else torch.zeros_like(x[name])
        assert_close(gradient, LOSSES[f"case_grad_{name}"][case], dtype)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_byot_from_block_k(k):
    """Hint and gradients of the exits from k on are those of the golden case that teaches all exits."""
    byot_only = LOSSES["case_flags_PSKD_BYOT_DML"].tolist().index([0, 1, 0])
    x = golden_inputs(torch.float64)
    objective = objective_with_past(["--BYOT", "--BYOT_from_k_block", str(k)], torch.float64)
    loss, parts = objective(as_outputs(x), LOSSES["in_labels"], torch.arange(8))
    assert_close(parts["byot_hint"], 1e-6 * sum(LOSSES[f"hint_value_{i}"] for i in range(k, 4)))
    loss.backward()
    for i in range(1, 4):
        for name in (f"mid{i}", f"fea{i}"):
            if i < k:
                assert x[name].grad is None
            else:
                assert_close(x[name].grad, LOSSES[f"case_grad_{name}"][byot_only])


@pytest.mark.parametrize("tau", [1, 2, 3, 4])
def test_kd_value_and_gradient_at_temperature(tau):
    x = golden_inputs(torch.float64)
    objective = objective_with_past(["--BYOT", "--temperature", str(tau), "--alpha", "1", "--beta", "0"], torch.float64)
    first_exit = Outputs(x["outputs"], x["fea_final"], (x["mid1"],), (x["fea1"],))
    loss, parts = objective(first_exit, LOSSES["in_labels"], torch.arange(8))
    assert_close(parts["byot_kl"], tau**2 * LOSSES[f"kd_true_kl_T{tau}"])
    loss.backward()  # with alpha = 1, what reaches mid1 is the KL's
    assert_close(x["mid1"].grad, tau**2 * LOSSES[f"kd_grad_mid1_T{tau}"])


def test_hint_on_signed_features():
    feature = LOSSES["hint_signed_fea"].clone().requires_grad_()
    logits = torch.zeros(8, 100, dtype=torch.float64)
    outputs = Outputs(logits, LOSSES["hint_signed_target"], (logits,), (feature,))
    objective = build_objective(flags("--BYOT", "--beta", "1"), 8, 100)
    loss, parts = objective(outputs, LOSSES["in_labels"], torch.arange(8))
    loss.backward()
    assert_close(parts["byot_hint"], LOSSES["hint_signed_value"])
    assert_close(feature.grad, LOSSES["hint_signed_grad"])


def test_progressive_targets_and_memory():
    labels, index, outputs = LOSSES["in_labels"], torch.arange(8), Outputs(LOSSES["in_outputs"], feature=None)
    for alpha, golden in zip(LOSSES["soft_alphas"].tolist(), LOSSES["soft_targets"], strict=True):
        objective = build_objective(flags("--PSKD", "--alpha_T", str(alpha), "--end_epoch", "2"), 8, 100).double()
        objective.targets.memory.copy_(LOSSES["in_bank"])
        objective.set_epoch(1)
        assert_close(objective.targets(outputs, labels, index), golden)
        assert_close(objective.targets.memory, LOSSES["bank_after_step"])
    objective.set_epoch(0)
    assert torch.equal(objective.targets(outputs, labels, index), LOSSES["soft_targets_epoch0_alpha0.37"])


@pytest.mark.parametrize("epochs", [300, 3])
def test_schedules(epochs):
    args = flags("--PSKD", "--end_epoch", str(epochs))
    objective, schedule = build_objective(args, 1, 2), build_schedule(args)
    for t in range(epochs):
        objective.set_epoch(t)
        assert objective.alpha_t == pytest.approx(LOSSES[f"schedule_alpha_t_end{epochs}"][t].item(), rel=1e-12)
        assert schedule(t) == pytest.approx(LOSSES[f"schedule_lr_end{epochs}"][t].item(), rel=1e-12)


@pytest.mark.parametrize("name", ["typical", "ties"])
def test_metrics(name):
    logits, labels = (torch.from_numpy(METRICS[f"{name}_{k}"]) for k in ("logits", "labels"))
    ours = classification_metrics(logits, labels)
    golden = {key: METRICS[f"{name}_{key}"].item() for key in ("top1_error", "top5_error")}
    golden |= {"nll": METRICS[f"{name}_nll_float64"].item(), "aurc": METRICS[f"{name}_aurc_tie_expected"].item()}
    assert {key: ours[key] for key in golden} == pytest.approx(golden, rel=1e-12)
    assert ours["ece"] == pytest.approx(METRICS[f"{name}_ece"].item(), rel=1e-7)  # its confidences are float32
    assert ours["aurc"] - ours["eaurc"] == pytest.approx(METRICS[f"{name}_aurc_optimum"].item(), rel=1e-12)


def golden_entry(name: str) -> dict:
    """ResNet-18 and -50 stand in the golden file under the published script's names."""
    return NETWORKS[name if name in NETWORKS else f"ResNetBeMyOwnTeacher{name[-2:]}"]


@pytest.mark.parametrize("name", list(MODELS))
def test_parameter_counts(name):
    golden = golden_entry(name)
    total = golden.get("parameters_without_unused", golden["total_parameters"])
    assert count(name, ["--BYOT"]) == total
    assert count(name, ["--PSKD"]) == golden["backbone_plus_final_fc_parameters"]
    more = golden["total_parameters_200_classes"] - golden["total_parameters"]
    assert count(name, ["--BYOT"], 200) == total + more


def count(name: str, words: list[str], num_classes: int = 100) -> int:
    with torch.device("meta"):
        model = build_model(flags("--classifier_type", name, *words), num_classes)
    return sum(p.numel() for p in model.parameters())


def golden_order(model, golden: dict) -> list[torch.nn.Parameter]:
    """Our parameters in the golden order: backbone, exits, final classifier; None for those that we do not build.
    Bottleneck exits come one after the other; of attention exits, all bodies, all attentions, all classifiers."""
    backbone = [p for n, p in model.named_parameters() if not n.startswith(("exits.", "fc."))]
    if hasattr(model.exits[0], "attention"):
        kinds = ("body", "attention", "fc")
        exits = [p for kind in kinds for e in model.exits for p in getattr(e, kind).parameters()]
    else:
        exits = [p for e in model.exits for p in e.parameters()]
    ours = iter([*backbone, *exits, *model.fc.parameters()])
    unused = set(golden["unused_parameter_indices"])
    ordered = [None if i in unused else next(ours) for i in range(len(golden["parameter_shapes"]))]
    assert next(ours, None) is None
    return ordered


@pytest.mark.parametrize("name", [n for n in MODELS if "probe" in golden_entry(n)])
def test_forward_probe(name):
    """Logits and features of all classifiers, in training mode, with parameters filled by a sine."""
    golden = golden_entry(name)
    model = build_model(flags("--classifier_type", name, "--BYOT"), 100).double().train()
    scales = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    with torch.no_grad():
        for i, p in enumerate(golden_order(model, golden)):
            if p is None:
                continue
            assert list(p.shape) == golden["parameter_shapes"][i], i
            v = torch.sin(0.1 * (i + 1) + 0.7 * torch.arange(p.numel()).double()).view(p.shape)
            p.copy_(v * (3 / p[0].numel()) ** 0.5 if p.ndim > 1 else (id(p) in scales) + 0.1 * v)
        images = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32).double()).view(2, 3, 32, 32)
        outputs = model(images)
    probe, heads = golden["probe"], ("final", "mid1", "mid2", "mid3")
    logits, features = (outputs.logits, *outputs.exit_logits), (outputs.feature, *outputs.exit_features)
    ours = {"logits": {f"{head}_logits": value for head, value in zip(heads, logits, strict=True)}}
    for power, key in ((1, "feature_sum_per_image"), (2, "feature_sumsq_per_image")):
        ours[key] = {f"{head}_feature": (value**power).sum(1) for head, value in zip(heads, features, strict=True)}
    for key, values in ours.items():
        for name, value in values.items():
            torch.testing.assert_close(
                value, torch.tensor(probe[key][name], dtype=value.dtype), rtol=PROBE_TOLERANCE, atol=0
            )


@pytest.mark.parametrize("blocks", [2, 3])
def test_fewer_blocks_have_the_golden_shapes(blocks):
    """Backbone and the exits that N blocks have; the published script also trains one more, on the final map."""
    golden = NETWORKS[f"ResNetBeMyOwnTeacher18_blocks{blocks}"]
    first_of_extra_exit = 60 + 17 * (blocks - 1) + 3
    left_out = {*golden["unused_parameter_indices"], *range(first_of_extra_exit, first_of_extra_exit + 14)}
    expected = [shape for i, shape in enumerate(golden["parameter_shapes"]) if i not in left_out]
    model = build_model(flags("--BYOT", "--num_resnet_blocks", str(blocks)), 100)
    ours = [p for n, p in model.named_parameters() if not n.startswith(("exits.", "fc."))]
    ours += [p for e in model.exits for p in e.parameters()] + list(model.fc.parameters())
    assert [list(p.shape) for p in ours] == expected
