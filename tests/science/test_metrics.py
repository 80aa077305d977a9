"""The metrics on cases small enough to follow, at their limits, and against all orders of tied samples."""

import itertools
from fractions import Fraction
from math import exp, inf, log, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.metrics import classification_metrics, reliability


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def near(value):
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def two_class(*confidence_and_right):
    """Logits and labels of two-class predictions with these confidences, all of class 0, right or wrong."""
    logits = tensor(*([c, 1 - c] for c, _ in confidence_and_right)).log()
    return logits, torch.tensor([int(not right) for _, right in confidence_and_right])


def test_five_predictions_by_hand():
    logits, labels = two_class((0.78, True), (0.95, True), (0.72, False), (0.85, False), (0.55, True))
    # |right answers - confidence|, summed in each bin: 0.9 to 1, 0.8 to 0.9, 0.7 to 0.8 (two), 0.5 to 0.6.
    gaps = abs(1 - 0.95) + abs(0 - 0.85) + abs(1 + 0 - 0.78 - 0.72) + abs(1 - 0.55)
    # By falling confidence: right, wrong, right, wrong, right.
    aurc = 1000 * (0 / 1 + 1 / 2 + 1 / 3 + 2 / 4 + 2 / 5) / 5
    expected = {
        "top1_error": 100 * 2 / 5,
        "top5_error": 0,
        # The label's probability: the confidence where right, the rest where wrong.
        "nll": -(log(0.78) + log(0.95) + log(0.28) + log(0.15) + log(0.55)) / 5,
        "ece": 100 * gaps / 5,
        "aurc": aurc,
        # With the same two errors, the best order has them last.
        "eaurc": aurc - 1000 * (0 / 1 + 0 / 2 + 0 / 3 + 1 / 4 + 2 / 5) / 5,
    }
    assert classification_metrics(logits, labels) == near(expected)


def test_top1_and_top5_error_are_of_the_label_rank():
    logits = tensor([7, 6, 5, 4, 3, 2, 1]).expand(7, 7)
    ours = classification_metrics(logits, torch.arange(7))
    assert ours["top1_error"] == near(100 * 6 / 7)  # ranks 2 to 7
    assert ours["top5_error"] == near(100 * 2 / 7)  # ranks 6 and 7
    five = classification_metrics(logits[:5, :5], torch.arange(5))
    assert five["top1_error"] == 80 and five["top5_error"] == 0


def test_where_logits_tie_the_lower_class_comes_first():
    for label in range(8):
        ours = classification_metrics(torch.zeros(1, 8), torch.tensor([label]))
        assert ours["top1_error"] == (0 if label == 0 else 100)
        assert ours["top5_error"] == (0 if label < 5 else 100)
    # One class above the label's logit, and five or four of a lower number that tie with it.
    for logits, error in (([1, 1, 1, 1, 0, 1, 2], 100), ([1, 1, 1, 0, 0, 1, 2], 0)):
        assert classification_metrics(tensor(logits), torch.tensor([5]))["top5_error"] == error


def test_limits_all_right_all_wrong_one_class_and_perfect_order():
    logits = 2 * torch.randn(300, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    confidence = logits.softmax(1).amax(1).mean().item()
    right, wrong = (classification_metrics(logits, labels) for labels in (logits.argmax(1), logits.argmin(1)))
    expected = {"top1_error": 0, "top5_error": 0, "nll": right["nll"], "aurc": 0, "eaurc": 0}
    assert right == near(expected | {"ece": 100 * (1 - confidence)})
    expected = {"top1_error": 100, "top5_error": 100, "nll": wrong["nll"], "aurc": 1000, "eaurc": 0}
    assert wrong == near(expected | {"ece": 100 * confidence})
    assert set(classification_metrics(tensor([3], [-2]), torch.tensor([0, 0])).values()) == {0}
    ours = classification_metrics(*two_class((0.6, False), (0.9, True), (0.7, True), (0.55, False), (0.8, True)))
    assert ours["aurc"] == near(1000 * (1 / 4 + 2 / 5) / 5) and ours["eaurc"] == near(0)


def test_reliability_sums_ten_bins_open_below_and_closed_above():
    borders, wrong = tensor(*(i / 10 for i in range(1, 11))), tensor(0, 0, 0, 0, 1, 0, 0, 0, 0, 0)
    samples, confidence, right = reliability(borders, wrong)
    assert samples.tolist() == [1] * 10 and confidence.tolist() == borders.tolist()
    assert right.tolist() == (1 - wrong).tolist()
    samples, _, right = reliability((borders + 1e-9).clamp(max=1), wrong)  # each one bin up, but for 1
    assert samples.tolist() == [0] + 8 * [1] + [2] and right.tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 2]


def brute_force_aurc(confidence, wrong) -> Fraction:
    """Mean over every order of falling confidence, by going through all permutations."""
    values = []
    for order in itertools.permutations(range(len(wrong))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            errors = itertools.accumulate(wrong[i] for i in order)
            values.append(sum(Fraction(e, k) for k, e in enumerate(errors, start=1)) / len(wrong))
    return sum(values) / len(values)


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.booleans()), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_tied_confidences_count_at_their_expectation(samples):
    level, wrong = zip(*samples, strict=True)
    ours = classification_metrics(torch.tensor([[float(v), 0.0] for v in level]), torch.tensor(wrong).long())
    aurc, best = brute_force_aurc(level, wrong), brute_force_aurc([not w for w in wrong], wrong)
    assert ours["aurc"] == near(float(1000 * aurc)) and ours["eaurc"] == near(float(1000 * (aurc - best)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_floating_type_is_computed_in_float64_and_large_logits_do_not_overflow(dtype):
    # In float32 both confidences are 1: a tie, which would spread the error over both ranks.
    logits = torch.tensor([[20, 0], [19, 0]], dtype=dtype).requires_grad_()
    assert classification_metrics(logits, torch.tensor([0, 1]))["aurc"] == near(1000 * (0 / 1 + 1 / 2) / 2)
    assert classification_metrics(tensor([1e300, 0, -1e300], [0, 800, 0]), torch.tensor([0, 2]))["nll"] == near(400)


def test_minus_infinity_is_a_probability_of_zero():
    ours = classification_metrics(tensor([1, 0, -inf], [-inf, 0, 2]), torch.tensor([0, 1]))
    assert ours["nll"] == near((log(1 + exp(-1)) + log(1 + exp(2))) / 2)


@pytest.mark.parametrize("row", [[nan, 0, 0], [0, 0, nan], [inf, -inf, 0], [nan, inf, 0], [-inf] * 3])
def test_logits_that_are_not_finite_are_refused(row):
    with pytest.raises(ValueError, match="not finite"):
        classification_metrics(torch.tensor([[1.0, 2.0, 3.0], row]), torch.tensor([2, 0]))


@pytest.mark.parametrize("shape, labels", [((2, 3), [0, 3]), ((2, 3), [-1, 0]), ((2, 3), [0, 1, 2]), ((0, 3), [])])
def test_labels_that_do_not_fit_are_refused(shape, labels):
    with pytest.raises(ValueError, match="labels"):
        classification_metrics(torch.zeros(shape), torch.tensor(labels, dtype=torch.int64))
