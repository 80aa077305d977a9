"""The networks' parameters and exits, early exit against a plain loop, and load_run."""

import json
from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import data
import main
from data import synthetic
from models import ALIASES, MODELS, build_model, load_run
from models.exits import PatchConv2d
from utils.checkpoint import load_checkpoint, write_checkpoint
from utils.errors import UserError

TORCHVISION = {"wideresnet50": "wide_resnet50_2", "wideresnet101": "wide_resnet101_2"}  # where names differ
EVERY_NETWORK = pytest.mark.parametrize("name", MODELS)
EACH_KIND_OF_EXIT = pytest.mark.parametrize("name", ["resnet18", "resnet34"])  # bottleneck, attention


def build(name, *words, width=8, num_classes=10):
    width = max(width, 16 if name == "resnext50_32x4d" else 1)
    words = ["--classifier_type", name, "--width", str(width), "--device", "cpu", "--precision", "fp32", *words]
    return build_model(main.parse_args(words), num_classes)


def images(size=16, num=2):
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def same(a: dict, b: dict):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@EVERY_NETWORK
def test_parameters_have_torchvisions_names_and_shapes(name):
    with torch.device("meta"):
        ours = build(name, "--BYOT", width=64, num_classes=100).state_dict()
        theirs = getattr(torchvision.models, TORCHVISION.get(name, name))(num_classes=100).state_dict()
    shapes = {n: tuple(t.shape) for n, t in ours.items() if not n.startswith("exits.")}
    assert shapes == {n: tuple(t.shape) for n, t in theirs.items()} | {"conv1.weight": (64, 3, 3, 3)}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d"])  # each block with each exit
def test_every_block_but_the_last_has_an_exit_and_outputs_are_float32(name):
    for num_blocks, method in ((1, "--PSKD"), (2, "--BYOT"), (3, "--DML"), (4, "--BYOT"), (4, "--PSKD")):
        model = build(name, "--num_resnet_blocks", str(num_blocks), method)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(images(64 if num_blocks == 4 else 24))
        features, logits = (outputs.feature, *outputs.exit_features), (outputs.logits, *outputs.exit_logits)
        assert len(logits) == (1 if method == "--PSKD" else num_blocks)
        for owner, feature, got in zip((model, *model.exits), features, logits, strict=True):
            assert feature.shape == (2, model.fc.in_features) and got.shape == (2, 10)
            assert feature.dtype == got.dtype == torch.float32  # and the classifier's product is not bf16's, 1e-2 off
            torch.testing.assert_close(got, F.linear(feature, owner.fc.weight, owner.fc.bias), rtol=1e-5, atol=1e-5)
        sizes = [[m.kernel_size[0] for m in e.body.modules() if isinstance(m, nn.Conv2d)] for e in model.exits]
        if name in ("resnet18", "resnet50"):  # 8, 4, 2 whatever the number of blocks
            assert sizes == [[1, 2 ** (4 - i), 1] for i in range(1, len(logits))]
        else:
            assert sizes == [[3, 1, 3, 1] * (num_blocks - i) for i in range(1, len(logits))]


@EVERY_NETWORK
def test_initial_weights_depend_on_seed_and_architecture_only(name):
    state = torch.get_rng_state()
    lines = ("", "--seed 5", "--BYOT", "--BYOT", "--DML --PSKD")
    plain, other, byot, again, dml = (build(name, *words.split()).state_dict() for words in lines)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(byot, again) and same(byot, dml)
    assert same({n: t for n, t in byot.items() if not n.startswith("exits.")}, plain)
    assert not any(torch.equal(plain[n], other[n]) for n in ("conv1.weight", "layer4.0.conv2.weight", "fc.weight"))
    assert all((t == 1).all() for n, t in plain.items() if "bn" in n and n.endswith("weight"))  # residuals' last too
    for n, w in byot.items():  # Kaiming-normal by fan-out, within five sampling errors
        if w.ndim == 4:
            std = sqrt(2 / (w.shape[0] * w.shape[2] * w.shape[3]))
            assert abs(w.std().item() / std - 1) < 5 / sqrt(2 * w.numel()), n
    assert all(same(build(alias).state_dict(), plain) for alias, target in ALIASES.items() if target == name)


