"""The metrics on cases small enough to follow, at their limits, and against all orders of tied samples."""

import itertools
from fractions import Fraction
from math import exp, inf, log, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import NonFiniteError
from utils.metrics import (
    CHUNK,
    METRICS,
    adaptive_calibration_error,
    augrc,
    auroc_failure,
    classification_metrics,
    extended_metrics,
    reliability,
    shown_metrics,
)


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


WORKED_EXAMPLE = two_class((0.9, True), (0.8, False), (0.7, True), (0.6, False))


def test_augrc_and_auroc_of_failure_by_hand():
    ours = extended_metrics(*WORKED_EXAMPLE)
    # Of the four pairs of a right and a wrong answer, (.7, .8) alone has the wrong one first.
    assert ours["auroc_failure"] == near(100 * 3 / 4)
    # The curve goes through 0, 0, 1/4, 1/4, 1/2, in steps of 1/4.
    areas = [0 / 4, (0 + 1 / 4) / 2 / 4, 1 / 4 / 4, (1 / 4 + 1 / 2) / 2 / 4]
    assert sum(areas) == 0.1875
    assert ours["augrc"] == near(1000 * sum(areas))


def test_brier_score_by_hand():
    # Of two classes, both differ from the label by the same: (1 - p of the label).
    expected = 2 * (0.1**2 + 0.8**2 + 0.3**2 + 0.6**2) / 4
    assert extended_metrics(*WORKED_EXAMPLE)["brier"] == near(expected)
    logits = tensor([0.5, 0.3, 0.2]).log()
    assert extended_metrics(logits, torch.tensor([1]))["brier"] == near(0.5**2 + 0.7**2 + 0.2**2)


def test_adaptive_ece_by_hand_with_bins_of_two_and_one():
    # 16 samples by falling confidence, of which only the first two are in one bin: floor(15 / 16) is 0, floor(30 / 16)
    # is 1.
    confidence = [0.95 - 0.02 * i for i in range(16)]
    right = [False, True, *[i % 3 > 0 for i in range(14)]]
    gaps = [abs(0 + 1 - confidence[0] - confidence[1])]
    gaps += [abs(right[i] - confidence[i]) for i in range(2, 16)]
    ours = extended_metrics(*two_class(*zip(confidence, right, strict=True)))
    assert ours["adaptive_ece"] == near(100 * sum(gaps) / 16)


def test_adaptive_ece_divides_ties_over_a_border_among_its_bins():
    # 45 samples, three per bin: ranks 1 and 2 are above the tie, which takes ranks 3 to 6, one of four wrong; the bins
    # are ranks 1 to 3, 4 to 6, and then right answers of confidence 0.5.
    confidence = tensor(0.9, 0.9, *[0.8] * 4, *[0.5] * 39)
    error = tensor(1, 0, 0, 0, 0, 1, *[0] * 39)
    first = abs((0.5 + 0.5 + 0.75) - (0.9 + 0.9 + 0.8))
    second = abs(3 * 0.75 - 3 * 0.8)
    expected = (first + second + 39 * 0.5) / 45
    assert adaptive_calibration_error(confidence, error).item() == near(expected)


@given(st.lists(st.tuples(st.sampled_from([0.55, 0.6, 0.7, 0.9]), st.booleans()), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_extended_metrics_do_not_depend_on_the_order_of_the_data(samples):
    forward, backward = (extended_metrics(*two_class(*order)) for order in (samples, samples[::-1]))
    assert backward == {name: value if value is None else near(value) for name, value in forward.items()}


SAMPLES = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.4, 0.5, 0.9]), st.booleans()), min_size=1, max_size=30)


@given(SAMPLES)
@settings(deadline=None, max_examples=100)
def test_auroc_of_failure_counts_pairs_and_ties_half(samples):
    confidence, wrong = zip(*samples, strict=True)
    pairs = []
    for i, j in itertools.product(range(len(wrong)), repeat=2):
        if wrong[j] and not wrong[i]:
            pairs.append((confidence[i] > confidence[j]) + (confidence[i] == confidence[j]) / 2)
    ours = auroc_failure(tensor(*confidence), tensor(*wrong))
    assert ours is None if not pairs else ours.item() == near(sum(pairs) / len(pairs))


