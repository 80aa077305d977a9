"""The metrics on cases small enough to follow, at their limits, and against all orders of tied samples."""

import itertools
from math import exp, inf, log, nan, prod
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from helpers import tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import NonFiniteError
from utils.metrics import (
    adaptive_calibration_error,
    all_metrics,
    augrc,
    auroc_failure,
    classification_metrics,
    per_sample,
    reliability,
)
from utils.records import METRICS, SHOWN


def near(value):
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def two_class(confidence, right):
    """Logits (M, 2) and labels (M,): class 0 is predicted with these confidences, and right (1) or wrong (0)."""
    probability = torch.as_tensor(confidence, dtype=torch.float64)
    logits = torch.stack([probability, 1 - probability], dim=1).log()
    labels = 1 - torch.as_tensor(right).long()
    return logits, labels


def metrics_of(logits, labels):
    """All of them, of logits (M, K) and labels (M,)."""
    return all_metrics(per_sample(torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(labels)))


def mean_risk(num_errors):
    """AURC from the number of errors among the k most confident samples, for each k."""
    risks = [errors / k for k, errors in enumerate(num_errors, start=1)]
    return 1000 * fmean(risks)


@pytest.fixture
def of_five():
    """Metrics of predictions that are, by falling confidence, right, wrong, right, wrong, right."""
    return metrics_of(*two_class([0.78, 0.95, 0.72, 0.85, 0.55], right=[1, 1, 0, 0, 1]))


@pytest.fixture
def of_four():
    """Metrics of predictions that are, by falling confidence, right, wrong, right, wrong."""
    return metrics_of(*two_class([0.9, 0.8, 0.7, 0.6], right=[1, 0, 1, 0]))


def test_table_lists_every_metric(of_four):
    assert of_four.keys() == METRICS.keys()


def test_classification_metrics_are_those_that_are_shown(of_four):
    ours = classification_metrics(*two_class([0.9, 0.8, 0.7, 0.6], right=[1, 0, 1, 0]))
    assert ours == {name: of_four[name] for name in SHOWN}


def test_error_of_five_predictions(of_five):
    assert of_five["top1_error"] == near(40)
    assert of_five["top5_error"] == 0  # of two classes


def test_nll_of_five_predictions(of_five):
    # The label's probability: the confidence where right, the rest where wrong.
    likelihood = prod([0.78, 0.95, 0.28, 0.15, 0.55])
    expected = -log(likelihood) / 5
    assert of_five["nll"] == near(expected)


def test_ece_of_five_predictions(of_five):
    # |right answers - confidence|, summed in each bin that holds a sample
    above_90 = 1 - 0.95
    above_80 = 0.85
    above_70 = abs(1 - 0.78 - 0.72)
    above_50 = 1 - 0.55
    gap = above_90 + above_80 + above_70 + above_50
    assert of_five["ece"] == near(100 * gap / 5)


def test_aurc_of_five_predictions(of_five):
    expected = mean_risk([0, 1, 1, 2, 2])
    assert of_five["aurc"] == near(expected)


def test_eaurc_is_aurc_less_that_of_the_best_order(of_five):
    expected = of_five["aurc"] - mean_risk([0, 0, 0, 1, 2])
    assert of_five["eaurc"] == near(expected)


def test_top1_and_top5_error_count_the_rank_of_the_label():
    logits = tensor(7, 6, 5, 4, 3, 2, 1)
    ours = metrics_of(logits.expand(7, 7), torch.arange(7))
    assert ours["top1_error"] == near(100 * 6 / 7)  # ranks 2 to 7
    assert ours["top5_error"] == near(100 * 2 / 7)  # ranks 6 and 7


def test_auroc_of_failure_by_hand(of_four):
    # Of the four pairs of a right and a wrong answer, (0.7, 0.8) alone has the wrong one first.
    assert of_four["auroc_failure"] == near(75)


def test_augrc_by_hand(of_four):
    # The curve goes through 0, 0, 1/4, 1/4, 1/2, in steps of 1/4: its mean heights
    heights = tensor(0, 1 / 8, 1 / 4, 3 / 8)
    area = heights.sum().item() / 4
    assert of_four["augrc"] == near(1000 * area)


def test_brier_score_of_three_classes_by_hand():
    logits = tensor([0.5, 0.3, 0.2]).log()
    ours = metrics_of(logits, torch.tensor([1]))
    expected = 0.5**2 + 0.7**2 + 0.2**2
    assert ours["brier"] == near(expected)


