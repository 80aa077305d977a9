"""The networks: shapes, initial weights, precision, and torchvision's residual networks beneath."""

import functools
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from loss import build_objective
from main import parse_args
from models import ALIASES, MODELS, build_model, min_width

BOTTLENECK_EXITS = ("resnet18", "resnet50")
TORCHVISION = {"wideresnet50": "wide_resnet50_2", "wideresnet101": "wide_resnet101_2"}  # where names differ


def flags(*words: str):
    return parse_args(["--device", "cpu", "--precision", "fp32", *words])


def build(name: str, *words: str, width: int = 8, num_classes: int = 10):
    width = max(width, min_width(name, 4, True))  # 16 for resnext50_32x4d
    return build_model(flags("--classifier_type", name, "--width", str(width), *words), num_classes)


@functools.cache
def with_exits(name: str):
    return build(name, "--BYOT")


def images(size: int = 16, num: int = 2):
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def feature_dim(name: str, width: int, num_blocks: int = 4) -> int:
    return width * 2 ** (num_blocks - 1) * MODELS[name].block.expansion


@pytest.mark.parametrize("size", [16, 24, 32, 40, 64])
@pytest.mark.parametrize("name", MODELS)
def test_shapes(name, size):
    d = feature_dim(name, 16 if name == "resnext50_32x4d" else 8)
    with torch.no_grad():
        outputs = with_exits(name).train()(images(size))
    assert outputs.logits.shape == (2, 10) and outputs.feature.shape == (2, d)
    assert isinstance(outputs.exit_logits, tuple) and isinstance(outputs.exit_features, tuple)
    assert [t.shape for t in outputs.exit_logits] == [(2, 10)] * 3
    assert [t.shape for t in outputs.exit_features] == [(2, d)] * 3
    for t in (*outputs[:2], *outputs.exit_logits, *outputs.exit_features):
        assert t.dtype == torch.float32 and t.isfinite().all()


@pytest.mark.parametrize("methods, num_exits", [([], 0), (["--PSKD"], 0), (["--BYOT"], 3), (["--DML"], 3)])
def test_exits_are_there_for_byot_and_dml_alone(methods, num_exits):
    model = build("resnet18", *methods)
    assert len(model.exits) == num_exits
    outputs = model(images())
    assert len(outputs.exit_logits) == len(outputs.exit_features) == num_exits
    assert num_exits or outputs[2:] == ((), ())


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_have_an_exit_each_but_the_last(name, num_blocks):
    d = feature_dim(name, 16 if name == "resnext50_32x4d" else 8, num_blocks)
    for methods in [["--BYOT"], []] if num_blocks > 1 else [[]]:
        model = build(name, "--num_resnet_blocks", str(num_blocks), *methods).eval()
        assert hasattr(model, f"layer{num_blocks}") and not hasattr(model, f"layer{num_blocks + 1}")
        with torch.no_grad():
            outputs = model(images())
        assert outputs.logits.shape == (2, 10) and outputs.feature.shape == (2, d)
        assert [t.shape for t in outputs.exit_features] == [(2, d)] * (num_blocks - 1 if methods else 0)


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_exits_of_each_kind(name, num_blocks):
    """Bottleneck exits have kernels 8, 4, 2 whatever B; attention exits shrink the map in B - i steps."""
    model = build(name, "--DML", "--num_resnet_blocks", str(num_blocks))
    for i, exit_ in enumerate(model.exits, start=1):
        convs = [m for m in exit_.body.modules() if isinstance(m, nn.Conv2d)]
        if name in BOTTLENECK_EXITS:
            assert [m.kernel_size for m in convs] == [(1, 1), (2 ** (4 - i),) * 2, (1, 1)]
        else:
            assert len(exit_.body) == num_blocks - i
            assert sum(m.stride == (2, 2) for m in convs) == num_blocks - i


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_exit_i_sees_the_first_i_stages(name):
    model = with_exits(name).train()
    outputs = model(images())
    for i, logits in enumerate((*outputs.exit_logits, outputs.logits), start=1):
        stages = [next(getattr(model, f"layer{s}").parameters()) for s in range(1, 5)]
        found = torch.autograd.grad(logits.square().sum(), stages, allow_unused=True, retain_graph=True)
        assert [g is not None for g in found] == [s <= i for s in range(1, 5)]


