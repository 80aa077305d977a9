"""Each loss: a value worked out by hand, the route of its gradient, and its limits."""

import itertools
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import build_objective, trained_exits
from loss.byot import BYOT
from loss.dml import DML, PublishedDML
from loss.objective import CrossEntropy
from loss.pskd import ProgressiveTargets
from main import parse_args
from models import Outputs, build_model

COMBINATIONS = [
    [f"--{m}" for m, is_on in zip(("PSKD", "BYOT", "DML"), on, strict=True) if is_on]
    for on in itertools.product([False, True], repeat=3)
]


def flags(*words: str):
    return parse_args(["--device", "cpu", "--precision", "fp32", *words])


def tensor(*rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def near(value: float):
    return pytest.approx(value, rel=1e-12, abs=1e-15)


def random_outputs(n: int = 5, k: int = 4, d: int = 6, exits: int = 3, seed: int = 0) -> Outputs:
    """Leaves in float64, so that gradients show who gets one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        return torch.randn(n, width, dtype=torch.float64, generator=generator).requires_grad_()

    return Outputs(draw(k), draw(d), tuple(draw(k) for _ in range(exits)), tuple(draw(d) for _ in range(exits)))


def rows(outputs: Outputs, index: Tensor) -> Outputs:
    """The outputs for these images of the batch alone."""
    exit_logits, exit_features = (tuple(t[index] for t in exits) for exits in outputs[2:])
    return Outputs(outputs.logits[index], outputs.feature[index], exit_logits, exit_features)


def reached(part: Tensor, outputs: Outputs) -> set[str]:
    """Names of the outputs that `part` sends a gradient to: logits, feature, exit_logits1, exit_features1, ..."""
    leaves = {"logits": outputs.logits, "feature": outputs.feature}
    for kind in ("exit_logits", "exit_features"):
        leaves |= {f"{kind}{i}": t for i, t in enumerate(getattr(outputs, kind), start=1)}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not part.requires_grad:
        return set()
    found = torch.autograd.grad(part, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name for name, g in zip(leaves, found, strict=True) if g is not None and g.any()}


LABELS = torch.tensor([0, 1, 2, 3, 0])
INDEX = torch.arange(5)


def test_cross_entropy_by_hand():
    # P_B: the first image's (3/4, 1/4), the second's (1/2, 1/2).
    outputs = Outputs(tensor([3 / 4, 1 / 4], [1 / 2, 1 / 2]).log(), tensor([1, 2], [3, 4]))
    # labels 0 and 1: -(ln 3/4 + ln 1/2) / 2
    assert CrossEntropy()(outputs, torch.tensor([0, 1]), 2)["ce"].item() == near((log(4 / 3) + log(2)) / 2)
    # y_soft (4/5, 1/5) and (0, 1): -(4/5 ln 3/4 + 1/5 ln 1/4 + ln 1/2) / 2
    soft = tensor([4 / 5, 1 / 5], [0, 1])
    expected = (4 / 5 * log(4 / 3) + 1 / 5 * log(4) + log(2)) / 2
    assert CrossEntropy()(outputs, soft, 2)["ce"].item() == near(expected)


def test_cross_entropy_trains_the_final_classifier_only():
    outputs = random_outputs()
    assert reached(CrossEntropy()(outputs, LABELS, 5)["ce"], outputs) == {"logits"}


def byot_example() -> Outputs:
    """N = 2, K = 2, D = 2, B = 3; for tau = 2: logits = 2 ln p have P^tau = p and P = p^2 / sum p^2."""
    final = 2 * tensor([3 / 4, 1 / 4], [1 / 2, 1 / 2]).log()  # P_B = (9/10, 1/10), (1/2, 1/2)
    exit1 = 2 * tensor([1 / 2, 1 / 2], [1 / 3, 2 / 3]).log()  # P_1 = (1/2, 1/2), (1/5, 4/5)
    exit2 = 2 * tensor([2 / 3, 1 / 3], [1 / 2, 1 / 2]).log()  # P_2 = (4/5, 1/5), (1/2, 1/2)
    features = tensor([3, -4], [-1, 1]), tensor([-1, 1], [0, 0])
    return Outputs(final, tensor([1, -1], [0, 2]), (exit1, exit2), features)


# Labels 0 and 1.
CE_FINAL = -(log(9 / 10) + log(1 / 2)) / 2
CE_1 = -(log(1 / 2) + log(4 / 5)) / 2
CE_2 = -(log(4 / 5) + log(1 / 2)) / 2
# Teacher first: sum over classes of P_B^tau ln(P_B^tau / P_i^tau).
KL_1 = (3 / 4 * log((3 / 4) / (1 / 2)) + 1 / 4 * log((1 / 4) / (1 / 2))) / 2  # first image
KL_1 += (1 / 2 * log((1 / 2) / (1 / 3)) + 1 / 2 * log((1 / 2) / (2 / 3))) / 2  # second image
KL_2 = (3 / 4 * log((3 / 4) / (2 / 3)) + 1 / 4 * log((1 / 4) / (1 / 3)) + 0) / 2
# (3 - 1)^2, but not (-4 - -1)^2: neither is positive; not (-1 - 0)^2, but (1 - 2)^2.
HINT_1 = 4 + 0 + 0 + 1
# (-1 - 1)^2 and (1 - -1)^2: one of the two is positive; not 0 against 0, but (0 - 2)^2.
HINT_2 = 4 + 4 + 0 + 4


@pytest.mark.parametrize(
    "k, ce, kl, hint", [(1, CE_FINAL + CE_1 + CE_2, KL_1 + KL_2, HINT_1 + HINT_2), (2, CE_FINAL + CE_2, KL_2, HINT_2)]
)
def test_byot_by_hand(k, ce, kl, hint):
    args = flags("--BYOT", "--alpha", "0.1", "--temperature", "2", "--beta", "0.01", "--BYOT_from_k_block", str(k))
    _, parts = build_objective(args, 2, 2)(byot_example(), torch.tensor([0, 1]), torch.arange(2))
    assert parts["ce"].item() == near(CE_FINAL)  # once here and once more, times 1 - alpha, in the BYOT sum
    assert parts["byot_ce"].item() == near(0.9 * ce)
    assert parts["byot_kl"].item() == near(0.1 * 2**2 * kl)
    assert parts["byot_hint"].item() == near(0.01 * hint)


def test_byot_cross_entropies_take_soft_targets():
    soft = tensor([4 / 5, 1 / 5], [0, 1])
    part = BYOT(0.25, 2, 0, 2)(byot_example(), soft, 2)["byot_ce"]
    final = -(4 / 5 * log(9 / 10) + 1 / 5 * log(1 / 10) + log(1 / 2)) / 2
    exit2 = -(4 / 5 * log(4 / 5) + 1 / 5 * log(1 / 5) + log(1 / 2)) / 2
    assert part.item() == near(0.75 * (final + exit2))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_byot_teaches_the_exits_from_k_and_never_the_teacher(k):
    outputs = random_outputs()
    parts = BYOT(0.1, 3, 1, k)(outputs, LABELS, 5)
    assert reached(parts["byot_ce"], outputs) == {"logits", *(f"exit_logits{i}" for i in range(k, 4))}
    assert reached(parts["byot_kl"], outputs) == {f"exit_logits{i}" for i in range(k, 4)}
    assert reached(parts["byot_hint"], outputs) == {f"exit_features{i}" for i in range(k, 4)}


def test_byot_without_alpha_and_beta_is_plain_cross_entropies():
    outputs = random_outputs()
    parts = BYOT(alpha=0, temperature=3, beta=0, from_block=1)(outputs, LABELS, 5)
    expected = sum(F.cross_entropy(logits, LABELS) for logits in (outputs.logits, *outputs.exit_logits))
    assert sum(parts.values()).item() == near(expected.item())


def test_byot_with_alpha_1_needs_no_label():
    outputs = random_outputs()
    a, b = (BYOT(1, 3, 1, 1)(outputs, labels, 5) for labels in (LABELS, LABELS.flip(0)))
    assert a == b and a["byot_ce"] == 0 and a["byot_kl"] > 0


def test_byot_of_exits_that_agree_with_the_teacher_is_cross_entropy():
    final = random_outputs()
    same = Outputs(final.logits, final.feature, (final.logits,) * 3, (final.feature,) * 3)
    parts = BYOT(0.1, 3, 1, 1)(same, LABELS, 5)
    assert parts["byot_kl"].item() == near(0) and parts["byot_hint"] == 0
    assert parts["byot_ce"].item() == near(0.9 * 4 * F.cross_entropy(final.logits, LABELS).item())


def test_hint_counts_nothing_where_both_features_are_not_positive():
    logits, feature = tensor([0, 0]), tensor([-1, 0, -3, 0]).requires_grad_()
    outputs = Outputs(logits, tensor([-2, -5, 0, 0]), (logits,), (feature,))
    hint = BYOT(0.1, 3, 1, 1)(outputs, torch.tensor([0]), 1)["byot_hint"]
    assert hint == 0 and not reached(hint, outputs)


def test_hint_is_a_sum_over_the_batch_and_all_else_a_mean():
    objective = build_objective(flags("--BYOT", "--DML"), 5, 4)
    _, parts = objective(random_outputs(), LABELS, INDEX)
    twice = torch.cat([INDEX, INDEX])
    _, parts_of_twice = objective(rows(random_outputs(), twice), LABELS[twice], twice)
    assert parts["byot_hint"] > 0
    for name, part in parts.items():
        assert parts_of_twice[name].item() == near((2 if name == "byot_hint" else 1) * part.item()), name


def dml_example() -> Outputs:
    """N = 2, D = K = 2, B = 3: softmaxes to be read off; what is added to a row, they do not see."""
    one = tensor([3 / 4, 1 / 4], [1 / 2, 1 / 2]).log() + tensor([7], [-2])
    two = tensor([1 / 2, 1 / 2], [1 / 5, 4 / 5]).log()
    final = tensor([1 / 2, 1 / 2], [1 / 2, 1 / 2]).log() + 5
    other = tensor([1, 2], [3, 4])
    return Outputs(other, final, (other, other), (one, two))


# KL(F_1 || F_B) + KL(F_B || F_1), first image; the second's softmaxes are equal.
SYMMETRIC_1 = 3 / 4 * log((3 / 4) / (1 / 2)) + 1 / 4 * log((1 / 4) / (1 / 2))
SYMMETRIC_1 += 1 / 2 * log((1 / 2) / (3 / 4)) + 1 / 2 * log((1 / 2) / (1 / 4))
# The same of exit 2: the first image's are equal, here is the second.
SYMMETRIC_2 = 1 / 5 * log((1 / 5) / (1 / 2)) + 4 / 5 * log((4 / 5) / (1 / 2))
SYMMETRIC_2 += 1 / 2 * log((1 / 2) / (1 / 5)) + 1 / 2 * log((1 / 2) / (4 / 5))
DML_VALUE = 1 / 2 * (SYMMETRIC_1 / 2 + SYMMETRIC_2 / 2)  # mean over two exits of the means over two images


def swapped(outputs: Outputs) -> Outputs:
    """Logits as features and features as logits."""
    return Outputs(outputs.feature, outputs.logits, outputs.exit_features, outputs.exit_logits)


def test_dml_by_hand():
    labels, index = torch.tensor([0, 1]), torch.arange(2)
    _, parts = build_objective(flags("--DML"), 2, 2)(dml_example(), labels, index)
    assert parts["dml"].item() == near(DML_VALUE)
    _, parts = build_objective(flags("--DML", "--DML_on_output"), 2, 2)(swapped(dml_example()), labels, index)
    assert parts["dml"].item() == near(DML_VALUE)


def test_dml_sends_its_gradient_both_ways_and_to_what_it_compares_only():
    outputs = random_outputs()
    features = {"feature", "exit_features1", "exit_features2", "exit_features3"}
    assert reached(DML()(outputs, LABELS, 5)["dml"], outputs) == features
    logits = {"logits", "exit_logits1", "exit_logits2", "exit_logits3"}
    assert reached(DML(on_output=True)(outputs, LABELS, 5)["dml"], outputs) == logits


@pytest.mark.parametrize("on_output", [False, True])
def test_dml_is_symmetric_and_nothing_between_equals(on_output):
    dml = DML(on_output)
    outputs = random_outputs(exits=1)
    exchanged = Outputs(outputs.exit_logits[0], outputs.exit_features[0], outputs[:1], outputs[1:2])
    value = dml(outputs, LABELS, 5)["dml"].item()
    assert value > 0.1
    assert dml(exchanged, LABELS, 5)["dml"].item() == near(value)
    equal = Outputs(outputs.logits, outputs.feature, outputs[:1] * 3, outputs[1:2] * 3)
    assert dml(equal, LABELS, 5)["dml"] == 0


def test_published_dml_by_hand():
    # Cross-entropies, -sum p ln q, of exit 1 and the final feature, both ways, and of exit 2:
    first = log(2) - 1 / 2 * (log(3 / 4) + log(1 / 4)) + (log(2) + log(2))
    second = (log(2) + log(2)) + log(2) - 1 / 2 * (log(1 / 5) + log(4 / 5))
    _, parts = build_objective(flags("--DML", "--DML_as_published"), 2, 2)(
        dml_example(), torch.tensor([0, 1]), torch.arange(2)
    )
    assert parts["dml"].item() == near(1 / 2 * (first / 2 + second / 2))


def test_published_dml_is_eq_3_plus_both_entropies_without_gradient():
    outputs = random_outputs()
    part = PublishedDML()(outputs, LABELS, 5)["dml"]
    assert not part.requires_grad

    def entropy(feature):
        p = feature.softmax(1)
        return -(p * p.log()).sum(1).mean()

    entropies = sum(entropy(f) + entropy(outputs.feature) for f in outputs.exit_features) / 3
    assert part.item() == near((DML()(outputs, LABELS, 5)["dml"] + entropies).item())


def three_steps(words: list[str]) -> dict[str, Tensor]:
    """The network's state after three steps of SGD on the same images."""
    args = flags("--width", "8", *words)
    model, objective = build_model(args, 10).train(), build_objective(args, 8, 10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.randn(8, 3, 16, 16, generator=generator)
        labels = torch.randint(10, (8,), generator=generator)
        loss, _ = objective(model(images), labels, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("others", [[], ["--BYOT"], ["--PSKD"]], ids=["alone", "BYOT", "PSKD"])
def test_published_dml_trains_nothing(others):
    without = three_steps(others)
    published = three_steps([*others, "--DML", "--DML_as_published"])
    assert all(torch.equal(published[name], value) for name, value in without.items())
    with_gradient = three_steps([*others, "--DML"])
    assert not torch.equal(with_gradient["layer1.0.conv1.weight"], without["layer1.0.conv1.weight"])


@pytest.mark.parametrize("words", COMBINATIONS, ids=lambda w: "".join(w) or "baseline")
def test_parts_add_up_to_the_loss(words):
    outputs = random_outputs()
    objective = build_objective(flags(*words, "--end_epoch", "2"), 5, 4).double()
    for epoch in range(2):
        objective.set_epoch(epoch)
        loss, parts = objective(outputs, LABELS, INDEX)
        names = {"ce"}
        names |= {"byot_ce", "byot_kl", "byot_hint"} if "--BYOT" in words else set()
        names |= {"dml"} if "--DML" in words else set()
        assert parts.keys() == names
        assert loss.shape == () and loss.requires_grad
        assert all(part.shape == () and not part.requires_grad for part in parts.values())
        assert sum(parts.values()).item() == near(loss.item())
        assert loss.item() > 0 and objective.alpha_t == (0.8 * (epoch + 1) / 2 if "--PSKD" in words else None)


@pytest.mark.parametrize("words", COMBINATIONS, ids=lambda w: "".join(w) or "baseline")
def test_the_loss_reaches_the_sum_of_what_its_terms_reach(words):
    outputs = random_outputs()
    args = flags(*words, "--BYOT_from_k_block", "2", "--beta", "1")
    loss, _ = build_objective(args, 5, 4)(outputs, LABELS, INDEX)
    expected = {"logits"}
    if "--BYOT" in words:
        expected |= {"exit_logits2", "exit_logits3", "exit_features2", "exit_features3"}
    if "--DML" in words:
        expected |= {"feature", "exit_features1", "exit_features2", "exit_features3"}
    assert reached(loss, outputs) == expected


EXITS = [
    ([], []),
    (["--PSKD"], []),
    (["--BYOT"], [True, True, True]),
    (["--BYOT", "--BYOT_from_k_block", "2"], [False, True, True]),
    (["--BYOT", "--BYOT_from_k_block", "3", "--DML"], [False, False, True]),
    (["--BYOT", "--BYOT_from_k_block", "3", "--DML", "--DML_on_output"], [True, True, True]),
    (["--DML"], [False, False, False]),
    (["--DML", "--DML_as_published"], [False, False, False]),
    (["--PSKD", "--DML", "--DML_on_output"], [True, True, True]),
    (["--BYOT", "--num_resnet_blocks", "2"], [True]),
    (["--DML", "--num_resnet_blocks", "3"], [False, False]),
    (["--num_resnet_blocks", "1"], []),
]


@pytest.mark.parametrize("words, expected", EXITS)
def test_trained_exits_are_those_whose_classifier_gets_a_gradient(words, expected):
    args = flags(*words)
    assert trained_exits(args) == expected
    outputs = random_outputs(exits=len(expected))
    loss, _ = build_objective(args, 5, 4)(outputs, LABELS, INDEX)
    names = reached(loss, outputs)
    assert [f"exit_logits{i}" in names for i in range(1, len(expected) + 1)] == expected


def test_progressive_targets_by_hand():
    targets = ProgressiveTargets(num_samples=3, num_classes=2, alpha_T=0.8, num_epochs=4).double()
    targets.record(tensor([3 / 4, 1 / 4], [1 / 5, 4 / 5]).log(), torch.tensor([2, 0]))
    targets.set_epoch(1)
    # alpha_1 = 0.8 (1 + 1) / 4 = 0.4. Image 2, label 1: 0.6 (0, 1) + 0.4 (3/4, 1/4); image 0, label 0:
    # 0.6 (1, 0) + 0.4 (1/5, 4/5); image 1 has not been seen: its label.
    expected = tensor([0.3, 0.7], [0.68, 0.32], [0, 1])
    y_soft = targets(torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1]))
    torch.testing.assert_close(y_soft, expected, rtol=0, atol=1e-15)
    assert targets.alpha_t == pytest.approx(0.4)


def test_first_epoch_is_one_hot_exactly_and_alpha_T_0_is_the_labels():
    one_hot = F.one_hot(LABELS, 4).float()
    for alpha_T, epochs in ((0.8, [0]), (0.0, range(3))):
        targets = ProgressiveTargets(5, 4, alpha_T, 3)
        for epoch in epochs:
            targets.set_epoch(epoch)
            for _ in range(2):  # as if an image came twice: even then
                assert torch.equal(targets(LABELS, INDEX), one_hot)
                targets.record(random_outputs().logits, INDEX)


def epoch_of_batches(epoch: int) -> list[Tensor]:
    """Seven images in another order each epoch, the last batch smaller."""
    return list(torch.randperm(7, generator=torch.Generator().manual_seed(epoch)).split(3))


def linear_net() -> nn.Linear:
    net = nn.Linear(3, 4).double()
    with torch.no_grad():
        net.weight.copy_(torch.arange(12).view(4, 3).sin())
        net.bias.zero_()
    return net


IMAGES = torch.arange(21, dtype=torch.float64).view(7, 3).cos()
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1, 2])