def test_adaptive_ece_with_one_bin_of_two_samples():
    # Of 16 samples the first two are in one bin, because floor(15 / 16) is 0 and floor(30 / 16) is 1.
    confidence = torch.linspace(0.95, 0.65, 16, dtype=torch.float64)
    right = torch.tensor([0, 1] * 8)
    gaps = right - confidence
    first_bin = gaps[:2].sum().abs()
    other_bins = gaps[2:].abs().sum()
    expected = 100 * (first_bin + other_bins) / 16
    ours = metrics_of(*two_class(confidence, right))
    assert ours["adaptive_ece"] == near(expected.item())


def test_adaptive_ece_divides_ties_over_a_border():
    # Three samples per bin. Four tied ones, of which one is wrong, have ranks 3 to 6: one is in the first bin, with a
    # right and a wrong one, and three are in the second. The others are right.
    confidence = tensor(*[0.9] * 2, *[0.8] * 4, *[0.5] * 39)
    error = torch.zeros(45).double()
    error[[0, 5]] = 1
    first_bin = abs(1 + 0.75 - 2 * 0.9 - 0.8)
    second_bin = abs(3 * 0.75 - 3 * 0.8)
    other_bins = 39 * 0.5
    expected = (first_bin + second_bin + other_bins) / 45
    ours = adaptive_calibration_error(confidence, error)
    assert ours.item() == near(expected)


BORDERS = torch.arange(1, 11, dtype=torch.float64) / 10
ONE_ERROR = F.one_hot(torch.tensor(4), 10).double()


def test_reliability_bins_are_closed_above():
    samples, confidence, right = reliability(BORDERS, ONE_ERROR)
    assert samples.tolist() == [1] * 10
    assert torch.equal(confidence, BORDERS)
    assert torch.equal(right, 1 - ONE_ERROR)


def test_reliability_bins_are_open_below():
    above = (BORDERS + 1e-9).clamp(max=1)  # each one bin up, but for 1
    samples, _, right = reliability(above, ONE_ERROR)
    assert samples.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 2]
    assert right.tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 2]


CONFIDENCES = [0.1, 0.2, 0.4, 0.5, 0.9]


def samples_of(confidences, max_size):
    """Up to `max_size` pairs of a confidence and a bool."""
    pair = st.tuples(st.sampled_from(confidences), st.booleans())
    return st.lists(pair, min_size=1, max_size=max_size)


@given(samples_of([0.55, 0.6, 0.7, 0.9], max_size=40))
@settings(deadline=None, max_examples=60)
def test_metrics_do_not_depend_on_the_order_of_the_data(samples):
    confidence, right = zip(*samples, strict=True)
    forward = metrics_of(*two_class(confidence, right))
    backward = metrics_of(*two_class(confidence[::-1], right[::-1]))
    for name, value in forward.items():
        expected = None if value is None else near(value)
        assert backward[name] == expected


@given(samples_of(CONFIDENCES, max_size=30))
@settings(deadline=None, max_examples=100)
def test_auroc_of_failure_counts_pairs_and_ties_half(samples):
    of_right = [confidence for confidence, is_error in samples if not is_error]
    of_wrong = [confidence for confidence, is_error in samples if is_error]
    scores = []
    for right, wrong in itertools.product(of_right, of_wrong):
        scores.append(0.5 if right == wrong else right > wrong)
    expected = near(fmean(scores)) if scores else None
    confidence, error = zip(*samples, strict=True)
    ours = auroc_failure(tensor(*confidence), tensor(*error))
    assert ours == expected


def trapezoid_augrc(samples):
    """Area under straight lines from (0, 0) through one point per level of confidence."""
    area, risk = 0, 0
    for level in sorted(CONFIDENCES, reverse=True):
        errors = [is_error for confidence, is_error in samples if confidence == level]
        width = len(errors) / len(samples)
        rise = sum(errors) / len(samples)
        area += width * (risk + rise / 2)
        risk += rise
    return area


@given(samples_of(CONFIDENCES, max_size=30))
@settings(deadline=None, max_examples=100)
def test_augrc_is_the_trapezoid_with_ties_as_one_point(samples):
    confidence, error = zip(*samples, strict=True)
    ours = augrc(tensor(*confidence), tensor(*error))
    assert ours.item() == near(trapezoid_augrc(samples))