def test_aliases_are_the_same_networks():
    for alias, name in ALIASES.items():
        ours, theirs = (build_model(flags("--classifier_type", n, "--width", "8"), 10) for n in (name, alias))
        assert same(ours.state_dict(), theirs.state_dict())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_depend_on_seed_and_architecture_alone(name):
    plain = build(name).state_dict()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for methods in (["--BYOT"], ["--DML", "--PSKD"]):
        model = build(name, *methods)
        backbone = {n: t for n, t in model.state_dict().items() if not n.startswith("exits.")}
        assert same(backbone, plain)
    assert torch.equal(torch.get_rng_state(), state)
    other = build(name, "--seed", "5").state_dict()
    assert not torch.equal(other["conv1.weight"], plain["conv1.weight"])
    assert not torch.equal(other["fc.weight"], plain["fc.weight"])


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_exits_start_from_the_same_weights_for_the_same_seed(name):
    a, b, other = (build(name, "--BYOT", "--seed", seed).state_dict() for seed in ("1", "1", "2"))
    assert same(a, b)
    drawn = [n for n, t in a.items() if n.startswith("exits.") and (t.ndim > 1 or ".fc." in n)]
    assert len(drawn) > 3 * 3 and not any(torch.equal(a[n], other[n]) for n in drawn)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_initial_weights_are_kaiming_normal_by_fan_out(name):
    """And PyTorch's own elsewhere, residual branches included, which do not start at zero."""
    model = build(name, "--BYOT", width=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            w = module.weight.detach()
            std = sqrt(2 / (w.shape[0] * w.shape[2] * w.shape[3]))
            # Sampling errors: std / sqrt(2 n) of the deviation, std / sqrt(n) of the mean.
            assert abs(w.std().item() / std - 1) < 5 / sqrt(2 * w.numel())
            assert abs(w.mean().item() / std) < 5 / sqrt(w.numel())
            assert w.abs().max() < 6.5 * std
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, nn.Linear):
            bound = 1 / sqrt(module.in_features)
            for p in (module.weight, module.bias):
                assert p.any() and p.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / sqrt(3), rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_float32_under_bf16_autocast(name):
    model = with_exits(name).eval()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(images())
        in_float32 = model(images())
    for t in (*outputs[:2], *outputs.exit_logits, *outputs.exit_features):
        assert t.dtype == torch.float32
    assert not torch.equal(outputs.feature, in_float32.feature)  # the convolutions were in bf16
    pairs = [(model.fc, outputs.feature, outputs.logits)]
    pairs += zip([e.fc for e in model.exits], outputs.exit_features, outputs.exit_logits, strict=True)
    for fc, feature, logits in pairs:  # and classifiers were not: a product in bf16 is 1,000 times as far off
        torch.testing.assert_close(logits, F.linear(feature, fc.weight, fc.bias), rtol=1e-5, atol=1e-5)


def test_a_network_in_float64_stays_there():
    outputs = build("resnet34", "--BYOT").double()(images().double())
    assert {t.dtype for t in (*outputs[:2], *outputs.exit_logits, *outputs.exit_features)} == {torch.float64}


@pytest.mark.parametrize("name", MODELS)
def test_backbone_has_torchvisions_names_and_shapes(name):
    with torch.device("meta"):
        ours = build_model(flags("--classifier_type", name, "--BYOT"), 100).state_dict()
        theirs = getattr(torchvision.models, TORCHVISION.get(name, name))(num_classes=100).state_dict()
    ours = {n: tuple(t.shape) for n, t in ours.items() if not n.startswith("exits.")}
    theirs = {n: tuple(t.shape) for n, t in theirs.items()}
    assert ours.pop("conv1.weight") == (64, 3, 3, 3) and theirs.pop("conv1.weight") == (64, 3, 7, 7)
    assert ours == theirs


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_backbone_computes_what_torchvisions_does(name):
    """With the CIFAR stem in place of its own: 3 x 3, stride 1, no pooling."""
    ours = build(name, width=64).eval()
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=10).eval()
        theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()).logits, theirs(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("exits", [False, True], ids=["plain", "exits"])
@pytest.mark.parametrize("name", MODELS)
def test_min_width_is_the_smallest_that_leaves_every_layer_a_channel(name, exits):
    for num_blocks in (2, 3, 4) if exits else (1, 4):
        words = ["--num_resnet_blocks", str(num_blocks), *(["--BYOT"] if exits else [])]
        args = flags("--classifier_type", name, *words)
        args.width = min_width(name, num_blocks, exits)
        model = build_model(args, 10).train()
        assert all(p.numel() for p in model.parameters())
        with torch.no_grad():
            assert model(images()).logits.isfinite().all()
        args.width -= 1
        try:
            narrower = build_model(args, 10)
        except ValueError:  # an attention exit's depthwise convolution: no channels, so no groups
            continue
        assert not all(p.numel() for p in narrower.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_with_byot_every_parameter_gets_a_gradient(name):
    model = build(name, "--BYOT").train()
    objective = build_objective(flags("--classifier_type", name, "--BYOT"), 4, 10)
    loss, _ = objective(model(images(32, 4)), torch.arange(4), torch.arange(4))
    loss.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter_name
        assert p.grad.any(), parameter_name


def test_with_dml_the_exits_classifiers_get_none():
    model = build("resnet34", "--DML").train()
    objective = build_objective(flags("--classifier_type", "resnet34", "--DML"), 4, 10)
    loss, _ = objective(model(images(16, 4)), torch.arange(4), torch.arange(4))
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {f"exits.{i}.fc.{kind}" for i in range(3) for kind in ("weight", "bias")}


@pytest.mark.parametrize("stride", [1, 2])
def test_narrow_shortcuts_are_the_strided_convolution(stride):
    """Below 16 channels the shortcut slices first, around a fault of oneDNN: same numbers, same gradients."""
    block = build_model(flags("--width", "8"), 10).layer2[0].downsample[0]
    assert type(block) is not torch.nn.Conv2d and list(block.state_dict()) == ["weight"]
    x = torch.randn(2, 8, 10, 10, dtype=torch.float64, requires_grad=True)
    block = block.double()
    block.stride = (stride, stride)
    expected = torch.nn.functional.conv2d(x, block.weight, stride=stride)
    assert torch.allclose(block(x), expected)
    ours = torch.autograd.grad(block(x).square().sum(), [x, block.weight])
    theirs = torch.autograd.grad(expected.square().sum(), [x, block.weight])
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    wide = build_model(flags("--width", "16"), 10).layer2[0].downsample[0]
    assert type(wide) is torch.nn.Conv2d
