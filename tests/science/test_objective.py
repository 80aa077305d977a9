"""The sum of the losses: its parts, a term of one's own, several processes, the number of operations."""

import copy

import pytest
import torch
from helpers import INDEX, LABELS, gradients, near, objective_of, random_outputs, receives_gradient
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loss.objective import CrossEntropy, Objective, Term
from main import parse_args
from models import Outputs
from utils import launch
from utils.launch import World


class Consistency(Term):
    """mean over the batch of ||P_B - p_prev||^2, p_prev the prediction in the previous epoch, from epoch 1 on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("memory", torch.zeros(5, 4))
        self.register_buffer("current", torch.zeros(5, 4))
        self.weight = 0

    def set_epoch(self, epoch: int) -> None:
        self.weight = int(epoch > 0)

    def end_epoch(self) -> None:
        self.memory.copy_(self.current)

    def forward(self, outputs, targets, index, batch_size):
        p = outputs.logits.softmax(dim=1)
        self.current[index] = p.detach().to(self.current.dtype)
        distance = (p - self.memory[index]).square().sum(dim=1)
        return {"consistency": self.weight * distance.mean()}


def with_own_term(words: str) -> Objective:
    objective = objective_of(words)
    objective.terms.append(Consistency().double())
    return objective


def rows(outputs: Outputs, index: Tensor) -> Outputs:
    """The outputs for these images of the batch."""
    exit_logits = tuple(logits[index] for logits in outputs.exit_logits)
    exit_features = tuple(feature[index] for feature in outputs.exit_features)
    return Outputs(outputs.logits[index], outputs.feature[index], exit_logits, exit_features)


def test_own_term_with_a_memory_gets_index_and_epochs():
    """Two epochs of two batches, images 3 and 4 before the others."""
    objective = Objective([CrossEntropy(), Consistency()]).double()
    first, second = random_outputs(0), random_outputs(1)
    for epoch, outputs in enumerate((first, second)):
        objective.set_epoch(epoch)
        for batch in (INDEX[3:], INDEX[:3]):
            _, parts = objective(rows(outputs, batch), LABELS[batch], batch)
        objective.end_epoch()
        if epoch == 0:
            assert parts["consistency"] == 0
    difference = second.logits.softmax(dim=1) - first.logits.softmax(dim=1)
    distance = difference[:3].square().sum(dim=1)
    assert parts["consistency"].item() == near(distance.mean().item())


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operations(words: str, exits: int) -> int:
    objective = objective_of(words)
    outputs = random_outputs(exits=exits)
    with CountOperations() as counter:
        objective(outputs, LABELS, INDEX)
    return counter.count


@pytest.mark.parametrize("words", ["--PSKD --BYOT --DML", "--DML --DML_on_output", "--DML --DML_as_published"])
def test_losses_of_five_exits_take_as_many_operations_as_those_of_one(words):
    """Exits are stacked: on a GPU each operation is a launch."""
    operations = count_operations(words, exits=1)
    assert operations > 10
    assert count_operations(words, exits=5) == operations


PARTS = {
    "": "ce consistency",
    "--PSKD": "ce consistency",
    "--BYOT": "ce byot_ce byot_kl byot_hint consistency",
    "--DML": "ce dml consistency",
    "--PSKD --BYOT --DML": "ce byot_ce byot_kl byot_hint dml consistency",
}


def train(objective: Objective, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An epoch of one step."""
    objective.set_epoch(epoch)
    result = objective(random_outputs(epoch), LABELS, INDEX)
    objective.end_epoch()
    return result


@pytest.mark.parametrize("words", PARTS)
def test_parts_add_up_to_the_loss(words):
    objective = with_own_term(words)
    for epoch in range(2):
        loss, parts = train(objective, epoch)
        assert list(parts) == PARTS[words].split()
        assert not any(part.requires_grad for part in parts.values())
        assert sum(parts.values()).item() == near(loss.item())


@pytest.mark.parametrize("words", PARTS)
def test_restored_objective_gives_identical_losses(words):
    objective = with_own_term(words)
    train(objective, 0)
    train(objective, 1)
    restored = with_own_term(words)
    restored.load_state_dict(objective.state_dict())
    expected, _ = train(objective, 2)
    found, _ = train(restored, 2)
    assert torch.equal(found, expected)


def test_mean_of_the_losses_of_unequal_shards_is_the_loss_of_the_global_batch(monkeypatch):
    """Two emulated processes with 3 and 2 of 5 images; their gradients are averaged, as DistributedDataParallel does.
    A term of the user's, a plain mean, is among them."""
    objective = with_own_term("--PSKD --BYOT --DML --beta 1 --end_epoch 2")
    train(objective, 0)
    objective.set_epoch(1)
    processes = copy.deepcopy(objective), copy.deepcopy(objective)
    outputs = random_outputs(seed=2)
    expected_loss, expected_parts = objective(outputs, LABELS, INDEX, batch_size=5)

    monkeypatch.setattr(launch, "WORLD", World(size=2))
    mean_loss = 0
    mean_parts = dict.fromkeys(expected_parts, 0)
    for process, shard in zip(processes, (INDEX[:3], INDEX[3:]), strict=True):
        loss, parts = process(rows(outputs, shard), LABELS[shard], shard, batch_size=5)
        mean_loss += loss / 2
        for name, part in parts.items():
            mean_parts[name] += part / 2
    torch.testing.assert_close(mean_parts, expected_parts, rtol=1e-12, atol=0)
    found, expected = gradients(mean_loss, outputs), gradients(expected_loss, outputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_exits", [2, 3])
@pytest.mark.parametrize(
    "words", ["", "--BYOT --BYOT_from_k_block 2", "--BYOT --DML", "--DML", "--DML --DML_on_output"]
)
def test_trained_classifiers_are_those_that_receive_a_gradient(words, num_exits):
    outputs = random_outputs(exits=num_exits)
    objective = objective_of(words)
    loss, _ = objective(outputs, LABELS, INDEX)
    names = receives_gradient(loss, outputs)
    expected = [f"exit {i}" for i in range(1, num_exits + 1) if f"exit_logits{i}" in names]
    assert objective.trained_classifiers(num_exits) == [*expected, "final"]


@pytest.mark.parametrize("words, exits", [("--PSKD", False), ("--BYOT", True), ("--DML --DML_as_published", True)])
def test_the_network_has_exits_if_a_loss_uses_them(words, exits):
    assert parse_args(words.split()).exits is exits