@given(SAMPLES)
@settings(deadline=None, max_examples=100)
def test_augrc_is_the_trapezoid_with_ties_as_one_point_and_fits_its_closed_form(samples):
    n, area, last = len(samples), 0, 0
    for level in sorted({c for c, _ in samples}, reverse=True):
        errors = sum(wrong for c, wrong in samples if c >= level)
        area += sum(c == level for c, _ in samples) / n * (last + errors) / n / 2
        last = errors
    confidence, error = (tensor(*values) for values in zip(*samples, strict=True))
    assert augrc(confidence, error).item() == near(area)
    accuracy = 1 - last / n
    auroc = auroc_failure(confidence, error)
    ranking = 0 if auroc is None else (1 - auroc.item()) * accuracy * (1 - accuracy)
    assert area == near(ranking + (1 - accuracy) ** 2 / 2)


@pytest.mark.parametrize("right", [True, False])
def test_extended_metrics_where_all_are_right_or_all_wrong(right):
    ours = extended_metrics(*two_class(*[(0.6 + 0.01 * i, right) for i in range(30)]))
    gap = sum(abs(right - (0.6 + 0.01 * i)) for i in range(30)) / 30
    brier = 2 * sum((right - (0.6 + 0.01 * i)) ** 2 for i in range(30)) / 30
    expected = {"augrc": 0 if right else 500, "brier": near(brier), "adaptive_ece": near(100 * gap)}
    assert ours == {**expected, "auroc_failure": None}  # there is no pair


def test_best_and_worst_ranking():
    best, worst = two_class((0.9, True), (0.6, False)), two_class((0.9, False), (0.6, True))
    assert extended_metrics(*best)["auroc_failure"] == 100
    assert extended_metrics(*best)["augrc"] == near(1000 / 8)
    assert extended_metrics(*worst)["auroc_failure"] == 0
    assert extended_metrics(*worst)["augrc"] == near(1000 * 3 / 8)


def test_metrics_table_shows_the_six_and_knows_the_four():
    six, four = classification_metrics(*WORKED_EXAMPLE), extended_metrics(*WORKED_EXAMPLE)
    assert METRICS.keys() == {**six, **four}.keys() and not six.keys() & four.keys()
    assert shown_metrics({"loss": 1.5, **four, **six}) == {"loss": 1.5, **six}


def test_chunks_of_rows_change_nothing():
    generator = torch.Generator().manual_seed(0)
    rows = 2 * CHUNK // 1000 + 5
    logits, labels = torch.randn(rows, 1000, generator=generator), torch.randint(1000, (rows,), generator=generator)
    probabilities = logits.double().softmax(dim=1)
    target = torch.nn.functional.one_hot(labels, 1000)
    expected = (probabilities - target).square().sum(dim=1).mean().item()
    assert extended_metrics(logits, labels)["brier"] == near(expected)
    nll = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert classification_metrics(logits, labels)["nll"] == near(nll)


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
    borders, error = tensor(*(i / 10 for i in range(1, 11))), tensor(0, 0, 0, 0, 1, 0, 0, 0, 0, 0)
    samples, confidence, right = reliability(borders, error)
    assert samples.tolist() == [1] * 10 and confidence.tolist() == borders.tolist()
    assert right.tolist() == (1 - error).tolist()
    samples, _, right = reliability((borders + 1e-9).clamp(max=1), error)  # each one bin up, but for 1
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
    with pytest.raises(NonFiniteError, match="not finite"):
        classification_metrics(torch.tensor([[1.0, 2.0, 3.0], row]), torch.tensor([2, 0]))


@pytest.mark.parametrize("shape, labels", [((2, 3), [0, 3]), ((2, 3), [-1, 0]), ((2, 3), [0, 1, 2]), ((0, 3), [])])
def test_labels_that_do_not_fit_are_refused(shape, labels):
    with pytest.raises(ValueError, match="labels") as raised:
        classification_metrics(torch.zeros(shape), torch.tensor(labels, dtype=torch.int64))
    assert raised.type is ValueError
