"""The metrics on cases small enough to follow, at their edges, and against independent definitions."""

import itertools
from fractions import Fraction
from math import exp, inf, log, nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from utils.metrics import NUM_BINS, classification_metrics, confidence_and_wrong, reliability, risk_coverage_curve

PERFECT = {"top1_error": 0, "top5_error": 0, "nll": 0, "ece": 0, "aurc": 0, "eaurc": 0}


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def near(value):
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def two_class(*confidences_and_right):
    """Logits and labels of two-class predictions with these confidences, all of class 0, right or wrong."""
    logits = tensor(*([c, 1 - c] for c, _ in confidences_and_right)).log()
    return logits, torch.tensor([int(not right) for _, right in confidences_and_right])


def random_case(m=300, k=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(m, k, dtype=torch.float64, generator=generator)
    guess = torch.randint(k, (m,), generator=generator)
    labels = torch.where(torch.rand(m, generator=generator) < 0.6, logits.argmax(1), guess)
    return logits, labels


def test_five_predictions_by_hand():
    logits, labels = two_class((0.78, True), (0.95, True), (0.72, False), (0.85, False), (0.55, True))
    ours = classification_metrics(logits, labels)
    assert ours["top1_error"] == near(100 * 2 / 5)
    assert ours["top5_error"] == 0
    # The label's probability: the confidence where right, the rest where wrong.
    assert ours["nll"] == near(-(log(0.78) + log(0.95) + log(0.28) + log(0.15) + log(0.55)) / 5)
    # |right answers - confidence|, summed in each bin: 0.9 to 1, 0.8 to 0.9, 0.7 to 0.8 (two), 0.5 to 0.6.
    gaps = abs(1 - 0.95) + abs(0 - 0.85) + abs(1 + 0 - 0.78 - 0.72) + abs(1 - 0.55)
    assert ours["ece"] == near(100 * gaps / 5)
    # By falling confidence: right, wrong, right, wrong, right.
    aurc = 1000 * (0 / 1 + 1 / 2 + 1 / 3 + 2 / 4 + 2 / 5) / 5
    assert ours["aurc"] == near(aurc)
    # With the same two errors, the best order has them last.
    assert ours["eaurc"] == near(aurc - 1000 * (0 / 1 + 0 / 2 + 0 / 3 + 1 / 4 + 2 / 5) / 5)
    assert list(ours) == list(PERFECT) and all(type(value) is float for value in ours.values())


def test_errors_count_the_place_of_the_label():
    logits = tensor([7, 6, 5, 4, 3, 2, 1]).expand(7, 7)
    ours = classification_metrics(logits, torch.arange(7))
    assert ours["top1_error"] == near(100 * 6 / 7)  # places 2 to 7
    assert ours["top5_error"] == near(100 * 2 / 7)  # places 6 and 7


def test_where_logits_tie_the_lower_class_comes_first():
    logits = torch.zeros(1, 8)
    for label in range(8):
        ours = classification_metrics(logits, torch.tensor([label]))
        assert ours["top1_error"] == (0 if label == 0 else 100)
        assert ours["top5_error"] == (0 if label < 5 else 100)
    # One class above; class 3 and those before it tie with the label, the last one does not.
    ours = classification_metrics(tensor([1, 1, 1, 1, 0, 1, 2]), torch.tensor([5]))
    assert ours["top5_error"] == 100
    ours = classification_metrics(tensor([1, 1, 1, 0, 0, 1, 2]), torch.tensor([5]))
    assert ours["top5_error"] == 0


@pytest.mark.parametrize("k", range(1, 8))
def test_fewer_than_six_classes_have_no_top5_error(k):
    ours = classification_metrics(-torch.arange(k, dtype=torch.float64)[None], torch.tensor([k - 1]))
    assert ours["top5_error"] == (0 if k < 6 else 100)
    assert ours["top1_error"] == (0 if k == 1 else 100)


def test_one_class_is_always_right_and_sure():
    assert classification_metrics(tensor([3], [-2]), torch.tensor([0, 0])) == PERFECT


def test_one_sample():
    (logits, right), (_, wrong) = two_class((0.84, True)), two_class((0.84, False))
    assert classification_metrics(logits, right) == near(PERFECT | {"nll": -log(0.84), "ece": 16})
    expected = {"top1_error": 100, "nll": -log(0.16), "ece": 84, "aurc": 1000, "eaurc": 0}
    assert classification_metrics(logits, wrong) == near(PERFECT | expected)


def test_all_right_and_all_wrong():
    logits, _ = random_case()
    right = classification_metrics(logits, logits.argmax(1))
    assert right["top1_error"] == right["top5_error"] == right["aurc"] == right["eaurc"] == 0
    wrong = classification_metrics(logits, logits.argmin(1))
    assert wrong["top1_error"] == wrong["top5_error"] == 100
    assert wrong["aurc"] == near(1000) and wrong["eaurc"] == near(0)
    confidence = logits.softmax(1).amax(1).mean().item()
    assert wrong["ece"] == near(100 * confidence) and right["ece"] == near(100 * (1 - confidence))


def test_perfect_order_has_no_excess():
    ours = classification_metrics(*two_class((0.6, False), (0.9, True), (0.7, True), (0.55, False), (0.8, True)))
    assert ours["aurc"] == near(1000 * (1 / 4 + 2 / 5) / 5) and ours["eaurc"] == near(0)


def test_a_bin_holds_its_upper_border():
    # Two equal logits: confidence 1/2 exactly, which belongs with 0.45 to the bin from 0.4 to 0.5. There 1/2 right
    # and 0.45 wrong make up for each other; in two bins they would not: (0.5 + 0.45) / 2.
    logits = tensor([0, 0, -inf], [log(0.45), log(0.3), log(0.25)])
    assert logits[:1].softmax(1).max() == 0.5
    assert classification_metrics(logits, torch.tensor([0, 1]))["ece"] == near(100 * abs(1 - 0.5 - 0.45) / 2)
    # And not with 0.55 to the next one.
    logits = tensor([0, 0, -inf], [log(0.55), log(0.3), log(0.15)])
    assert classification_metrics(logits, torch.tensor([0, 1]))["ece"] == near(100 * (0.5 + 0.55) / 2)


def test_bins_are_equally_wide_open_below_and_closed_above():
    assert NUM_BINS == 10
    borders = tensor(*(i / 10 for i in range(1, 11)))
    wrong = tensor(0, 0, 0, 0, 1, 0, 0, 0, 0, 0)
    samples, confident, right = reliability(borders, wrong)
    assert samples.tolist() == [1] * 10 and confident.tolist() == borders.tolist()
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
    logits = torch.tensor([[float(v), 0.0] for v in level])
    ours = classification_metrics(logits, torch.tensor(wrong).long())
    aurc = brute_force_aurc(level, wrong)
    best = brute_force_aurc([not w for w in wrong], wrong)
    assert ours["aurc"] == near(float(1000 * aurc))
    assert ours["eaurc"] == near(float(1000 * (aurc - best)))


def test_curve_of_ties_by_hand():
    # The first place is sure; two of the three in the middle are wrong: 2/3 an error a place.
    curve = risk_coverage_curve(tensor(0.5, 0.9, 0.5, 0.1, 0.5), tensor(1, 0, 0, 1, 1))
    expected = [0, (2 / 3) / 2, (4 / 3) / 3, 2 / 4, 3 / 5]
    assert curve.tolist() == near(expected)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_order_of_the_data_does_not_matter(seed, m, k):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(3, (m, k), generator=generator).float()  # many ties
    labels = torch.randint(k, (m,), generator=generator)
    order = torch.randperm(m, generator=generator)
    ours = classification_metrics(logits, labels)
    assert classification_metrics(logits[order], labels[order]) == pytest.approx(ours, rel=1e-12, abs=1e-10)
    assert 0 <= ours["aurc"] <= 1000 + 1e-9 and ours["eaurc"] >= -1e-9


@given(st.floats(-100, 100), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_what_is_added_to_all_logits_of_a_sample_does_not_matter(constant, seed):
    logits, labels = random_case(m=20, k=7, seed=seed)
    ours = classification_metrics(logits, labels)
    assert classification_metrics(logits + constant, labels) == pytest.approx(ours, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_against_torchmetrics_and_pytorch(seed):
    """No confidence lies on a border of a bin here, where its calibration error puts it into the next one."""
    logits, labels = random_case(seed=seed)
    p, k = logits.softmax(1), logits.shape[1]
    ours = classification_metrics(logits, labels)
    theirs = multiclass_calibration_error(p, labels, num_classes=k, n_bins=10, norm="l1")
    assert ours["ece"] == pytest.approx(100 * theirs.item(), rel=1e-5)
    for top in (1, 5):
        accuracy = multiclass_accuracy(p, labels, num_classes=k, top_k=top, average="micro")
        assert ours[f"top{top}_error"] == pytest.approx(100 * (1 - accuracy.item()), rel=1e-5)
    assert ours["nll"] == near(F.cross_entropy(logits, labels).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_floating_type_is_computed_in_float64(dtype):
    logits, labels = random_case()
    logits = logits.to(dtype).requires_grad_()
    ours = classification_metrics(logits, labels)
    assert ours == classification_metrics(logits.detach().double(), labels)
    # In float32 both confidences are 1: a tie, which would spread the error over both places.
    sharp = torch.tensor([[20, 0], [19, 0]], dtype=dtype)
    assert (sharp.float().softmax(1)[:, 0] == 1).all()
    assert classification_metrics(sharp, torch.tensor([0, 1]))["aurc"] == near(1000 * (0 / 1 + 1 / 2) / 2)


def test_large_logits_do_not_overflow():
    logits = tensor([1e300, 0, -1e300], [0, 800, 0])
    ours = classification_metrics(logits, torch.tensor([0, 2]))
    assert ours["nll"] == near(800 / 2) and ours["top1_error"] == 50


def test_minus_infinity_is_a_probability_of_zero():
    with_it = classification_metrics(tensor([1, 0, -inf], [-inf, 0, 2]), torch.tensor([0, 1]))
    assert with_it == near(classification_metrics(tensor([1, 0], [2, 0]), torch.tensor([0, 1])))
    assert with_it["nll"] == near((log(1 + exp(-1)) + log(1 + exp(2))) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("row", [[nan, 0, 0], [0, 0, nan], [inf, 0, 0], [inf, -inf, 0], [nan, inf, 0], [-inf] * 3])
def test_logits_that_are_no_prediction_are_refused(row, dtype):
    logits = torch.tensor([[1.0, 2.0, 3.0], row, [3.0, 2.0, 1.0]], dtype=dtype)
    with pytest.raises(ValueError, match="not finite"):
        classification_metrics(logits, torch.tensor([2, 0, 0]))


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0], [0, 100]])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(ValueError, match=r"0\.\.2"):
        classification_metrics(torch.zeros(2, 3), torch.tensor(labels))


@pytest.mark.parametrize("logits, labels", [((2, 3), (3,)), ((2, 3), (2, 1)), ((3,), (3,)), ((1, 2, 3), (1,)),
                                            ((2, 3), ()), ((0, 3), (0,))])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(logits, labels):
    with pytest.raises(ValueError, match="need logits"):
        classification_metrics(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


def test_the_curves_are_drawn_of_what_the_metrics_are_computed_of():
    """Ties among the logits included: the lower class is the prediction."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randint(4, (500, 10), generator=generator), torch.randint(10, (500,), generator=generator)
    confidence, wrong = confidence_and_wrong(logits.float(), labels)
    expected = classification_metrics(logits.float(), labels)
    assert 100 * wrong.mean().item() == pytest.approx(expected["top1_error"], rel=1e-12)
    curve = risk_coverage_curve(confidence, wrong)
    assert 1000 * curve.mean().item() == pytest.approx(expected["aurc"], rel=1e-12)