@EVERY_NETWORK
def test_narrowest_width_leaves_every_layer_a_channel_and_less_is_refused(name):
    narrowest = {"resnext50_32x4d": 16, "resnext101_32x8d": 8}.get(name, 1)
    for words in ("--num_resnet_blocks 1", "--num_resnet_blocks 2 --BYOT", "--BYOT"):
        model = build(name, *words.split(), width=narrowest)
        assert all(p.numel() for p in model.parameters()) and model(images()).logits.isfinite().all()
    with pytest.raises(SystemExit):
        main.parse_args(["--device", "cpu", "--classifier_type", name, "--width", str(narrowest - 1)])


def test_narrow_shortcuts_are_the_strided_convolution():
    """Below 16 channels the shortcut slices first, because of a fault of oneDNN: same numbers, same gradients."""
    conv, x = build("resnet18").layer2[0].downsample[0].double(), images(10, 16).double().view(6, 8, 10, 10)
    assert type(conv) is not nn.Conv2d and type(build("resnet18", width=16).layer2[0].downsample[0]) is nn.Conv2d
    results = conv(x.requires_grad_()), F.conv2d(x, conv.weight, stride=2)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), [x, conv.weight]) for y in results))


@pytest.mark.parametrize("size", [(8, 16), (9, 15), (4, 7)])  # without and with a remainder
@pytest.mark.parametrize("kernel", [2, 4])
def test_patch_convolutions_are_the_strided_convolution(kernel, size):
    torch.manual_seed(0)
    conv, x = PatchConv2d(3, 5, kernel, kernel).double(), torch.randn(2, 3, *size).double().requires_grad_()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        conv.to(memory_format=memory_format)
        results = conv(x.contiguous(memory_format=memory_format)), F.conv2d(x, conv.weight, conv.bias, kernel)
        torch.testing.assert_close(*results)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), [x, conv.weight, conv.bias]) for y in results)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv.float()(x.float()).dtype == torch.bfloat16


@EACH_KIND_OF_EXIT
@pytest.mark.parametrize("num, bf16", [(1, False), (1, True), (7, False), (7, True)])
def test_predict_early_at_extreme_thresholds_equals_forward_to_the_bit(name, num, bf16):
    model, batch = build(name, "--BYOT").eval(), images(num=num)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        outputs = model(batch)
        for threshold, number, expected in ((0, 1, outputs.exit_logits[0]), (1.01, 4, outputs.logits)):
            logits, decided_by = model.predict_early(batch, threshold)
            assert logits.dtype == torch.float32 and torch.equal(logits, expected)
            assert decided_by.dtype == torch.int64 and decided_by.tolist() == [number] * num
        assert build(name).eval().predict_early(batch, 0)[1].tolist() == [4] * num  # a network without exits


@EACH_KIND_OF_EXIT
@pytest.mark.parametrize("temperatures", [[1.0, 1.0, 1.0, 1.0], [3.0, None, 0.5, 9.0], [None, None, None, 1.0]])
def test_predict_early_equals_a_loop_over_images_and_computes_nothing_more(name, temperatures):
    model, batch = build(name, "--BYOT").double().eval(), images(num=40).double()  # rounding decides nothing
    model.temperatures = temperatures
    with torch.no_grad():
        outputs = model(batch)
        for owner, logits in zip((*model.exits, model), (*outputs.exit_logits, outputs.logits), strict=True):
            owner.fc.bias -= logits.mean(dim=0)  # spreads the confidences between 0 and 1
            for p in owner.fc.parameters():
                p *= 2 / (logits - logits.mean(dim=0)).std()
        outputs = model(batch)
    computed, seen = {}, set()
    for i, module in enumerate((*model.exits, *model.stages)):
        module.register_forward_pre_hook(lambda _, inputs, i=i: computed.update({i: len(inputs[0])}))
    for threshold in (0.3, 0.5, 0.8, 1.01):
        computed.clear()
        got, decided_by = model.predict_early(batch, threshold)
        for n in range(40):
            exits = zip(outputs.exit_logits, temperatures[:3], strict=True)
            sure = [bool(t) and (logits[n] / t).softmax(dim=0).max() >= threshold for logits, t in exits]
            number = [*sure, True].index(True)
            assert decided_by[n] == number + 1
            torch.testing.assert_close(got[n], (*outputs.exit_logits, outputs.logits)[number][n])
        remaining = [int((decided_by >= number).sum()) for number in range(1, 5)]
        asked = [num if t and threshold <= 1 else 0 for num, t in zip(remaining[:3], temperatures[:3], strict=True)]
        assert [computed.get(i, 0) for i in range(7)] == asked + remaining
        seen |= set(decided_by.tolist())
    assert seen == {number for number, t in enumerate(temperatures, start=1) if t}  # each decided for some image


