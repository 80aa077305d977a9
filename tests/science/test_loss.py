"""Each loss: a value worked out by hand, the route of its gradient, and its limits."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    INDEX,
    LABELS,
    assert_identical,
    gradients,
    leaves,
    near,
    objective_of,
    random_outputs,
    receives_gradient,
    tensor,
)

from loss.byot import BYOT
from loss.dml import DML
from loss.pskd import ProgressiveTargets
from models import Outputs

ZERO = torch.tensor([0])  # class and index of one image


def cross_entropy(p, q) -> float:
    return -sum(a * log(b) for a, b in zip(p, q, strict=True))


def kl(p, q) -> float:
    """KL(p || q)"""
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


def tempered(p):
    """Logits of one image whose softmax under temperature 2 is p, and without temperature p^2 / sum p^2."""
    return 2 * tensor(p).log()


@pytest.mark.parametrize("epsilon", [0, 0.2])
def test_byot_with_label_smoothing_by_hand(epsilon):
    """One image of class 0, tau = 2."""
    # P_B^tau, P_1^tau, P_2^tau
    final, one, two = (3 / 4, 1 / 4), (1 / 2, 1 / 2), (2 / 3, 1 / 3)
    exit_logits = tempered(one), tempered(two)
    exit_features = tensor([3, -4, 2]), tensor([-1, 1, 0])
    outputs = Outputs(tempered(final), tensor([1, -1, 0]), exit_logits, exit_features)
    objective = objective_of(f"--BYOT --alpha 0.1 --temperature 2 --beta 0.01 --label_smoothing {epsilon}")
    loss, parts = objective(outputs, ZERO, ZERO)

    y_soft = (1 - epsilon / 2, epsilon / 2)
    ce_final = cross_entropy(y_soft, (0.9, 0.1))
    ce_1 = cross_entropy(y_soft, (0.5, 0.5))
    ce_2 = cross_entropy(y_soft, (0.8, 0.2))
    all_ce = ce_final + ce_1 + ce_2
    all_kl = kl(final, one) + kl(final, two)  # the teacher first
    hint_1 = (3 - 1) ** 2 + (2 - 0) ** 2  # -4 against -1: neither is positive
    hint_2 = (-1 - 1) ** 2 + (1 + 1) ** 2
    expected = {
        "ce": ce_final,
        "byot_ce": 0.9 * all_ce,
        "byot_kl": 0.1 * 2**2 * all_kl,
        "byot_hint": 0.01 * (hint_1 + hint_2),
    }
    assert {name: part.item() for name, part in parts.items()} == near(expected)
    assert loss.item() == near(sum(expected.values()))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_byot_trains_exits_from_k_and_its_kl_and_hint_never_the_teacher(k):
    byot = BYOT(alpha=0.1, temperature=3, beta=1, from_block=k)
    outputs = random_outputs()
    parts = byot(outputs, LABELS, INDEX, 5)
    exit_logits = {f"exit_logits{i}" for i in range(k, 4)}
    exit_features = {f"exit_features{i}" for i in range(k, 4)}
    assert receives_gradient(parts["byot_ce"], outputs) == {"logits"} | exit_logits
    assert receives_gradient(parts["byot_kl"], outputs) == exit_logits
    assert receives_gradient(parts["byot_hint"], outputs) == exit_features


def test_byot_with_alpha_0_and_beta_0_is_deep_supervision():
    """The final cross-entropy counts twice: as L_CE, and as the last term of eq. 2."""
    outputs = random_outputs()
    loss, _ = objective_of("--BYOT --alpha 0 --beta 0")(outputs, LABELS, INDEX)
    expected = 0
    for logits in (outputs.logits, outputs.logits, *outputs.exit_logits):
        log_p = logits.log_softmax(dim=1)
        expected -= log_p[INDEX, LABELS].mean().item()
    assert loss.item() == near(expected)


# Softmaxes of one image: the final classifier's, exit 1's, exit 2's.
FINAL, ONE, TWO = (1 / 2, 1 / 2), (3 / 4, 1 / 4), (1 / 5, 4 / 5)


def shifted(p):
    """Values of one image whose softmax is p."""
    return tensor(p).log() + 5


@pytest.mark.parametrize(
    "words, divergence", [("", kl), ("--DML_on_output", kl), ("--DML_as_published", cross_entropy)]
)
def test_dml_by_hand(words, divergence):
    """Both ways between each exit and the final classifier, of the softmaxes of features or of those of logits."""
    final, one, two = map(shifted, (FINAL, ONE, TWO))
    other = tensor([1, 2])
    outputs = Outputs(other, final, (other, other), (one, two))
    if words == "--DML_on_output":
        outputs = Outputs(final, other, (one, two), (other, other))
    _, parts = objective_of(f"--DML {words}")(outputs, ZERO, ZERO)
    both_ways = [divergence(p, FINAL) + divergence(FINAL, p) for p in (ONE, TWO)]
    assert parts["dml"].item() == near(sum(both_ways) / 2)


def dml_value(on_output: bool, outputs: Outputs):
    return DML(on_output)(outputs, LABELS, INDEX, 5)["dml"]


@pytest.mark.parametrize("on_output, final", [(False, "feature"), (True, "logits")])
def test_dml_gradient_goes_both_ways(on_output, final):
    outputs = random_outputs()
    expected = {name for name in leaves(outputs) if final in name}
    assert len(expected) == 4
    assert receives_gradient(dml_value(on_output, outputs), outputs) == expected


@pytest.mark.parametrize("on_output", [False, True])
def test_dml_between_equals_is_0(on_output):
    logits, feature, _, _ = random_outputs()
    equal = Outputs(logits, feature, (logits,) * 3, (feature,) * 3)
    assert dml_value(on_output, equal) == 0


@pytest.mark.parametrize("others", ["", "--BYOT", "--PSKD"])
def test_published_dml_leaves_the_gradients_as_without_it_to_the_bit(others):
    outputs = random_outputs()
    without, _ = objective_of(others)(outputs, LABELS, INDEX)
    loss, _ = objective_of(f"{others} --DML --DML_as_published")(outputs, LABELS, INDEX)
    assert loss > without
    assert_identical(gradients(loss, outputs), gradients(without, outputs))


@pytest.fixture
def targets():
    """y_soft of three images of two classes; alpha_t = 0.8 (t + 1) / 4."""
    return ProgressiveTargets(num_samples=3, num_classes=2, alpha_T=0.8, num_epochs=4).double()


def predictions(*p) -> Outputs:
    """Outputs with these probabilities."""
    return Outputs(tensor(*p).log().requires_grad_(), feature=None)


PAST = [0.75, 0.25], [0.2, 0.8]
PAST_LABELS = torch.tensor([1, 0])
PAST_INDEX = torch.tensor([2, 0])


def test_pskd_records_predictions_in_the_rows_of_their_images(targets):
    targets(predictions(*PAST), PAST_LABELS, PAST_INDEX)
    assert targets.memory.dtype == torch.float64
    assert not targets.memory.requires_grad
    assert targets.memory.flatten().tolist() == near([0.2, 0.8, 0, 0, 0.75, 0.25])


def test_pskd_records_nothing_in_evaluation_mode(targets):
    targets.eval()
    targets(predictions(*PAST), PAST_LABELS, PAST_INDEX)
    assert not targets.memory.any()


def test_pskd_targets_by_hand(targets):
    past = predictions(*PAST)
    targets(past, PAST_LABELS, PAST_INDEX)
    targets.set_epoch(1)
    assert targets.alpha_t == near(0.4)  # 0.8 (1 + 1) / 4
    labels = torch.tensor([1, 0, 1])
    index = torch.tensor([2, 0, 1])
    y_soft = targets.eval()(past, labels, index)
    first = [0.3, 0.7]  # image 2, label 1: 0.6 (0, 1) + 0.4 (0.75, 0.25)
    second = [0.68, 0.32]  # image 0, label 0: 0.6 (1, 0) + 0.4 (0.2, 0.8)
    new = [0, 1]  # image 1, label 1
    assert y_soft.flatten().tolist() == near([*first, *second, *new])


def test_pskd_targets_mix_with_soft_labels_by_hand(targets):
    """alpha_t = 0.4 in epoch 1 of 4; image 1 has not been seen yet, so that its y_soft is its soft label."""
    targets(predictions([0.75, 0.25]), tensor([0.5, 0.5]), ZERO)
    assert targets.memory[0].tolist() == near([0.75, 0.25])  # the prediction, whatever the label
    targets.set_epoch(1)
    both = predictions([0.1, 0.9], [0.9, 0.1])
    soft_labels = tensor([0.7, 0.3], [0.1, 0.9])
    y_soft = targets.eval()(both, soft_labels, torch.arange(2))
    seen = [0.6 * 0.7 + 0.4 * 0.75, 0.6 * 0.3 + 0.4 * 0.25]
    assert y_soft.flatten().tolist() == near([*seen, 0.1, 0.9])


@pytest.mark.parametrize("alpha_T, epochs", [(0.8, 1), (0.0, 3)])
def test_pskd_targets_are_one_hot_to_the_bit_in_the_first_epoch_and_with_alpha_T_0(alpha_T, epochs):
    targets = ProgressiveTargets(5, 4, alpha_T, 3)
    one_hot = F.one_hot(LABELS, 4).float()
    for epoch in range(epochs):
        targets.set_epoch(epoch)
        for _ in range(2):  # the second time the memory is filled
            y_soft = targets(random_outputs(), LABELS, INDEX)
            assert torch.equal(y_soft, one_hot)


def descend(weight, loss) -> None:
    """A large step, so that a prediction recorded after it would show."""
    (gradient,) = torch.autograd.grad(loss, weight)
    weight.data -= 0.5 * gradient


def test_pskd_targets_are_the_predictions_of_the_previous_epoch_before_each_update():
    """Four epochs of seven images in changing order, on a linear network, against the equations written out."""
    images = torch.arange(21, dtype=torch.float64).view(7, 3).cos()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    y = F.one_hot(labels, 4).double()
    objective = objective_of("--PSKD --alpha_T 0.7 --end_epoch 4", num_samples=7)
    weight = torch.arange(12, dtype=torch.float64).view(4, 3).sin().requires_grad_()
    reference = weight.detach().clone().requires_grad_()
    previous, current = y, torch.zeros_like(y)
    for epoch in range(4):
        objective.set_epoch(epoch)
        alpha_t = 0.7 * (epoch + 1) / 4
        generator = torch.Generator().manual_seed(epoch)
        for index in torch.randperm(7, generator=generator).split(3):
            outputs = Outputs(images[index] @ weight.T, feature=None)
            loss, _ = objective(outputs, labels[index], index)

            logits = images[index] @ reference.T
            log_p = logits.log_softmax(dim=1)
            y_soft = (1 - alpha_t) * y[index] + alpha_t * previous[index]
            by_hand = -(y_soft * log_p).sum(dim=1).mean()
            current[index] = log_p.detach().exp()

            assert loss.item() == near(by_hand.item())
            descend(weight, loss)
            descend(reference, by_hand)
        objective.end_epoch()
        previous = current.clone()
        torch.testing.assert_close(objective.soften.memory, previous, rtol=1e-12, atol=0)


def test_label_smoothing_smooths_soft_labels_by_hand():
    objective = objective_of("--label_smoothing 0.2", num_classes=2)
    _, parts = objective(predictions([0.25, 0.75]), tensor([0.7, 0.3]), ZERO)
    y_soft = (0.8 * 0.7 + 0.1, 0.8 * 0.3 + 0.1)
    assert parts["ce"].item() == near(cross_entropy(y_soft, (0.25, 0.75)))


def loss_after_an_epoch(words: str, labels) -> float:
    """In the second of two epochs."""
    objective = objective_of(f"{words} --end_epoch 2")
    for epoch in range(2):
        objective.set_epoch(epoch)
        loss, _ = objective(random_outputs(epoch), labels, INDEX)
        objective.end_epoch()
    return loss.item()


@pytest.mark.parametrize("words", ["", "--label_smoothing 0.1", "--PSKD", "--BYOT", "--DML", "--PSKD --BYOT --DML"])
def test_one_hot_probabilities_give_the_loss_of_their_classes(words):
    one_hot = F.one_hot(LABELS, 4).float()
    of_classes = loss_after_an_epoch(words, LABELS)
    assert loss_after_an_epoch(words, one_hot) == near(of_classes)
