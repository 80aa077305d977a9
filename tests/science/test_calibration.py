"""Temperatures and the early-exit curve: fitted and chosen on held-out images, measured on the test split."""

from math import exp, inf, log, nan, sqrt

import pytest
import torch
import torch.nn.functional as F

from utils.calibration import calibrate, early_exit_curve, fit_temperature, pnorm_augrc, pnorm_confidences
from utils.errors import NonFiniteError
from utils.metrics import classification_metrics, extended_metrics


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


@pytest.mark.parametrize(("label", "limit"), [(0, 0.01), (1, 100)])
def test_temperature_is_limited_where_all_are_right_or_all_wrong(label, limit):
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    temperature = fit_temperature(logits, torch.tensor([label, label]))
    assert temperature == pytest.approx(limit, rel=1e-9)


@pytest.fixture(scope="module")
def record():
    """Calibration on seed 0, tested on seed 1, where no loss trains exit 2."""
    return calibrate(classifiers(seed=0), classifiers(seed=1), [True, False])


def by_classifier(record):
    calibrated = record["calibrated"]
    return [*calibrated["exits"], calibrated["val"]]


TRAINED = pytest.mark.parametrize("i", [0, 2])


def test_an_untrained_exit_is_not_calibrated(record):
    assert record["temperatures"][1] is None
    assert by_classifier(record)[1] is None


@TRAINED
def test_temperature_minimises_the_nll_on_heldout_images(record, i):
    logits, labels = classifiers(seed=0)
    temperature = record["temperatures"][i]
    nll = []
    for factor in (0.99, 1, 1.01):
        scaled = logits[i].double() / (factor * temperature)
        metrics = classification_metrics(scaled, labels)
        nll.append(metrics["nll"])
    assert nll[1] == min(nll)


@TRAINED
def test_calibrated_metrics_are_of_the_test_split(record, i):
    logits, labels = classifiers(seed=1)
    scaled = logits[i].double() / record["temperatures"][i]
    expected = classification_metrics(scaled, labels) | extended_metrics(scaled, labels)
    ours = by_classifier(record)[i]
    of_scaled = {"ece", "nll", "adaptive_ece", "brier"}
    assert ours.keys() == of_scaled | {"augrc_pnorm", "pnorm_p"}
    for name in of_scaled:
        assert ours[name] == expected[name]


@TRAINED
def test_temperature_lowers_the_ece_on_the_test_split(record, i):
    logits, labels = classifiers(seed=1)
    before = classification_metrics(logits[i], labels)
    after = by_classifier(record)[i]
    assert after["ece"] < before["ece"]


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_calibrate_refuses_logits_that_are_not_finite(value):
    logits, labels = classifiers(seed=0)
    logits[2, 7, 3] = value
    with pytest.raises(NonFiniteError):
        calibrate((logits, labels), classifiers(seed=1), [True, True])


def test_pnorm_confidence_by_hand():
    logits = torch.tensor([[5.0, 1.0, 0.0]])  # less the mean 2: 3, -1, -2
    probability = 1 / (1 + exp(-4) + exp(-5))
    norm_3 = (27 + 1 + 8) ** (1 / 3)
    norm_8 = (3**8 + 1 + 2**8) ** (1 / 8)
    confidences = pnorm_confidences(logits)
    assert confidences.shape == (9, 1)
    confidence = confidences[:, 0].tolist()
    expected = [probability, 3 / 6, 3 / sqrt(14), 3 / norm_3]
    assert confidence[:4] == pytest.approx(expected, rel=1e-12)
    assert confidence[8] == pytest.approx(3 / norm_8, rel=1e-12)


def test_pnorm_confidence_of_equal_logits_is_0():
    confidences = pnorm_confidences(torch.tensor([[7.0, 7.0, 7.0]]))
    assert confidences[0].item() == pytest.approx(1 / 3)
    assert not confidences[1:].any()


@pytest.mark.parametrize("scale", [0.01, 7.3])
def test_pnorm_confidence_with_p_above_0_does_not_depend_on_scale_and_offset(scale):
    logits = classifiers(seed=0)[0][0].double()
    plain = pnorm_confidences(logits)
    changed = pnorm_confidences(scale * logits + 5)
    torch.testing.assert_close(changed[1:], plain[1:], rtol=1e-11, atol=0)
    difference = changed[0] - plain[0]
    assert difference.abs().max() > 0.1


def test_pnorm_augrc_with_p_0_is_the_plain_augrc():
    logits, labels = classifiers(seed=0)
    plain = extended_metrics(logits[0], labels)
    assert pnorm_augrc(logits[0], labels)[0] == plain["augrc"]