def brute_force_aurc(confidence, error):
    """Mean over every order of falling confidence, by going through all permutations."""
    falling = sorted(confidence, reverse=True)
    values = []
    for order in itertools.permutations(range(len(error))):
        ordered = [confidence[i] for i in order]
        if ordered == falling:
            num_errors = itertools.accumulate(error[i] for i in order)
            values.append(mean_risk(num_errors))
    return fmean(values)


@given(samples_of([1.0, 2.0, 3.0], max_size=6))
@settings(deadline=None, max_examples=60)
def test_tied_confidences_count_at_their_expectation(samples):
    level, error = zip(*samples, strict=True)
    logits = F.pad(tensor(*level)[:, None], (0, 1))  # a second class of logit 0
    ours = metrics_of(logits, torch.tensor(error).long())
    aurc = brute_force_aurc(level, error)
    right_first = [not is_error for is_error in error]
    best_aurc = brute_force_aurc(right_first, error)
    assert ours["aurc"] == near(aurc)
    assert ours["eaurc"] == near(aurc - best_aurc)


@pytest.mark.parametrize("right", [0, 1])
def test_metrics_where_all_are_right_or_all_wrong(right):
    confidence = torch.linspace(0.6, 0.89, 30, dtype=torch.float64)
    gap = (right - confidence).abs()
    ours = metrics_of(*two_class(confidence, [right] * 30))
    assert ours.pop("auroc_failure") is None  # there is no pair
    error = 1 - right
    expected = {"top1_error": 100 * error, "top5_error": 0, "aurc": 1000 * error, "eaurc": 0, "augrc": 500 * error}
    expected["nll"] = -(1 - gap).log().mean().item()
    expected["ece"] = expected["adaptive_ece"] = 100 * gap.mean().item()
    expected["brier"] = 2 * gap.square().mean().item()
    assert ours == near(expected)


def test_metrics_of_a_single_class_are_0():
    ours = classification_metrics(tensor([3], [-2]), torch.tensor([0, 0]))
    assert set(ours.values()) == {0}


@pytest.mark.parametrize("label", range(8))
def test_of_equal_logits_the_lower_class_comes_first(label):
    ours = metrics_of([[0] * 8], [label])
    assert ours["top1_error"] == (0 if label < 1 else 100)
    assert ours["top5_error"] == (0 if label < 5 else 100)


@pytest.mark.parametrize(("num_ties", "top5_error"), [(3, 0), (4, 100)])
def test_top5_error_with_lower_classes_that_tie_with_the_label(num_ties, top5_error):
    logits = [0] * 5 + [1, 2]  # the label is class 5; class 6 is before it
    logits[:num_ties] = [1] * num_ties
    ours = metrics_of([logits], [5])
    assert ours["top5_error"] == top5_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_floating_type_is_computed_in_float64(dtype):
    # In float32 both confidences are 1: a tie, which would spread the error over both ranks.
    logits = tensor([20, 0], [19, 0]).to(dtype)
    ours = classification_metrics(logits.requires_grad_(), torch.tensor([0, 1]))
    expected = mean_risk([0, 1])
    assert ours["aurc"] == near(expected)


EXTREME = [  # logits and label of an image, and its NLL
    ([1e300, 0, -1e300], 0, 0),
    ([0, 800, 0], 2, 800),
    ([1e16, 1e16, 0], 0, log(2)),
    ([1, 0, -inf], 0, log(1 + exp(-1))),
]


@pytest.mark.parametrize("logits, label, nll", EXTREME)
def test_extreme_logits_do_not_overflow(logits, label, nll):
    assert metrics_of([logits], [label])["nll"] == near(nll)


@pytest.mark.parametrize("row", [[nan, 0, 0], [0, 0, nan], [inf, -inf, 0], [nan, inf, 0], [-inf] * 3])
def test_logits_that_are_not_finite_are_refused(row):
    with pytest.raises(NonFiniteError, match="not finite"):
        metrics_of([[1, 2, 3], row], [2, 0])


@pytest.mark.parametrize(("num", "labels"), [(2, [0, 3]), (2, [-1, 0]), (2, [0, 1, 2]), (0, [])])
def test_labels_that_do_not_fit_are_refused(num, labels):
    labels = torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels") as raised:
        classification_metrics(torch.zeros(num, 3), labels)
    assert raised.type is ValueError
