"""The networks' parameters, exits and convolutions, and load_run."""

import dataclasses
import json
import os
import shutil
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import NARROWEST, assert_identical, build_network, make_small, network_images, run
from torch import nn

import data
from models import MODELS, load_run
from models.exits import PatchConv2d
from utils import records
from utils.checkpoint import load_checkpoint, write_checkpoint
from utils.errors import UserError

TORCHVISION = {"wideresnet50": "wide_resnet50_2", "wideresnet101": "wide_resnet101_2"}  # where names differ
RESNETS = [name for name in MODELS if "resne" in name]
EVERY_NETWORK = pytest.mark.parametrize("name", MODELS)


def without_exits(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("exits.")}


def shapes(state: dict) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", RESNETS)
def test_parameters_have_torchvisions_names_and_shapes(name):
    torchvision_network = getattr(torchvision.models, TORCHVISION.get(name, name))
    with torch.device("meta"):
        ours = build_network(name, "--BYOT", width=64, num_classes=100).state_dict()
        theirs = torchvision_network(num_classes=100).state_dict()
    expected = shapes(theirs)
    expected["conv1.weight"] = (64, 3, 3, 3)
    assert shapes(without_exits(ours)) == expected


def check_classifier(fc, feature, logits, feature_dim):
    """Both are float32, and the product is not bf16's, which would be 1e-2 off."""
    assert feature.shape == (2, feature_dim)
    assert logits.shape == (2, 10)
    assert feature.dtype == logits.dtype == torch.float32
    expected = F.linear(feature, fc.weight, fc.bias)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d"])  # each block with each exit
@pytest.mark.parametrize(
    "flags, num_exits",
    [
        ("--num_resnet_blocks 1 --PSKD", 0),
        ("--num_resnet_blocks 2 --BYOT", 1),
        ("--num_resnet_blocks 3 --DML", 2),
        ("--BYOT", 3),
        ("--PSKD", 0),
    ],
)
def test_every_block_but_the_last_has_an_exit_and_outputs_are_float32(name, flags, num_exits):
    model = build_network(name, flags)
    size = 64 if len(model.stages) == 4 else 24
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, feature, exit_logits, exit_features = model(network_images(size))
    assert len(model.exits) == num_exits
    feature_dim = model.fc.in_features
    check_classifier(model.fc, feature, logits, feature_dim)
    for exit_, of_exit, exit_feature in zip(model.exits, exit_logits, exit_features, strict=True):
        check_classifier(exit_.fc, exit_feature, of_exit, feature_dim)


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
@pytest.mark.parametrize("name", ["resnet34", "resnext50_32x4d"])
def test_attention_exits_shrink_in_as_many_steps_as_blocks_follow(name, num_blocks):
    model = build_network(name, f"--BYOT --num_resnet_blocks {num_blocks}")
    kernel_sizes = []
    for exit_ in model.exits:
        convolutions = [module for module in exit_.body.modules() if isinstance(module, nn.Conv2d)]
        kernel_sizes.append([conv.kernel_size[0] for conv in convolutions])
    step = [3, 1, 3, 1]
    steps = range(num_blocks - 1, 0, -1)
    assert kernel_sizes == [step * num for num in steps]


@pytest.fixture(scope="module", params=RESNETS)
def states(request):
    """The initial weights of a network, by flags."""
    found = {}
    for words in ("", "--seed 5", "--BYOT", "--DML --PSKD"):
        found[words] = build_network(request.param, words).state_dict()
    return found


@EVERY_NETWORK
def test_building_leaves_the_random_state(name):
    before = torch.get_rng_state()
    build_network(name, "--BYOT")
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_do_not_depend_on_the_method(states):
    assert_identical(states["--DML --PSKD"], states["--BYOT"])
    assert_identical(without_exits(states["--BYOT"]), states[""])


@pytest.mark.parametrize("weight", ["conv1.weight", "layer4.0.conv2.weight", "fc.weight"])
def test_initial_weights_depend_on_the_seed(states, weight):
    assert not torch.equal(states[""][weight], states["--seed 5"][weight])


def test_every_batch_norm_starts_at_1_a_residuals_last_too(states):
    weights = {name: w for name, w in states[""].items() if "bn" in name and name.endswith("weight")}
    assert weights
    for name, weight in weights.items():
        assert (weight == 1).all(), name


def test_convolutions_start_kaiming_normal_by_fan_out(states):
    """Within five sampling errors."""
    convolutions = {name: w for name, w in states["--BYOT"].items() if w.ndim == 4}
    for name, weight in convolutions.items():
        out_channels, _, height, width = weight.shape
        std = sqrt(2 / (out_channels * height * width))
        error = weight.std().item() / std - 1
        assert abs(error) < 5 / sqrt(2 * weight.numel()), name


@pytest.mark.parametrize("words", ["--num_resnet_blocks 1", "--num_resnet_blocks 2 --BYOT", "--BYOT"])
@EVERY_NETWORK
def test_narrowest_width_leaves_every_layer_a_channel(name, words):
    model = build_network(name, words, width=1)
    assert model.conv1.out_channels == NARROWEST.get(name, 1)
    assert all(p.numel() for p in model.parameters())
    assert model(network_images()).logits.isfinite().all()


def assert_same_function(found, expected, inputs):
    """The same values, and the same gradients of the inputs."""
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(gradients, expected_gradients)


def shortcut(width):
    return build_network("resnet18", width=width).layer2[0].downsample[0]