def test_pnorm_p_is_chosen_on_heldout_images_alone():
    heldout_logits, heldout_labels = classifiers(seed=4)
    test_logits, test_labels = classifiers(seed=3)
    record = calibrate((heldout_logits, heldout_labels), (test_logits, test_labels), [True, True])
    for i, ours in enumerate(by_classifier(record)):
        p = ours["pnorm_p"]
        on_heldout = pnorm_augrc(heldout_logits[i], heldout_labels)
        on_test = pnorm_augrc(test_logits[i], test_labels)
        assert on_heldout[p] == min(on_heldout)
        assert on_test[p] == ours["augrc_pnorm"]
    assert on_test[p] > min(on_test)  # of the final classifier the test split's own best p differs


def test_pnorm_p_is_0_where_a_norm_gains_nothing():
    # Each image's logits have one shape, so that the scale alone, and with it the probability, tells right from wrong.
    scale = torch.linspace(0.1, 2, 20)[:, None]
    logits = scale * torch.tensor([3.0, 0.0, 0.0])
    labels = torch.tensor([1] * 10 + [0] * 10)  # the confident half is right
    split = logits[None], labels
    ours = calibrate(split, split, [])["calibrated"]["val"]
    assert ours["pnorm_p"] == 0
    assert ours["augrc_pnorm"] == pytest.approx(125)


COSTS = [10, 25, 40]  # multiply-adds
TEMPERATURES = pytest.mark.parametrize("temperatures", [[1.5, 0.7, 2.0], [2.0, None, 1.0]])


def deciding_classifier(logits, temperatures, threshold):
    """The classifier at which an image with these logits (B, K) stops."""
    for i in range(2):
        if temperatures[i] is not None:
            scaled = logits[i].double() / temperatures[i]
            if scaled.softmax(dim=0).max() >= threshold:
                return i
    return 2


@TEMPERATURES
def test_early_exit_curve_is_what_stopping_each_image_by_itself_gives(temperatures):
    logits, labels = classifiers(seed=3)
    result = early_exit_curve(classifiers(seed=1), (logits, labels), temperatures, COSTS, 36)
    for point in result["curve"]:
        threshold = point["threshold"]
        num_right = 0
        cost = 0
        for image, label in enumerate(labels):
            i = deciding_classifier(logits[:, image], temperatures, threshold)
            num_right += int(logits[i, image].argmax() == label)
            cost += COSTS[i]
        assert point["accuracy"] == pytest.approx(num_right / 2)  # % of 200
        if threshold <= 1:
            assert point["multiply_adds"] == pytest.approx(cost / 200)


@TEMPERATURES
def test_early_exit_curve_goes_from_the_first_exit_to_the_backbone_alone(temperatures):
    result = early_exit_curve(classifiers(seed=1), classifiers(seed=3), temperatures, COSTS, 36)
    first, *_, last = result["curve"]
    assert first["multiply_adds"] == 10
    assert last["multiply_adds"] == 36
    assert last["threshold"] > 1


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


def stop_at_exit(test_logits, test_labels, backbone_cost=2.9):
    test = test_logits, test_labels
    return early_exit_curve(confident_images_right(), test, [1.0, 1.0], [1, 3], backbone_cost)


def test_threshold_is_chosen_by_hand():
    result = stop_at_exit(*confident_images_right())
    chosen = result["chosen"]
    assert 0.8 <= chosen["threshold"] < 0.83
    assert chosen["heldout_accuracy"] == 100
    before = result["curve"].index(chosen) - 1
    assert result["curve"][before]["heldout_accuracy"] < 99.5


def test_threshold_does_not_depend_on_test_images():
    logits, labels = confident_images_right()
    chosen = stop_at_exit(30 * logits, labels)["chosen"]
    other = stop_at_exit(30 * logits, 1 - labels)["chosen"]
    assert chosen["threshold"] == stop_at_exit(logits, labels)["chosen"]["threshold"]
    assert chosen["threshold"] == other["threshold"]
    assert other["accuracy"] == pytest.approx(100 - chosen["accuracy"])


def test_threshold_is_chosen_by_the_cost_on_heldout_images():
    # There the backbone costs less than 2.2, the cost with that threshold; on these test images every exit is sure, so
    # that it costs more than 1.
    logits, labels = confident_images_right()
    result = stop_at_exit(30 * logits, labels, backbone_cost=2)
    assert result["chosen"] == result["curve"][-1]
