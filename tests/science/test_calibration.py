"""Temperatures and the early-exit curve: fitted and chosen on held-out images, measured on the test split."""

from math import log

import pytest
import torch
import torch.nn.functional as F

from utils.calibration import AFTER_TEMPERATURE, early_exit_curve, fit_temperature, fit_temperatures, scaled_metrics
from utils.metrics import all_metrics, per_sample

TRAINED = ["exit 1", "final"]  # of three classifiers


def classifiers(seed):
    """Logits (B = 3, M = 200, K = 5), each classifier better than the one before, and labels (M,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (200,), generator=generator)
    strength = torch.tensor([2.0, 3.0, 5.0])[:, None, None]
    noise = 2 * torch.randn(3, 200, 5, generator=generator)
    return noise + strength * F.one_hot(labels, 5), labels


@pytest.mark.parametrize("logit", [2.0, 10.0])
def test_temperature_by_hand(logit):
    # The NLL is least where sigmoid(logit / T) is 3/4, as many as are right.
    logits = torch.tensor([[logit, 0.0]] * 4)
    temperature = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
    assert temperature == pytest.approx(logit / log(3), rel=1e-9)


UNBOUNDED = {  # logits and labels whose NLL has no minimum between the bounds
    "all right": ([[1.0, 0.0], [2.0, 0.0]], [0, 0]),
    "all wrong": ([[1.0, 0.0], [2.0, 0.0]], [1, 1]),
    "right for certain": ([[1e6, 0.1], [0.3, 1e6]], [0, 1]),
    "the classes' frequencies": ([[5.0, 5.0], [7.0, 7.0]], [0, 1]),
    "beyond 100": ([[1000.0, 0.0]] * 4, [0, 0, 0, 1]),
}


@pytest.mark.parametrize("case", UNBOUNDED)
def test_no_temperature_is_fitted_where_the_nll_has_no_minimum(case):
    logits, labels = map(torch.tensor, UNBOUNDED[case])
    assert fit_temperature(logits, labels) is None


def nll(logits, labels, temperature):
    return per_sample(logits, labels, temperature)[2].mean()


def test_temperatures_of_trained_classifiers_minimise_their_nll():
    logits, labels = classifiers(seed=0)
    temperatures = fit_temperatures(logits, labels, TRAINED)
    assert list(temperatures) == TRAINED
    for name, z in zip(TRAINED, logits[[0, 2]], strict=True):
        at_least = nll(z, labels, temperatures[name])
        for factor in (0.99, 1.01):
            assert nll(z, labels, factor * temperatures[name]) > at_least


def test_scaled_metrics_are_of_logits_divided_by_the_temperature():
    logits, labels = classifiers(seed=1)
    scaled = scaled_metrics(logits, labels, {"exit 1": 1.5, "final": 2.0})
    assert list(scaled) == TRAINED
    expected = all_metrics(per_sample(logits[2].double() / 2, labels))
    assert scaled["final"] == {name: expected[name] for name in AFTER_TEMPERATURE}


COSTS = {"exit 1": 10, "exit 2": 25, "final": 40}  # multiply-adds
OF_ALL = {"exit 1": 1.5, "exit 2": 0.7, "final": 2.0}
OF_TWO = {"exit 1": 2.0, "final": 1.0}
TEMPERATURES = pytest.mark.parametrize("temperatures", [OF_ALL, OF_TWO])


def deciding_classifier(logits, temperatures, threshold):
    """Name and logits of the classifier at which an image with these logits (B, K) stops."""
    for name, z in zip(COSTS, logits, strict=True):
        if name in temperatures:
            scaled = z.double() / temperatures[name]
            if scaled.softmax(dim=0).max() >= threshold:
                break
    return name, z


@TEMPERATURES
def test_early_exit_curve_is_what_stopping_each_image_by_itself_gives(temperatures):
    logits, labels = classifiers(seed=3)
    result = early_exit_curve(classifiers(seed=1), (logits, labels), temperatures, COSTS, 36)
    for point in result["curve"]:
        threshold = point["threshold"]
        num_right = 0
        cost = 0
        for image, label in enumerate(labels):
            name, z = deciding_classifier(logits[:, image], temperatures, threshold)
            num_right += int(z.argmax() == label)
            cost += COSTS[name]
        assert point["accuracy"] == pytest.approx(num_right / 2)  # % of 200
        if threshold > 1:  # the backbone alone
            cost = 200 * 36
        assert point["multiply_adds"] == pytest.approx(cost / 200)
    assert result["curve"][0]["multiply_adds"] == 10  # all stop at the first exit
    assert threshold > 1


@TEMPERATURES
@pytest.mark.parametrize("backbone_cost", [36, 12])
def test_the_cheapest_threshold_within_half_a_point_is_chosen(temperatures, backbone_cost):
    split = classifiers(seed=3)
    result = early_exit_curve(split, split, temperatures, COSTS, backbone_cost)
    required = result["curve"][-1]["accuracy"] - 0.5
    qualified = [point for point in result["curve"] if point["accuracy"] >= required]
    cheapest = min(qualified, key=lambda point: point["multiply_adds"])
    assert result["chosen"] == cheapest


def confident_images_right():
    """Of the exit, images of confidence from 0.8 are right and the others wrong; the final classifier is always right:
    logits (2, 100, 2) and labels."""
    probability = torch.linspace(0.5, 1, 102)[1:-1]
    exit_logits = torch.stack([probability, 1 - probability], dim=1).log()
    labels = (probability < 0.8).long()
    final_logits = 9 * F.one_hot(labels, 2)
    return torch.stack([exit_logits, final_logits]), labels


def stop_at_exit(test, backbone_cost=2.9):
    costs = {"exit 1": 1, "final": 3}
    return early_exit_curve(confident_images_right(), test, dict.fromkeys(costs, 1.0), costs, backbone_cost)


def test_threshold_is_chosen_by_hand():
    chosen = stop_at_exit(confident_images_right())["chosen"]
    assert 0.8 <= chosen["threshold"] < 0.83
    assert chosen["heldout_accuracy"] == 100


def test_threshold_does_not_depend_on_test_images():
    logits, labels = confident_images_right()
    chosen = stop_at_exit((30 * logits, labels))["chosen"]
    other = stop_at_exit((30 * logits, 1 - labels))["chosen"]
    assert chosen["threshold"] == stop_at_exit((logits, labels))["chosen"]["threshold"]
    assert chosen["threshold"] == other["threshold"]
    assert other["accuracy"] == pytest.approx(100 - chosen["accuracy"])


def test_threshold_is_chosen_by_the_cost_on_heldout_images():
    # There the backbone costs less than 2.2, the cost with that threshold; on these test images every exit is sure, so
    # that it costs more than 1.
    logits, labels = confident_images_right()
    result = stop_at_exit((30 * logits, labels), backbone_cost=2)
    assert result["chosen"] == result["curve"][-1]


def test_without_a_test_split_the_same_threshold_is_chosen():
    chosen = stop_at_exit(confident_images_right())["chosen"]
    assert stop_at_exit(None)["chosen"].items() < chosen.items()
