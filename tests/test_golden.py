"""The evidence: golden numbers, computed by the published script or independently of it, against ours.

`tests/golden/` holds data only. A "head" 1, 2, 3 there is exit 1, 2, 3 here. Where the golden total holds a
cross-entropy and ours the KL, they differ by an entropy, which is added where they are compared.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from loss import build_objective
from main import parse_args
from models import MODELS, Outputs, build_model
from utils.engine import build_schedule
from utils.metrics import classification_metrics

GOLDEN = Path(__file__).parent / "golden"
LOSSES = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / "losses.npz").items()}
METRICS = dict(np.load(GOLDEN / "metrics.npz"))
NETWORKS = json.loads((GOLDEN / "models.json").read_text())
TENSORS = ("outputs", "mid1", "mid2", "mid3", "fea_final", "fea1", "fea2", "fea3")
# Relative to the largest entry: with the golden beta the features' gradients are tiny.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def flags(*words: str):
    return parse_args(["--device", "cpu", "--precision", "fp32", *words])


def golden_inputs(dtype) -> dict[str, torch.Tensor]:
    return {name: LOSSES[f"in_{name}"].clone().to(dtype).requires_grad_() for name in TENSORS}


def as_outputs(x: dict) -> Outputs:
    exits = ("mid1", "mid2", "mid3"), ("fea1", "fea2", "fea3")
    return Outputs(x["outputs"], x["fea_final"], *(tuple(x[n] for n in names) for names in exits))


def objective_with_past(words: list[str], dtype):
    """The objective of those flags; with PS-KD, told the golden bank as past and the golden alpha_t."""
    n, k = LOSSES["in_bank"].shape
    # alpha_T such that alpha_t = alpha_T (1 + 1) / 2 in the last of two epochs is the golden one
    objective = build_objective(flags(*words, "--alpha_T", "0.37", "--end_epoch", "2"), n, k).to(dtype)
    if "--PSKD" in words:
        objective.targets.memory.copy_(LOSSES["in_bank"])
    objective.set_epoch(1)
    return objective


def assert_close(ours, golden, dtype, of=None):
    scale = (golden if of is None else of).abs().max().clamp_min(1e-300)
    assert ((ours.double() - golden).abs().max() / scale).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", range(12))
def test_objective_value_and_all_gradients(case, dtype):
    on = dict(zip(("PSKD", "BYOT", "DML"), LOSSES["case_flags_PSKD_BYOT_DML"][case].tolist(), strict=True))
    words = [f"--{name}" for name, is_on in on.items() if is_on]
    as_published = on["DML"] and not LOSSES["case_dml_form"][case]
    words += ["--DML_as_published"] if as_published else []
    words += ["--BYOT_from_k_block", "1"]
    x = golden_inputs(dtype)
    objective = objective_with_past(words, dtype)
    loss, parts = objective(as_outputs(x), LOSSES["in_labels"], torch.arange(8))

    entropy = 0.0
    if on["BYOT"]:  # alpha tau^2 (cross-entropy - KL) for each of three exits, the teacher being the same
        entropy = 3 * 0.1 * 9 * (LOSSES["kd_value_T3"] - LOSSES["kd_true_kl_T3"])
    assert_close(loss.detach() + entropy, LOSSES["case_total"][case], dtype)
    assert_close(parts["ce"], LOSSES["case_ce_final"][case], dtype)
    byot = sum(value for name, value in parts.items() if name.startswith("byot"))
    assert_close(torch.as_tensor(byot + entropy), LOSSES["case_byot_part"][case], dtype, LOSSES["case_total"][case])
    if on["DML"]:
        assert_close(parts["dml"], LOSSES["case_dml_part"][case], dtype)
    assert torch.allclose(sum(parts.values()), loss.detach(), rtol=1e-6)

    loss.backward()
    for name in TENSORS:
        gradient = x[name].grad if x[name].grad is not None else torch.zeros_like(x[name])
        assert_close(gradient, LOSSES[f"case_grad_{name}"][case], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("pskd", [False, True], ids=["labels", "PSKD"])
def test_byot_from_block_k_from_golden_parts(k, pskd, dtype):
    """Every k: the golden single losses and gradients, put together by the equation."""
    words = ["--BYOT", "--BYOT_from_k_block", str(k), *(["--PSKD"] if pskd else [])]
    x = golden_inputs(dtype)
    loss, parts = objective_with_past(words, dtype)(as_outputs(x), LOSSES["in_labels"], torch.arange(8))
    y = LOSSES["soft_targets"][1] if pskd else LOSSES["in_onehot"]
    taught = range(k, 4)

    def cross_entropy(name):
        return -(y * LOSSES[f"in_{name}"].log_softmax(1)).sum(1).mean()

    hint = 1e-6 * sum(LOSSES[f"hint_value_{i}"] for i in taught)
    ce = 0.9 * (cross_entropy("outputs") + sum(cross_entropy(f"mid{i}") for i in taught))
    assert_close(parts["byot_hint"], hint, dtype)
    assert_close(parts["byot_ce"], ce, dtype)
    if k == 1:
        teacher = (LOSSES["in_outputs"] / 3).softmax(1)
        others = sum(
            (teacher * (teacher.log() - (LOSSES[f"in_mid{i}"] / 3).log_softmax(1))).sum(1).mean() for i in (2, 3)
        )
        assert_close(parts["byot_kl"], 0.1 * 9 * (LOSSES["kd_true_kl_T3"] + others), dtype)
    loss.backward()
    for i in range(1, 4):
        for name in (f"mid{i}", f"fea{i}"):
            if i < k:
                assert x[name].grad is None or not x[name].grad.any()
            else:  # golden case 2 or 6: BYOT alone, or with PS-KD
                case = _case(pskd, True, False)
                assert_close(x[name].grad, LOSSES[f"case_grad_{name}"][case], dtype)


def _case(*on: bool) -> int:
    """The golden case of these methods with DML's KL form, where it is on."""
    rows = LOSSES["case_flags_PSKD_BYOT_DML"].tolist()
    forms = LOSSES["case_dml_form"].tolist()
    return next(i for i, r in enumerate(rows) if r == [int(o) for o in on] and forms[i] == int(on[2]))