def test_multiply_adds():
    """Two stages of width 4 on 16 px by hand: out-pixels x out x in x area; and by every layer."""
    model = build("resnet18", "--BYOT", "--num_resnet_blocks", "2", width=4)
    stage_1 = 256 * 4 * 3 * 9 + 4 * (256 * 4 * 4 * 9)  # with the stem
    stage_2 = 64 * 8 * 4 * 9 + 3 * (64 * 8 * 8 * 9) + 64 * 8 * 4 + 8 * 10  # with shortcut and classifier
    exit_1 = 256 * 2 * 4 + 4 * 2 * 2 * 64 + 4 * 8 * 2 + 8 * 10
    assert model.multiply_adds(16) == ([stage_1 + exit_1, stage_1 + exit_1 + stage_2], stage_1 + stage_2)
    without_exit = [stage_1, stage_1 + stage_2], stage_1 + stage_2
    assert model.multiply_adds(16, [None, 1.0]) == without_exit  # an exit that never decides is not computed
    model.temperatures = [None, 1.0]
    assert model.multiply_adds(16) == without_exit
    model, counts = build("resnext50_32x4d", "--BYOT"), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, out: counts.append(out[0, :1].numel() * m.weight.numel()))
    assert model.multiply_adds(32)[0][-1] == sum(counts)
    assert model.training and model.bn1.num_batches_tracked == 0  # as before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with --val_split, whose best epoch is not its last and whose exit 1 no loss trains."""
    words = "--BYOT --BYOT_from_k_block 2 --data_type synthetic --classes 5 --limit_train 40 --limit_val 10 --width 4"
    words += " --end_epoch 2 --batch_size 20 --lr 0.01 --val_split 0.2 --save_predictions --device cpu --precision fp32"
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "TRAIN_PER_CLASS", 20)
        assert main.main([*words.split(), "--experiments_dir", str(run.parent), "--run_name", "run"]) == 0
        _, val = data.build_loaders(main.parse_args(words.split()), "cpu")
    best = load_checkpoint(run / "checkpoint_previous.pth")
    write_checkpoint(run / "checkpoint_best.pth", best | {"test": {"best": {"temperatures": [None, 2.0, 3.0, 4.0]}}})
    return run, val


def test_load_run_gives_the_trained_network_and_what_is_needed_to_use_it(run):
    run, val = run
    model, info = load_run(run)
    saved, pixels = np.load(run / "predictions.npz"), val.raw_images(torch.arange(10)) / 255
    mean, std = (torch.tensor(info[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        np.testing.assert_allclose(model((pixels - mean) / std).logits, saved["logits"], rtol=1e-3, atol=1e-4)
    assert info["class_names"] == val.class_names and (info["image_size"], info["epoch"]) == (32, 1)
    assert not model.training and info["args"].width == 4
    assert model.layer4[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    fitted = json.loads((run / "results.json").read_text())["test"]["last"]["temperatures"]
    assert model.temperatures == info["temperatures"] == fitted and [t is None for t in fitted] == [True] + [False] * 3
    best, info = load_run(str(run), "best")
    assert best.temperatures == [None, 2.0, 3.0, 4.0] and info["epoch"] == 0 and (best.fc.bias != model.fc.bias).any()
    last = load_checkpoint(run / "checkpoint_last.pth")
    write_checkpoint(run / "checkpoint_last.pth", last | {"test": None})  # as without --val_split
    model, info = load_run(run)
    write_checkpoint(run / "checkpoint_last.pth", last)
    assert info["temperatures"] is None and model.temperatures == [None, 1.0, 1.0, 1.0]


def test_load_run_reads_the_checkpoint_alone_and_names_it_when_missing_or_damaged(run):
    for export in ("config.json", "results.json"):
        (run[0] / export).unlink()
    path = run[0] / "checkpoint_last.pth"
    content = path.read_bytes()
    load_run(run[0])
    for damaged in (None, b"", b"[]", content[: len(content) // 2]):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            load_run(run[0])
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(content)
