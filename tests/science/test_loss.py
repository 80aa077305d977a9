"""Each loss: a value worked out by hand, the route of its gradient, and its limits."""

import copy
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loss import build_objective, trained_exits
from loss.byot import BYOT
from loss.dml import DML
from loss.objective import CrossEntropy, Objective, Term
from loss.pskd import ProgressiveTargets
from main import parse_args
from models import Outputs
from utils import distributed

LABELS, INDEX = torch.tensor([0, 1, 2, 3, 0]), torch.arange(5)


def flags(words: str):
    return parse_args(["--device", "cpu", *words.split()])


def objective_of(words: str, num_samples: int = 5, num_classes: int = 4) -> Objective:
    return build_objective(flags(words), num_samples, num_classes).double()


def tensor(*rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def near(value: float):
    return pytest.approx(value, rel=1e-12, abs=1e-15)


def random_outputs(seed: int = 0, exits: int = 3) -> Outputs:
    """N = 5, K = 4, D = 6 in float64; leaves, so that gradients show who gets one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        return torch.randn(5, width, dtype=torch.float64, generator=generator).requires_grad_()

    return Outputs(draw(4), draw(6), tuple(draw(4) for _ in range(exits)), tuple(draw(6) for _ in range(exits)))


def rows(outputs: Outputs, index: Tensor) -> Outputs:
    """The outputs for these images of the batch."""
    exit_logits, exit_features = (tuple(t[index] for t in exits) for exits in outputs[2:])
    return Outputs(outputs.logits[index], outputs.feature[index], exit_logits, exit_features)


def receives_gradient(part: Tensor, outputs: Outputs) -> set[str]:
    """Names of the outputs that `part` sends a gradient to: logits, feature, exit_logits1, exit_features1, ..."""
    leaves = {"logits": outputs.logits, "feature": outputs.feature}
    for kind in ("exit_logits", "exit_features"):
        leaves |= {f"{kind}{i}": t for i, t in enumerate(getattr(outputs, kind), start=1)}
    gradients = torch.autograd.grad(part, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name for name, g in zip(leaves, gradients, strict=True) if g is not None and g.any()}


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("epsilon", [0, 0.2])
def test_byot_with_label_smoothing_by_hand(epsilon):
    """One image of class 0. For tau = 2, logits = 2 ln p have P^tau = p and P = p^2 / sum p^2."""
    logits = [2 * tensor(p).log() for p in ([3 / 4, 1 / 4], [1 / 2, 1 / 2], [2 / 3, 1 / 3])]
    features = [tensor(f) for f in ([1, -1, 0], [3, -4, 2], [-1, 1, 0])]
    outputs = Outputs(logits[0], features[0], tuple(logits[1:]), tuple(features[1:]))
    words = f"--BYOT --alpha 0.1 --temperature 2 --beta 0.01 --label_smoothing {epsilon}"
    loss, parts = objective_of(words)(outputs, torch.tensor([0]), torch.tensor([0]))
    # P_B = (9/10, 1/10), P_1 = (1/2, 1/2), P_2 = (4/5, 1/5); y_soft = (1 - epsilon / 2, epsilon / 2)
    y = (1 - epsilon / 2, epsilon / 2)
    ce_final, ce_1, ce_2 = (-y[0] * log(p) - y[1] * log(1 - p) for p in (9 / 10, 1 / 2, 4 / 5))
    # The teacher first: sum over classes of P_B^tau ln(P_B^tau / P_i^tau).
    kl_1 = 3 / 4 * log((3 / 4) / (1 / 2)) + 1 / 4 * log((1 / 4) / (1 / 2))
    kl_2 = 3 / 4 * log((3 / 4) / (2 / 3)) + 1 / 4 * log((1 / 4) / (1 / 3))
    hint_1 = (3 - 1) ** 2 + 0 + (2 - 0) ** 2  # -4 against -1: neither is positive
    hint_2 = (-1 - 1) ** 2 + (1 + 1) ** 2 + 0
    expected = {"ce": ce_final, "byot_ce": 0.9 * (ce_final + ce_1 + ce_2)}
    expected |= {"byot_kl": 0.1 * 2**2 * (kl_1 + kl_2), "byot_hint": 0.01 * (hint_1 + hint_2)}
    assert {name: part.item() for name, part in parts.items()} == near(expected)
    assert loss.item() == near(sum(expected.values()))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_byot_trains_exits_from_k_and_its_kl_and_hint_never_the_teacher(k):
    outputs = random_outputs()
    parts = BYOT(alpha=0.1, temperature=3, beta=1, from_block=k)(outputs, LABELS, INDEX, 5)
    exit_logits = {f"exit_logits{i}" for i in range(k, 4)}
    assert receives_gradient(parts["byot_ce"], outputs) == {"logits"} | exit_logits
    assert receives_gradient(parts["byot_kl"], outputs) == exit_logits
    assert receives_gradient(parts["byot_hint"], outputs) == {f"exit_features{i}" for i in range(k, 4)}


def test_byot_with_alpha_0_and_beta_0_is_deep_supervision():
    """The final cross-entropy counts twice: as L_CE, and as the last term of eq. 2."""
    outputs = random_outputs()
    loss, _ = objective_of("--BYOT --alpha 0 --beta 0")(outputs, LABELS, INDEX)
    by_hand = [-logits.log_softmax(1)[INDEX, LABELS].mean() for logits in (outputs.logits, *outputs.exit_logits)]
    assert loss.item() == near((by_hand[0] + sum(by_hand)).item())


@pytest.mark.parametrize("words", ["", "--DML_on_output", "--DML_as_published"])
def test_dml_by_hand(words):
    """One image, two exits with softmaxes (3/4, 1/4) and (1/5, 4/5), a final one with (1/2, 1/2)."""
    final, one, two = (tensor(p).log() + 5 for p in ([1 / 2, 1 / 2], [3 / 4, 1 / 4], [1 / 5, 4 / 5]))
    other = tensor([1, 2])
    outputs = Outputs(other, final, (other, other), (one, two))
    if words == "--DML_on_output":
        outputs = Outputs(final, other, (one, two), (other, other))
    # KL(F_i || F_B) + KL(F_B || F_i)
    kl_1 = 3 / 4 * log((3 / 4) / (1 / 2)) + 1 / 4 * log((1 / 4) / (1 / 2))
    kl_1 += 1 / 2 * log((1 / 2) / (3 / 4)) + 1 / 2 * log((1 / 2) / (1 / 4))
    kl_2 = 1 / 5 * log((1 / 5) / (1 / 2)) + 4 / 5 * log((4 / 5) / (1 / 2))
    kl_2 += 1 / 2 * log((1 / 2) / (1 / 5)) + 1 / 2 * log((1 / 2) / (4 / 5))
    expected = (kl_1 + kl_2) / 2
    if words == "--DML_as_published":  # cross-entropies, -sum p ln q, both ways
        expected = (log(2) - 1 / 2 * log(3 / 4 * 1 / 4) + log(2) - 1 / 2 * log(1 / 5 * 4 / 5)) / 2
    _, parts = objective_of(f"--DML {words}")(outputs, torch.tensor([0]), torch.tensor([0]))
    assert parts["dml"].item() == near(expected)


@pytest.mark.parametrize("on_output", [False, True])
def test_dml_gradient_goes_both_ways_value_is_symmetric_and_0_between_equals(on_output):
    dml, outputs = DML(on_output), random_outputs()
    expected = {"logits", "exit_logits1", "exit_logits2", "exit_logits3"}
    if not on_output:
        expected = {"feature", "exit_features1", "exit_features2", "exit_features3"}
    assert receives_gradient(dml(outputs, LABELS, INDEX, 5)["dml"], outputs) == expected
    outputs = random_outputs(exits=1)
    exchanged = Outputs(outputs.exit_logits[0], outputs.exit_features[0], outputs[:1], outputs[1:2])
    value = dml(outputs, LABELS, INDEX, 5)["dml"].item()
    assert value > 0.1 and dml(exchanged, LABELS, INDEX, 5)["dml"].item() == near(value)
    equal = Outputs(outputs.logits, outputs.feature, outputs[:1] * 3, outputs[1:2] * 3)
    assert dml(equal, LABELS, INDEX, 5)["dml"] == 0


@pytest.mark.parametrize("others", ["", "--BYOT", "--PSKD"])
def test_published_dml_is_a_number_and_leaves_the_gradients_as_without_it_to_the_bit(others):
    outputs, gradients = random_outputs(), []
    leaves = [outputs.logits, outputs.feature, *outputs.exit_logits, *outputs.exit_features]
    for words in (others, f"{others} --DML --DML_as_published"):
        loss, _ = objective_of(words)(outputs, LABELS, INDEX)
        gradients.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    assert all(map(torch.equal, *gradients))


def test_progressive_targets_by_hand():
    targets = ProgressiveTargets(num_samples=3, num_classes=2, alpha_T=0.8, num_epochs=4).double()
    past = Outputs(tensor([3 / 4, 1 / 4], [1 / 5, 4 / 5]).log().requires_grad_(), feature=None)
    labels, index = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1])
    targets.eval()(past, labels[:2], index[:2])
    assert not targets.memory.any()
    targets.train()(past, labels[:2], index[:2])
    assert targets.memory.dtype == torch.float64 and not targets.memory.requires_grad
    assert targets.memory.flatten().tolist() == near([1 / 5, 4 / 5, 0, 0, 3 / 4, 1 / 4])
    targets.set_epoch(1)
    assert targets.alpha_t == near(0.4)  # 0.8 (1 + 1) / 4
    # Image 2, label 1: 0.6 (0, 1) + 0.4 (3/4, 1/4); image 0, label 0: 0.6 (1, 0) + 0.4 (1/5, 4/5); image 1 is new.
    y_soft = targets.eval()(past, labels, index)
    assert y_soft.flatten().tolist() == near([0.3, 0.7, 0.68, 0.32, 0, 1])


def test_progressive_targets_mix_with_soft_labels_by_hand():
    """alpha_t = 0.4 in epoch 1 of 4; image 1 has not been seen yet, so that its y_soft is its soft label."""
    targets = ProgressiveTargets(num_samples=2, num_classes=2, alpha_T=0.8, num_epochs=4).double()
    mixed_view = Outputs(tensor([3 / 4, 1 / 4]).log(), feature=None)
    targets.train()(mixed_view, tensor([0.5, 0.5]), torch.tensor([0]))
    assert targets.memory[0].tolist() == near([3 / 4, 1 / 4])  # the prediction, whatever the label
    targets.set_epoch(1)
    both = Outputs(tensor([1, 0], [0, 1]), feature=None)
    y_soft = targets.eval()(both, tensor([0.7, 0.3], [0.1, 0.9]), torch.arange(2))
    assert y_soft.flatten().tolist() == near([0.6 * 0.7 + 0.4 * 3 / 4, 0.6 * 0.3 + 0.4 * 1 / 4, 0.1, 0.9])


def test_label_smoothing_smooths_soft_labels_by_hand():
    outputs = Outputs(tensor([1 / 4, 3 / 4]).log(), feature=None)
    _, parts = objective_of("--label_smoothing 0.2", num_classes=2)(outputs, tensor([0.7, 0.3]), torch.tensor([0]))
    y_soft = (0.8 * 0.7 + 0.1, 0.8 * 0.3 + 0.1)
    assert parts["ce"].item() == near(-y_soft[0] * log(1 / 4) - y_soft[1] * log(3 / 4))


@pytest.mark.parametrize("words", ["", "--label_smoothing 0.1", "--PSKD", "--BYOT", "--DML", "--PSKD --BYOT --DML"])
def test_one_hot_probabilities_give_the_loss_of_their_classes(words):
    objectives, losses = [objective_of(f"{words} --end_epoch 2") for _ in range(2)], []
    for objective, labels in zip(objectives, (LABELS, F.one_hot(LABELS, 4).float()), strict=True):
        for epoch in range(2):
            objective.set_epoch(epoch)
            loss, _ = objective(random_outputs(epoch), labels, INDEX)
            objective.end_epoch()
        losses.append(loss.item())
    assert losses[0] == near(losses[1])


def test_targets_are_one_hot_to_the_bit_in_the_first_epoch_and_with_alpha_T_0():
    for alpha_T, epochs in ((0.8, [0]), (0.0, range(3))):
        targets = ProgressiveTargets(5, 4, alpha_T, 3).train()
        for epoch in epochs:
            targets.set_epoch(epoch)
            for _ in range(2):  # the second time the memory is filled
                assert torch.equal(targets(random_outputs(), LABELS, INDEX), F.one_hot(LABELS, 4).float())


def test_targets_are_the_predictions_of_the_previous_epoch_before_each_update():
    """Four epochs of seven images in changing order, against the equations written out."""
    images, labels = torch.arange(21, dtype=torch.float64).view(7, 3).cos(), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    y = F.one_hot(labels, 4).double()
    objective = objective_of("--PSKD --alpha_T 0.7 --end_epoch 4", num_samples=7).train()
    weight = torch.arange(12, dtype=torch.float64).view(4, 3).sin().requires_grad_()
    reference = weight.detach().clone().requires_grad_()
    previous, current = y, torch.zeros_like(y)
    for epoch in range(4):
        objective.set_epoch(epoch)
        alpha_t = 0.7 * (epoch + 1) / 4
        for index in torch.randperm(7, generator=torch.Generator().manual_seed(epoch)).split(3):
            loss, _ = objective(Outputs(images[index] @ weight.T, feature=None), labels[index], index)
            log_p = (images[index] @ reference.T).log_softmax(1)
            y_soft = (1 - alpha_t) * y[index] + alpha_t * previous[index]
            by_hand = -(y_soft * log_p).sum(1).mean()
            current[index] = log_p.detach().exp()
            assert loss.item() == near(by_hand.item())
            for w, value in ((weight, loss), (reference, by_hand)):
                (gradient,) = torch.autograd.grad(value, w)
                w.data -= 0.5 * gradient  # a large step, so that recording after it would show
        objective.end_epoch()
        previous = current.clone()
        torch.testing.assert_close(objective.targets.memory, previous, rtol=1e-12, atol=0)


class Consistency(Term):
    """mean over the batch of ||P_B - p_prev||^2, p_prev the prediction in the previous epoch, from epoch 1 on."""

    def __init__(self, num_samples: int, num_classes: int):
        super().__init__()
        self.register_buffer("memory", torch.zeros(num_samples, num_classes))
        self.register_buffer("current", torch.zeros(num_samples, num_classes))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def end_epoch(self) -> None:
        self.memory.copy_(self.current)

    def forward(self, outputs, targets, index, batch_size):
        p = outputs.logits.softmax(1)
        self.current[index] = p.detach().to(self.current.dtype)
        return {"consistency": (self.epoch > 0) * ((p - self.memory[index]) ** 2).sum(1).mean()}


def test_own_term_with_a_memory_gets_index_and_epochs():
    objective = Objective([CrossEntropy(), Consistency(5, 4)]).double()
    outputs = [random_outputs(seed) for seed in range(2)]
    difference = outputs[1].logits.softmax(1) - outputs[0].logits.softmax(1)
    for epoch in range(2):
        objective.set_epoch(epoch)
        for half in (INDEX[3:], INDEX[:3]):
            _, parts = objective(rows(outputs[epoch], half), LABELS[half], half, batch_size=len(half))
        assert parts["consistency"].item() == near(epoch * (difference[:3] ** 2).sum(1).mean().item())
        objective.end_epoch()


@pytest.mark.parametrize("words", ["--PSKD --BYOT --DML", "--DML --DML_on_output", "--DML --DML_as_published"])
def test_losses_of_five_exits_take_as_many_operations_as_those_of_one(words):
    """Exits are stacked: on a GPU each operation is a launch."""
    counts = []
    for exits in (1, 5):
        objective, outputs = objective_of(words), random_outputs(exits=exits)
        with CountOperations() as counter:
            objective(outputs, LABELS, INDEX)
        counts.append(counter.count)
    assert counts[0] == counts[1] > 10


@pytest.mark.parametrize("words", ["", "--PSKD", "--BYOT", "--DML", "--PSKD --BYOT --DML"])
def test_parts_add_up_and_a_restored_objective_gives_identical_losses(words):
    objectives = [objective_of(f"{words} --end_epoch 3") for _ in range(2)]
    for objective in objectives:
        objective.terms.append(Consistency(5, 4).double())
    first, restored = objectives
    byot, dml = ["byot_ce", "byot_kl", "byot_hint"] * ("BYOT" in words), ["dml"] * ("DML" in words)
    for epoch in range(2):
        first.set_epoch(epoch)
        loss, parts = first(random_outputs(epoch), LABELS, INDEX)
        first.end_epoch()
        assert list(parts) == ["ce", *byot, *dml, "consistency"]
        assert sum(parts.values()).item() == near(loss.item()) and not any(p.requires_grad for p in parts.values())
        assert first.alpha_t == (near(0.8 * (epoch + 1) / 3) if "PSKD" in words else None)
    restored.load_state_dict(first.state_dict())
    for objective in objectives:
        objective.set_epoch(2)
    losses = [objective(random_outputs(7), LABELS, INDEX)[0] for objective in objectives]
    assert torch.equal(*losses)


def test_mean_of_the_losses_of_unequal_shards_is_the_loss_of_the_global_batch(monkeypatch):
    """Two emulated processes with 3 and 2 of 5 images; their gradients are averaged, as DistributedDataParallel does.
    A term of the user's, a plain mean, is among them."""
    single = objective_of("--PSKD --BYOT --DML --beta 1 --end_epoch 2")
    single.terms.append(Consistency(5, 4).double())
    single(random_outputs(1), LABELS, INDEX)
    single.end_epoch()
    single.set_epoch(1)
    shards, outputs = [copy.deepcopy(single) for _ in range(2)], random_outputs()
    leaves = [outputs.logits, outputs.feature, *outputs.exit_logits, *outputs.exit_features]
    loss, parts = single(outputs, LABELS, INDEX, batch_size=5)
    expected = torch.autograd.grad(loss, leaves)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    results = [
        shard(rows(outputs, index), LABELS[index], index, batch_size=5)
        for shard, index in zip(shards, (INDEX[:3], INDEX[3:]), strict=True)
    ]
    mean = sum(loss for loss, _ in results) / 2
    torch.testing.assert_close(torch.autograd.grad(mean, leaves), expected, rtol=1e-12, atol=1e-15)
    means = {name: sum(p[name] for _, p in results) / 2 for name in parts}
    torch.testing.assert_close(means, parts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("words", ["--BYOT --BYOT_from_k_block 2", "--BYOT --DML", "--DML", "--DML --DML_on_output"])
def test_trained_exits_are_those_whose_classifier_receives_a_gradient(words):
    outputs = random_outputs()
    loss, _ = objective_of(words)(outputs, LABELS, INDEX)
    names = receives_gradient(loss, outputs)
    assert trained_exits(flags(words)) == [f"exit_logits{i}" in names for i in (1, 2, 3)]
    assert trained_exits(flags(words + " --num_resnet_blocks 3")) == trained_exits(flags(words))[:2]