@pytest.mark.parametrize("tau", [1, 2, 3, 4])
def test_kd_value_and_gradient_at_temperature(tau):
    x = golden_inputs(torch.float64)
    words = ["--BYOT", "--temperature", str(tau), "--alpha", "1", "--beta", "0"]
    only_first = Outputs(x["outputs"], x["fea_final"], (x["mid1"],), (x["fea1"],))
    _, parts = objective_with_past(words, torch.float64)(only_first, LOSSES["in_labels"], torch.arange(8))
    assert_close(parts["byot_kl"], tau**2 * LOSSES[f"kd_true_kl_T{tau}"], torch.float64)
    loss, _ = objective_with_past(words, torch.float64)(only_first, LOSSES["in_labels"], torch.arange(8))
    # ce carries the final classifier's gradient alone, so what reaches mid1 is the KL's
    loss.backward()
    assert_close(x["mid1"].grad, tau**2 * LOSSES[f"kd_grad_mid1_T{tau}"], torch.float64)


def test_hint_on_signed_features():
    feature = LOSSES["hint_signed_fea"].clone().requires_grad_()
    logits = torch.zeros(8, 100, dtype=torch.float64)
    outputs = Outputs(logits, LOSSES["hint_signed_target"], (logits,), (feature,))
    objective = build_objective(flags("--BYOT", "--beta", "1"), 8, 100)
    loss, parts = objective(outputs, LOSSES["in_labels"], torch.arange(8))
    loss.backward()
    assert_close(parts["byot_hint"], LOSSES["hint_signed_value"], torch.float64)
    assert_close(feature.grad, LOSSES["hint_signed_grad"], torch.float64)
    assert LOSSES["hint_signed_value"] != LOSSES["hint_signed_plain_sum_sq"]


def test_dml_both_forms_and_gradient():
    x = golden_inputs(torch.float64)
    for words, value in ((["--DML"], "dml_symkl_value"), (["--DML", "--DML_as_published"], "dml_scripted_value")):
        _, parts = objective_with_past(words, torch.float64)(as_outputs(x), LOSSES["in_labels"], torch.arange(8))
        assert_close(parts["dml"], LOSSES[value], torch.float64)
    loss, _ = objective_with_past(["--DML"], torch.float64)(as_outputs(x), LOSSES["in_labels"], torch.arange(8))
    loss.backward()
    for name in ("fea_final", "fea1", "fea2", "fea3"):
        assert_close(x[name].grad, LOSSES[f"dml_symkl_grad_{name}"], torch.float64)


def test_progressive_targets_and_memory():
    labels, index = LOSSES["in_labels"], torch.arange(8)
    for alpha, golden in zip(LOSSES["soft_alphas"].tolist(), LOSSES["soft_targets"], strict=True):
        objective = build_objective(flags("--PSKD", "--alpha_T", str(alpha), "--end_epoch", "2"), 8, 100).double()
        objective.targets.memory.copy_(LOSSES["in_bank"])
        objective.set_epoch(1)
        assert_close(objective.targets(labels, index), golden, torch.float64)
    objective.set_epoch(0)
    golden = LOSSES["soft_targets_epoch0_alpha0.37"]
    assert torch.equal(objective.targets(labels, index), golden)
    objective(Outputs(LOSSES["in_outputs"], LOSSES["in_fea_final"]), labels, index)
    assert_close(objective.targets.memory, LOSSES["bank_after_step"], torch.float64)


@pytest.mark.parametrize("epochs", [300, 3])
def test_schedules(epochs):
    args = flags("--PSKD", "--end_epoch", str(epochs))
    objective = build_objective(args, 1, 2)
    for t in range(epochs):
        objective.set_epoch(t)
        assert objective.alpha_t == pytest.approx(LOSSES[f"schedule_alpha_t_end{epochs}"][t].item(), rel=1e-12)
        assert build_schedule(args)(t) == pytest.approx(
            LOSSES[f"schedule_lr_end{epochs}"][t].item(), rel=1e-12
        )