def test_narrow_shortcuts_are_the_strided_convolution():
    """Below 16 channels the shortcut slices first, because of a fault of oneDNN: same numbers, same gradients."""
    conv = shortcut(width=8).double()
    assert type(conv) is not nn.Conv2d
    x = network_images(10, 16).double().view(6, 8, 10, 10).requires_grad_()
    expected = F.conv2d(x, conv.weight, stride=2)
    assert_same_function(conv(x), expected, [x, conv.weight])
    assert type(shortcut(width=16)) is nn.Conv2d


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 16), (9, 15), (4, 7)])  # without and with a remainder
@pytest.mark.parametrize("kernel", [2, 4])
def test_patch_convolutions_are_the_strided_convolution(kernel, size, memory_format):
    conv = PatchConv2d(3, 5, kernel, kernel).to(torch.float64, memory_format=memory_format)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found = conv(x.contiguous(memory_format=memory_format))
    expected = F.conv2d(x, conv.weight, conv.bias, stride=kernel)
    assert_same_function(found, expected, [x, conv.weight, conv.bias])


@pytest.mark.parametrize("size", [8, 9])
def test_patch_convolutions_compute_in_autocasts_precision(size):
    conv = PatchConv2d(3, 5, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(network_images(size)).dtype == torch.bfloat16


BEST_TEMPERATURES = {"exit 2": 2.0, "exit 3": 3.0, "final": 4.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with --val_split, whose best epoch is not its last and whose exit 1 no loss trains; its val loader."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    words = "--BYOT --BYOT_from_k_block 2 --val_split 0.25 --save_predictions"
    assert run(directory, *words.split()) == 0
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        _, val = data.build_loaders(load_run(directory)[1]["args"], "cpu")
    history = load_checkpoint(directory / "checkpoint_last.pth").run.history
    history[0].val["final"]["top1_error"] = 0.0
    change(directory, "last", "last", history=history)
    change(directory, "previous", "best", history=history[:1], test={"best": records.TestRecord(0, BEST_TEMPERATURES)})
    return directory, val


def change(run: Path, name: str, changed_name: str, **fields) -> None:
    """Write a checkpoint of a run with other fields of its record, under another name or the same."""
    checkpoint = load_checkpoint(run / f"checkpoint_{name}.pth")
    record = dataclasses.replace(checkpoint.run, **fields)
    write_checkpoint(run / f"checkpoint_{changed_name}.pth", checkpoint.states, record)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that run, to be changed."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_load_run_gives_the_trained_network(trained):
    run, val = trained
    model, info = load_run(run)
    pixels = val.images.permute(0, 3, 1, 2) / 255
    mean = torch.tensor(info["mean"]).view(3, 1, 1)
    std = torch.tensor(info["std"]).view(3, 1, 1)
    with torch.no_grad():
        outputs = model((pixels - mean) / std)
    saved = np.load(run / "predictions.npz")
    np.testing.assert_allclose(outputs.logits, saved["logits"], rtol=1e-3, atol=1e-4)
    assert not model.training
    assert model.layer4[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_load_run_tells_what_is_needed_to_use_the_network(trained):
    run, val = trained
    _, info = load_run(run)
    assert info["class_names"] == val.record.class_names
    assert (info["image_size"], info["epoch"], info["args"].width) == (16, 1, 4)


def test_load_run_gives_the_fitted_temperatures_of_trained_classifiers(trained):
    run, _ = trained
    _, info = load_run(run)
    results = json.loads((run / "results.json").read_text())
    assert info["temperatures"].keys() == BEST_TEMPERATURES.keys()
    assert info["temperatures"] == results["test"]["last"]["temperatures"]
    assert info["is_calibrated"]


def test_load_run_gives_the_best_epoch_when_asked(trained):
    run, _ = trained
    last, _ = load_run(run)
    best, info = load_run(str(run), "best")
    assert info["epoch"] == 0
    assert (best.fc.bias != last.fc.bias).any()
    assert info["temperatures"] == BEST_TEMPERATURES


def test_load_run_without_val_split_has_temperatures_of_1(copied):
    change(copied, "last", "last", test=None)
    _, info = load_run(copied)
    assert info["temperatures"] == dict.fromkeys(BEST_TEMPERATURES, 1.0)
    assert not info["is_calibrated"]


def flags_of(run: Path) -> dict:
    return load_checkpoint(run / "checkpoint_last.pth").run.args


def test_load_run_takes_the_default_of_a_network_flag_that_an_older_run_lacks(copied):
    flags = flags_of(copied)
    del flags["num_resnet_blocks"]
    change(copied, "last", "last", args=flags)
    model, info = load_run(copied)
    assert len(model.stages) == info["args"].num_resnet_blocks == 4


@pytest.mark.parametrize("name, value", [("classifier_type", ["resnet18"]), ("classifier_type", "x"), ("width", "4")])
def test_load_run_names_a_checkpoint_whose_flags_are_not_this_programs(copied, name, value):
    change(copied, "last", "last", args=flags_of(copied) | {name: value})
    with pytest.raises(UserError, match="does not hold what this program writes"):
        load_run(copied)


def test_load_run_reads_the_checkpoint_alone(copied):
    (copied / "config.json").unlink()
    (copied / "results.json").unlink()
    load_run(copied)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_load_run_names_a_checkpoint_that_is_missing_or_damaged(copied, damage):
    path = copied / "checkpoint_last.pth"
    damage(path)
    with pytest.raises(UserError) as caught:
        load_run(copied)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
