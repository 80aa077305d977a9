"""Early exit against a plain loop, and the multiply-adds that it saves."""

import itertools

import pytest
import torch
from helpers import build_network, near, network_images
from torch import nn

from models.early_exit import confidence, multiply_adds, predict_early
from utils.calibration import NEVER
from utils.metrics import confidence_and_error
from utils.records import classifier_names

OF_ALL = dict.fromkeys(classifier_names(4), 1.0)  # temperatures


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("num", [1, 7])
@pytest.mark.parametrize("threshold, number", [(0, 1), (NEVER, 4)])
@pytest.mark.parametrize("name", ["resnet18", "resnet34"])  # exits: bottleneck, attention
def test_predict_early_at_extreme_thresholds_equals_forward_to_the_bit(name, threshold, number, num, bf16):
    model = build_network(name, "--BYOT").eval()
    batch = network_images(num=num)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        outputs = model(batch)
        logits, decided_by = predict_early(model, batch, threshold, OF_ALL)
    classifiers = (*outputs.exit_logits, outputs.logits)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, classifiers[number - 1])
    assert decided_by.dtype == torch.int64
    assert decided_by.tolist() == [number] * num


@torch.no_grad()
def spread_confidences(model, batch):
    """Change the classifiers so that their confidences lie between 0 and 1."""
    outputs = model(batch)
    for exit_, logits in zip(model.exits, outputs.exit_logits, strict=True):
        spread(exit_.fc, logits)
    spread(model.fc, outputs.logits)


def spread(fc, logits):
    mean = logits.mean(dim=0)
    fc.bias -= mean
    for p in fc.parameters():
        p *= 2 / (logits - mean).std()


def count_images(model) -> dict[int, int]:
    """Images computed, from now on: by the three exits under 0 to 2, by the four stages under 3 to 6."""
    counts = {}
    for i, module in enumerate((*model.exits, *model.stages)):

        def count(_, inputs, i=i):
            counts[i] = len(inputs[0])

        module.register_forward_pre_hook(count)
    return counts


TEMPERATURES = OF_ALL, {"exit 1": 3.0, "exit 3": 0.5, "final": 9.0}, {"final": 1.0}


@pytest.fixture(scope="module", params=itertools.product(["resnet18", "resnet34"], TEMPERATURES))
def early(request):
    """Temperatures, logits of all classifiers for 40 images (4, 40, K), and for several thresholds what predict_early
    gave and how many images went through each module. In float64, so that rounding decides nothing."""
    name, temperatures = request.param
    model = build_network(name, "--BYOT").double().eval()
    batch = network_images(num=40).double()
    spread_confidences(model, batch)
    with torch.no_grad():
        outputs = model(batch)
    counts = count_images(model)
    results = {}
    for threshold in (0.3, 0.5, 0.8, NEVER):
        counts.clear()
        logits, decided_by = predict_early(model, batch, threshold, temperatures)
        results[threshold] = logits, decided_by, dict(counts)
    return temperatures, torch.stack([*outputs.exit_logits, outputs.logits]), results


def decide(logits, temperatures, threshold) -> int:
    """The number of the classifier that decides, from the logits (4, K) of one image."""
    for number in (1, 2, 3):
        temperature = temperatures.get(f"exit {number}")
        if temperature:
            probabilities = (logits[number - 1] / temperature).softmax(dim=0)
            if probabilities.max() >= threshold:
                return number
    return 4


def test_predict_early_equals_a_loop_over_images(early):
    temperatures, classifiers, results = early
    seen = set()
    for threshold, (logits, decided_by, _) in results.items():
        for n in range(40):
            number = decide(classifiers[:, n], temperatures, threshold)
            assert decided_by[n] == number
            torch.testing.assert_close(logits[n], classifiers[number - 1, n])
            seen.add(number)
    names = classifier_names(4)
    assert {names[number - 1] for number in seen} == temperatures.keys()  # each decided for some image


def test_predict_early_computes_nothing_more(early):
    temperatures, _, results = early
    for threshold, (_, decided_by, counts) in results.items():
        remaining = [(decided_by >= number).sum().item() for number in (1, 2, 3, 4)]
        on_exits = remaining[:3]
        for i in range(3):
            if f"exit {i + 1}" not in temperatures or threshold == NEVER:
                on_exits[i] = 0
        assert [counts.get(i, 0) for i in range(7)] == on_exits + remaining


def two_stages():
    """A network with one exit; multiply-adds of its parts for 16 px by hand: out-pixels x out x in x area."""
    model = build_network("resnet18", "--BYOT --num_resnet_blocks 2", width=4).eval()
    stage_1 = 256 * 4 * 3 * 9 + 4 * (256 * 4 * 4 * 9)  # with the stem
    stage_2 = 64 * 8 * 4 * 9 + 3 * (64 * 8 * 8 * 9) + 64 * 8 * 4 + 8 * 10  # with shortcut and classifier
    exit_1 = 256 * 2 * 4 + 4 * 2 * 2 * 64 + 4 * 8 * 2 + 8 * 10
    return model, stage_1, stage_2, exit_1


def test_multiply_adds_by_hand():
    model, stage_1, stage_2, exit_1 = two_stages()
    on_the_way = {"exit 1": stage_1 + exit_1, "final": stage_1 + exit_1 + stage_2}
    assert multiply_adds(model, 16, ["exit 1", "final"]) == (on_the_way, stage_1 + stage_2)


def test_multiply_adds_leave_out_an_exit_that_never_decides():
    model, stage_1, stage_2, _ = two_stages()
    backbone = stage_1 + stage_2
    assert multiply_adds(model, 16, ["final"]) == ({"final": backbone}, backbone)


def test_multiply_adds_are_those_of_all_layers():
    model = build_network("resnext50_32x4d", "--BYOT").eval()
    counts = {}

    def count(module, _, out):
        out_pixels = out[0, :1].numel()
        counts[module] = out_pixels * module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    on_the_way, _ = multiply_adds(model, 32, OF_ALL)
    assert on_the_way["final"] == sum(counts.values())


def test_confidence_below_certainty_stays_below_it():
    """In float32 it would round to 1, and an exit would decide at threshold 1 that does not in the metrics."""
    logits = torch.tensor([[20.0, 0.0]])
    expected, _ = confidence_and_error(logits, torch.tensor([0]), temperature=0.9)
    assert confidence(logits, 0.9).item() == near(expected.item())
    assert confidence(logits, 0.9) < 1
