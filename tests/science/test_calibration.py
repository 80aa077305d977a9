"""Temperatures and the early-exit curve: fitted and chosen on held-out images, measured on the test split."""

from math import exp, inf, log, nan, sqrt

import pytest
import torch

from utils.calibration import calibrate, early_exit_curve, fit_temperature, pnorm_augrc, pnorm_confidences
from utils.errors import NonFiniteError
from utils.metrics import classification_metrics, extended_metrics


def classifiers(seed: int, num_images: int = 200):
    """Logits (B = 3, M, K = 5), each classifier better than the one before, and labels (M,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (num_images,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, 5) * torch.tensor([2.0, 3.0, 5.0])[:, None, None]
    return 2 * torch.randn(3, num_images, 5, generator=generator) + signal, labels


@pytest.mark.parametrize(
    "first_logits, labels, expected",
    [
        ([2, 2, 2, 2], [0, 0, 0, 1], 2 / log(3)),  # the NLL is least where sigmoid(2 / T) is 3/4, as are right
        ([10, 10, 10, 10], [0, 0, 0, 1], 10 / log(3)),
        ([1, 2], [0, 0], 0.01),  # all right: the lower limit
        ([1, 2], [1, 1], 100),
    ],
)
def test_temperature_by_hand(first_logits, labels, expected):
    logits = torch.tensor([[z, 0.0] for z in first_logits])
    assert fit_temperature(logits, torch.tensor(labels)) == pytest.approx(expected, rel=1e-9)


def test_calibrate_fits_on_heldout_images_and_reports_the_test_split():
    heldout, test = classifiers(seed=0), classifiers(seed=1)
    record = calibrate(heldout, test, [True, False])
    temperatures = record["temperatures"]
    assert temperatures[1] is None and record["calibrated"]["exits"][1] is None
    for i, ours in ((0, record["calibrated"]["exits"][0]), (2, record["calibrated"]["val"])):
        nll = [
            classification_metrics(heldout[0][i].double() / (temperatures[i] * factor), heldout[1])["nll"]
            for factor in (0.99, 1, 1.01)
        ]
        assert nll[1] == min(nll)
        scaled = test[0][i].double() / temperatures[i]
        expected = classification_metrics(scaled, test[1]) | extended_metrics(scaled, test[1])
        assert ours.keys() == {"ece", "nll", "adaptive_ece", "brier", "augrc_pnorm", "pnorm_p"}
        assert {name: ours[name] for name in expected if name in ours} == {
            name: expected[name] for name in ("ece", "nll", "adaptive_ece", "brier")
        }
        assert ours["ece"] < classification_metrics(test[0][i], test[1])["ece"]


def test_pnorm_confidence_by_hand():
    # less the mean 2: 3, -1, -2; equal logits have no norm.
    confidences = pnorm_confidences(torch.tensor([[5.0, 1.0, 0.0], [7.0, 7.0, 7.0]]))
    assert confidences.shape == (9, 2)
    probability = 1 / (1 + exp(-4) + exp(-5))
    expected = [probability, 3 / 6, 3 / sqrt(14), 3 / 36 ** (1 / 3)]
    assert confidences[:4, 0].tolist() == pytest.approx(expected, rel=1e-12)
    assert confidences[8, 0].item() == pytest.approx(3 / (3**8 + 1 + 2**8) ** (1 / 8), rel=1e-12)
    assert confidences[0, 1].item() == pytest.approx(1 / 3) and not confidences[1:, 1].any()


def test_pnorm_augrc_with_p_0_is_the_plain_augrc():
    logits, labels = classifiers(seed=0)
    assert pnorm_augrc(logits[0], labels)[0] == extended_metrics(logits[0], labels)["augrc"]


@pytest.mark.parametrize("scale", [0.01, 7.3])
def test_pnorm_confidence_with_p_above_0_does_not_depend_on_scale_and_offset_of_an_image(scale):
    logits = classifiers(seed=0)[0][0].double()
    changed = scale * logits + 5
    plain, ours = pnorm_confidences(logits), pnorm_confidences(changed)
    torch.testing.assert_close(ours[1:], plain[1:], rtol=1e-11, atol=0)
    assert (ours[0] - plain[0]).abs().max() > 0.1


def test_pnorm_p_is_chosen_on_heldout_images_alone():
    heldout, test = classifiers(seed=4), classifiers(seed=3)  # of which the final classifier's best p differs
    on_heldout = [pnorm_augrc(logits, heldout[1]) for logits in heldout[0]]
    on_test = [pnorm_augrc(logits, test[1]) for logits in test[0]]
    calibrated = calibrate(heldout, test, [True, True])["calibrated"]
    for i, ours in enumerate([*calibrated["exits"], calibrated["val"]]):
        assert on_heldout[i][ours["pnorm_p"]] == min(on_heldout[i])
        assert ours["augrc_pnorm"] == on_test[i][ours["pnorm_p"]]
    assert calibrated["val"]["augrc_pnorm"] > min(on_test[2])


def test_pnorm_p_is_0_where_a_norm_gains_nothing():
    # Each image's logits have one shape, so that the scale alone, and with it the probability, tells right from wrong.
    logits = torch.tensor([3.0, 0, 0]) * torch.linspace(0.1, 2, 20)[:, None]
    labels = (torch.arange(20) < 10).long()  # the confident half is right
    record = calibrate((logits[None], labels), (logits[None], labels), [])["calibrated"]["val"]
    assert record["pnorm_p"] == 0 and record["augrc_pnorm"] == pytest.approx(125)


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_calibrate_refuses_logits_that_are_not_finite(value):
    heldout, test = classifiers(seed=0), classifiers(seed=1)
    heldout[0][2, 7, 3] = value
    with pytest.raises(NonFiniteError):
        calibrate(heldout, test, [True, True])


@pytest.mark.parametrize("temperatures", [[1.5, 0.7, 2.0], [2.0, None, 1.0]])
def test_early_exit_curve_is_what_stopping_each_image_by_itself_gives(temperatures):
    (logits, labels), costs = classifiers(seed=3), [10, 25, 40]
    result = early_exit_curve(classifiers(seed=1), (logits, labels), temperatures, costs, 36)
    for point in result["curve"]:
        correct, cost = 0, 0
        for image in range(len(labels)):
            for i, temperature in enumerate(temperatures):
                if temperature is None:
                    continue
                probabilities = (logits[i, image].double() / temperature).softmax(0)
                if i == 2 or probabilities.max() >= point["threshold"]:
                    break
            correct += (logits[i, image].argmax() == labels[image]).item()
            cost += costs[i]
        assert point["accuracy"] == pytest.approx(100 * correct / len(labels))
        assert point["multiply_adds"] == pytest.approx(36 if point["threshold"] > 1 else cost / len(labels))
    assert result["curve"][0]["multiply_adds"] == 10 and result["curve"][-1]["multiply_adds"] == 36
    for backbone in (36, 12):
        same = early_exit_curve((logits, labels), (logits, labels), temperatures, costs, backbone)
        qualified = [point for point in same["curve"] if point["accuracy"] >= same["curve"][-1]["accuracy"] - 0.5]
        assert same["chosen"] == min(qualified, key=lambda point: point["multiply_adds"])


def test_threshold_is_chosen_on_heldout_images_by_hand():
    # Of the exit, confident images are right and the others wrong; the final classifier is always right.
    probability = torch.linspace(0.5, 1, 102)[1:-1]
    exit_logits = torch.stack([probability, 1 - probability], dim=1).log()
    labels = (probability < 0.8).long()
    heldout = torch.stack([exit_logits, 9 * torch.nn.functional.one_hot(labels, 2)]), labels
    results = []
    for test_labels in (labels, 1 - labels):
        results.append(early_exit_curve(heldout, (30 * heldout[0], test_labels), [1.0, 1.0], [1, 3], 2.9))
    chosen = results[0]["chosen"]
    assert 0.8 <= chosen["threshold"] < 0.83 and chosen["heldout_accuracy"] == 100
    assert results[0]["curve"][results[0]["curve"].index(chosen) - 1]["heldout_accuracy"] < 99.5
    # Whatever the test logits and labels are, the choice is the same.
    other = results[1]["chosen"]
    assert other["threshold"] == chosen["threshold"] and other["accuracy"] == pytest.approx(100 - chosen["accuracy"])
    # On held-out images a cheaper backbone costs less than 2.2, that threshold's cost, and on test images more than 1.
    never = early_exit_curve(heldout, (30 * heldout[0], labels), [1.0, 1.0], [1, 3], 2)
    assert never["chosen"] == never["curve"][-1]