@pytest.mark.parametrize("name", ["typical", "ties"])
def test_metrics(name):
    logits, labels = (torch.from_numpy(METRICS[f"{name}_{k}"]) for k in ("logits", "labels"))
    ours = classification_metrics(logits, labels)
    for key, golden, tolerance in (
        ("top1_error", "top1_error", 1e-12),
        ("top5_error", "top5_error", 1e-12),
        ("nll", "nll_float64", 1e-12),
        ("ece", "ece", 1e-7),  # the golden confidences are float32
        ("aurc", "aurc_tie_expected", 1e-10),
    ):
        assert ours[key] == pytest.approx(float(METRICS[f"{name}_{golden}"]), rel=tolerance), key
    assert ours["aurc"] - ours["eaurc"] == pytest.approx(float(METRICS[f"{name}_aurc_optimum"]), rel=1e-10)
    assert METRICS[f"{name}_aurc_tie_min"] <= ours["aurc"] + 1e-9 <= METRICS[f"{name}_aurc_tie_max"] + 2e-9


def golden_entry(name: str) -> dict:
    """ResNet-18 and -50 stand in the golden file under the published script's names."""
    return NETWORKS[name if name in NETWORKS else f"ResNetBeMyOwnTeacher{name[-2:]}"]


@pytest.mark.parametrize("name", list(MODELS))
def test_parameter_counts(name):
    golden = golden_entry(name)
    whole = golden.get("parameters_without_unused", golden["total_parameters"])
    assert count(name, ["--BYOT"]) == whole
    assert count(name, ["--PSKD"]) == golden["backbone_plus_final_fc_parameters"]
    more = golden["total_parameters_200_classes"] - golden["total_parameters"]
    assert count(name, ["--BYOT"], 200) == whole + more


def count(name: str, words: list[str], num_classes: int = 100) -> int:
    with torch.device("meta"):
        model = build_model(flags("--classifier_type", name, *words), num_classes)
    return sum(p.numel() for p in model.parameters())


def golden_order(model, golden: dict) -> list[torch.nn.Parameter]:
    """Our parameters in the golden order, which is backbone, exits, final classifier; None for those that we do
    not build. Bottleneck exits stand one after the other; of attention exits, all bodies, all attentions, all
    classifiers."""
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
    golden = golden_entry(name)
    model = build_model(flags("--classifier_type", name, "--BYOT"), 100).double().train()
    with torch.no_grad():
        for i, p in enumerate(golden_order(model, golden)):
            if p is None:
                continue
            assert list(p.shape) == golden["parameter_shapes"][i], i
            v = torch.sin(0.1 * (i + 1) + 0.7 * torch.arange(p.numel(), dtype=torch.float64)).view(p.shape)
            is_scale = p.ndim == 1 and any(
                p is m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)
            )
            if p.ndim > 1:
                v = v * (3 / p[0].numel()) ** 0.5
            p.copy_(1 + 0.1 * v if is_scale else v if p.ndim > 1 else 0.1 * v)
        images = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
        outputs = model(images)
    heads = {"final": (outputs.logits, outputs.feature)}
    heads |= {f"mid{i + 1}": (outputs.exit_logits[i], outputs.exit_features[i]) for i in range(3)}
    for head, (logits, feature) in heads.items():
        close = {"rtol": 1e-6, "atol": 1e-6}
        probe = golden["probe"]
        assert torch.allclose(logits, torch.tensor(probe["logits"][f"{head}_logits"]).double(), **close), head
        for power, key in ((1, "feature_sum_per_image"), (2, "feature_sumsq_per_image")):
            golden_sum = torch.tensor(probe[key][f"{head}_feature"], dtype=torch.float64)
            assert torch.allclose((feature**power).sum(1), golden_sum, **close), head


@pytest.mark.parametrize("blocks", [2, 3])
def test_fewer_blocks_have_the_golden_shapes(blocks):
    """Backbone and the exits that N blocks have; the published script also trains one more, on the final map."""
    golden = [s for i, s in enumerate(NETWORKS[f"ResNetBeMyOwnTeacher18_blocks{blocks}"]["parameter_shapes"])]
    unused = set(NETWORKS[f"ResNetBeMyOwnTeacher18_blocks{blocks}"]["unused_parameter_indices"])
    first_of_extra_exit = 60 + 17 * (blocks - 1) + 3
    golden = [
        s for i, s in enumerate(golden) if i not in unused and not first_of_extra_exit <= i < first_of_extra_exit + 14
    ]
    model = build_model(flags("--BYOT", "--num_resnet_blocks", str(blocks)), 100)
    ours = [p for n, p in model.named_parameters() if not n.startswith(("exits.", "fc."))]
    ours += [p for e in model.exits for p in e.parameters()] + list(model.fc.parameters())
    assert [list(p.shape) for p in ours] == golden