def own_step(objective, net: nn.Linear, index: Tensor) -> float:
    """A step of a large rate, so that one taken too early or too late shows; returns the loss."""
    logits = net(IMAGES[index])
    loss, _ = objective(Outputs(logits, logits), CLASSES[index], index)
    net.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.5 * p.grad
    return loss.item()


def test_targets_are_what_the_network_said_of_that_image_an_epoch_ago():
    """Against a dictionary, an image at a time, and a network of its own."""
    objective = build_objective(flags("--PSKD", "--alpha_T", "0.7", "--end_epoch", "4"), 7, 4).double().train()
    net, reference = linear_net(), linear_net()
    said_before: dict[int, Tensor] = {}
    for epoch in range(4):
        objective.set_epoch(epoch)
        alpha_t = 0.7 * (epoch + 1) / 4
        said_now = {}
        for index in epoch_of_batches(epoch):
            loss = own_step(objective, net, index)

            total = 0.0
            for i in index.tolist():
                y = F.one_hot(CLASSES[i], 4).double()
                log_p = reference(IMAGES[i]).log_softmax(0)
                y_soft = y if epoch == 0 else (1 - alpha_t) * y + alpha_t * said_before[i]
                total = total - (y_soft * log_p).sum()
                said_now[i] = log_p.detach().exp()
            mean = total / len(index)
            gradients = torch.autograd.grad(mean, list(reference.parameters()))
            with torch.no_grad():
                for p, g in zip(reference.parameters(), gradients, strict=True):
                    p -= 0.5 * g
            assert loss == pytest.approx(mean.item(), rel=1e-12)
        objective.end_epoch()
        said_before = said_now
        expected = torch.stack([said_before[i] for i in range(7)])
        torch.testing.assert_close(objective.targets.memory, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(net.weight, reference.weight, rtol=1e-12, atol=0)


def test_soft_targets_pass_no_gradient_to_the_past():
    objective = build_objective(flags("--PSKD", "--end_epoch", "2"), 5, 4).double().train()
    outputs = random_outputs()
    objective(outputs, LABELS, INDEX)
    assert not objective.targets.memory.requires_grad
    objective.set_epoch(1)
    later = random_outputs(seed=1)
    loss, _ = objective(later, LABELS, INDEX)
    loss.backward()
    assert later.logits.grad.any() and outputs.logits.grad is None


def test_evaluation_mode_records_nothing():
    objective = build_objective(flags("--PSKD", "--end_epoch", "2"), 5, 4)
    objective.eval()(random_outputs(), LABELS, INDEX)
    assert not objective.targets.memory.any()
    objective.train()(random_outputs(), LABELS, INDEX)
    before = objective.targets.memory.clone()
    assert before.all()
    objective.eval()(random_outputs(seed=1), LABELS, INDEX)
    assert torch.equal(objective.targets.memory, before)


@pytest.mark.parametrize("words", COMBINATIONS, ids=lambda w: "".join(w) or "baseline")
def test_a_loaded_objective_gives_identical_losses(words):
    args = flags(*words, "--end_epoch", "3")
    first, second = (build_objective(args, 5, 4) for _ in range(2))
    for epoch in range(2):
        first.set_epoch(epoch)
        for half in (INDEX[:3], INDEX[3:]):
            first(rows(random_outputs(seed=epoch), half), LABELS[half], half)
    second.load_state_dict(first.state_dict())
    for seed in (7, 8):  # what each records of the first, the second shows
        losses = [o(random_outputs(seed=seed), LABELS, INDEX)[0] for o in (first, second)]
        assert torch.equal(*losses)
    fresh, _ = build_objective(args, 5, 4)(random_outputs(seed=8), LABELS, INDEX)
    assert torch.equal(losses[0], fresh) == ("--PSKD" not in words)


def test_double_keeps_the_memory_in_float64():
    objective = build_objective(flags("--PSKD", "--end_epoch", "3"), 5, 4)
    assert objective.targets.memory.dtype == torch.float32 and objective.targets.memory.shape == (5, 4)
    objective.set_epoch(1)  # before, and even so alpha_t has all its digits
    objective.double()
    outputs = random_outputs()
    objective(outputs, LABELS, INDEX)
    assert objective.targets.memory.dtype == torch.float64
    assert torch.equal(objective.targets.memory, outputs.logits.softmax(1))
    alpha_1 = 0.8 * 2 / 3
    expected = (1 - alpha_1) * F.one_hot(LABELS, 4).double() + alpha_1 * outputs.logits.softmax(1)
    torch.testing.assert_close(objective.targets(LABELS, INDEX), expected, rtol=0, atol=1e-15)
