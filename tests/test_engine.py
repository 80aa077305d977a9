"""The loops on a network of a few numbers, against the same loops written out."""

import contextlib
import copy
import math
from math import inf, log, nan

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loss import build_objective
from main import parse_args
from models import Outputs
from utils.engine import Meter, evaluate, find_not_finite, learning_rate, predict, train_one_epoch, train_step
from utils.metrics import classification_metrics

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two exits and a final classifier, linear in images (N, 3), with a BatchNorm for its buffers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.bodies = nn.ModuleList(nn.Linear(3, 5) for _ in range(3))
            self.bn = nn.BatchNorm1d(5)
            self.classifiers = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def forward(self, images):
        *exits, last = (body(images) for body in self.bodies)
        features = [*exits, self.bn(last)]
        *exit_logits, logits = (fc(f) for fc, f in zip(self.classifiers, features, strict=True))
        return Outputs(logits, features[-1], tuple(exit_logits), tuple(features[:-1]))


class Batches:
    """A loader of eight images in batches of 3, 3 and 2 (BatchNorm needs two), in this order of rows."""

    batch_size, num_samples = 3, 8
    images = torch.arange(24, dtype=torch.float32).view(8, 3).sin()
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])

    def __init__(self, order=(4, 0, 6, 2, 1, 5, 3, 7)):
        self.order = torch.tensor(order)

    def __iter__(self):
        for index in self.order.split(self.batch_size):
            yield self.images[index], self.labels[index], index


def all_methods():
    words = ["--device", "cpu", "--precision", "fp32", "--end_epoch", "2", "--PSKD", "--BYOT", "--DML"]
    return build_objective(parse_args([*words, "--num_resnet_blocks", "3"]), 8, 4).train()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def test_learning_rate_drops_at_each_epoch_of_the_schedule():
    rates = [learning_rate(0.1, 0.2, [2, 3, 5], epoch) for epoch in range(7)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.004, 0.0008, 0.0008])
    assert learning_rate(0.1, 0.2, [], 1000) == 0.1


def test_meter_weights_by_images():
    meter = Meter(CPU)
    for _ in range(2):  # the second round starts from nothing
        meter.reset()
        for value, n, num_wrong in ((1.0, 3, 2), (2.0, 3, 0), (10.0, 1, 1)):
            parts = {"ce": torch.tensor(value), "dml": torch.tensor(-value / 2)}
            labels = torch.zeros(n, dtype=torch.int64)
            logits = torch.eye(2)[[1] * num_wrong + [0] * (n - num_wrong)]
            meter.update(parts, logits, labels, n)
        ce = (3 * 1 + 3 * 2 + 1 * 10) / 7
        expected = {"loss": ce / 2, "ce": ce, "dml": -ce / 2, "top1_error": 100 * 3 / 7}
        assert meter.means(7) == pytest.approx(expected, rel=1e-12)
        assert list(meter.means(7)) == list(expected)


def test_meter_between_steps_says_what_it_has_seen():
    meter = Meter(CPU)
    meter.reset()
    logits, labels = torch.eye(2), torch.tensor([0, 0])
    meter.update({"ce": torch.tensor(3.0)}, logits, labels, 2)
    assert meter.own_means(2) == {"loss": 3, "ce": 3, "top1_error": 50}
    meter.update({"ce": torch.tensor(6.0)}, logits[:1], labels[:1], 1)
    assert meter.own_means(3) == pytest.approx({"loss": 4, "ce": 4, "top1_error": 100 / 3})


def test_meter_adds_up_in_float64():
    meter = Meter(CPU)
    for value in (2.0**24, 1.0, 1.0, 1.0):  # 2^24 + 1 is no float32
        meter.update({"ce": torch.tensor(value)}, torch.eye(1), torch.tensor([0]), 1)
    assert meter.means(4)["ce"] == (2**24 + 3) / 4


def test_an_epoch_is_the_loop_written_out():
    """Weights, objective's memory and means, over two epochs of batches of 3, 3 and 2."""
    model, objective = Net().train(), all_methods()
    reference, reference_objective = copy.deepcopy(model), copy.deepcopy(objective)
    optimizer, reference_optimizer = sgd(model), sgd(reference)
    meter = Meter(CPU)
    for epoch, order in enumerate(((4, 0, 6, 2, 1, 5, 3, 7), (3, 1, 0, 7, 5, 6, 4, 2))):
        loader = Batches(order)
        objective.set_epoch(epoch)
        result = train_one_epoch(model, objective, optimizer, loader, contextlib.nullcontext, meter, train_step)

        reference_objective.set_epoch(epoch)
        sums, wrong = {}, 0
        for images, labels, index in loader:
            outputs = reference(images)
            loss, parts = reference_objective(outputs, labels, index)
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0) + len(labels) * value.item()
            wrong += sum(row.argmax() != label for row, label in zip(outputs.logits, labels, strict=True)).item()
            reference_optimizer.zero_grad()
            loss.backward()
            reference_optimizer.step()
        reference_objective.end_epoch()

        expected = {name: value / 8 for name, value in sums.items()} | {"top1_error": 100 * wrong / 8}
        assert result["train"] == pytest.approx(expected, rel=1e-6)
        assert result["train"].keys() == {"loss", "ce", "byot_ce", "byot_kl", "byot_hint", "dml", "top1_error"}
        assert result["images_per_second"] == pytest.approx(8 / result["seconds"])
        for ours, theirs in ((model, reference), (objective, reference_objective)):
            for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
                assert torch.equal(a, b), name


class Watched(nn.Module):
    """An objective that notes what happens around it."""

    def __init__(self):
        super().__init__()
        self.events = []

    def forward(self, outputs, labels, index):
        self.events.append(index.tolist())
        assert not torch.is_autocast_enabled("cpu")
        loss = F.cross_entropy(outputs.logits, labels)
        return loss, {"ce": loss.detach()}

    def end_epoch(self):
        self.events.append("end")


def test_an_epoch_sees_every_batch_once_then_ends():
    model, objective = Net().train(), Watched()
    entered, batches = [], []

    def autocast():
        entered.append(True)
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def step(*args):
        assert not torch.is_autocast_enabled("cpu")
        batches.append(args[-1])
        train_step(*args)

    def progress(loader, meter):
        for batch in loader:
            yield batch
            shown.append(meter.own_means(sum(batches))["ce"])

    shown = []
    meter = Meter(CPU)
    result = train_one_epoch(model, objective, sgd(model), Batches(), autocast, meter, step, progress)
    assert objective.events == [[4, 0, 6], [2, 1, 5], [3, 7], "end"]
    assert batches == [3, 3, 2] and len(entered) == 3
    assert len(shown) == 3 and shown[-1] == result["train"]["ce"]
    assert len(set(shown)) == 3


@pytest.mark.parametrize("num_exits", [0, 2])
def test_predict_covers_every_image_once_in_order(num_exits):
    """An image is its own row here, and a classifier's logits say the row and who speaks."""

    def model(images):
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        row = images[:, :1]
        says = [torch.cat([row, torch.full_like(row, i)], dim=1) for i in range(num_exits + 1)]
        return Outputs(says[-1], row, tuple(says[:-1]), (row,) * num_exits)

    rows = torch.arange(8.0)
    loader = Batches(range(8))
    loader.images = rows[:, None].expand(8, 3)
    logits, labels = predict(model, loader, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert logits.shape == (num_exits + 1, 8, 2) and logits.dtype == torch.float32
    for i, said in enumerate(logits):
        assert said[:, 0].tolist() == list(range(8)) and said[:, 1].tolist() == [i] * 8
    assert labels.dtype == torch.int64 and labels.tolist() == Batches.labels.tolist()


def test_predict_leaves_the_network_as_it_was():
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    logits, _ = predict(model, Batches(range(8)), contextlib.nullcontext)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    outputs = model(Batches.images)
    expected = torch.stack([*outputs.exit_logits, outputs.logits])
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-6, atol=1e-6)
    assert not logits.requires_grad


# Probabilities of exits 1 and 2 and of the final classifier, for two images of classes 0 and 1.
CLASSIFIERS = torch.tensor(
    [[[0.8, 0.2], [0.3, 0.7]], [[0.1, 0.9], [0.9, 0.1]], [[0.4, 0.6], [0.2, 0.8]]], dtype=torch.float64
).log()
TWO_LABELS = torch.tensor([0, 1])


def test_evaluate_gives_the_metrics_of_every_classifier():
    record = evaluate(CLASSIFIERS, TWO_LABELS, [True, True])
    assert record["val"] == classification_metrics(CLASSIFIERS[2], TWO_LABELS)
    assert record["exits"] == [classification_metrics(CLASSIFIERS[i], TWO_LABELS) for i in range(2)]
    assert [m["top1_error"] for m in (*record["exits"], record["val"])] == [0, 100, 50]


def test_ensemble_is_the_mean_probability_of_the_trained_classifiers():
    # All three: (0.8 + 0.1 + 0.4) / 3 for class 0 of the first image, (0.7 + 0.1 + 0.8) / 3 for 1 of the second.
    ensemble = evaluate(CLASSIFIERS, TWO_LABELS, [True, True])["ensemble"]
    assert ensemble["nll"] == pytest.approx(-(log(1.3 / 3) + log(1.6 / 3)) / 2, rel=1e-12)
    assert ensemble["top1_error"] == 50
    # Without exit 2: (0.8 + 0.4) / 2 and (0.7 + 0.8) / 2, both right, and that sure.
    record = evaluate(CLASSIFIERS, TWO_LABELS, [True, False])
    assert record["exits"][1] is None and record["exits"][0] is not None
    assert record["ensemble"]["nll"] == pytest.approx(-(log(0.6) + log(0.75)) / 2, rel=1e-12)
    assert record["ensemble"]["ece"] == pytest.approx(100 * (0.4 + 0.25) / 2, rel=1e-12)
    assert record["ensemble"]["top1_error"] == record["ensemble"]["aurc"] == 0


def test_without_trained_exits_there_is_no_ensemble():
    record = evaluate(CLASSIFIERS, TWO_LABELS, [False, False])
    assert record["exits"] == [None, None] and record["ensemble"] is None
    record = evaluate(CLASSIFIERS[2:], TWO_LABELS, [])
    assert record == {"val": record["val"], "exits": [], "ensemble": None}


@pytest.mark.parametrize("which", [0, 2], ids=["exit", "final"])
@pytest.mark.parametrize("value", [nan, inf])
def test_evaluate_refuses_logits_that_are_not_finite(which, value):
    logits = CLASSIFIERS.clone()
    logits[which, 1, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        evaluate(logits, TWO_LABELS, [True, True])


def test_find_not_finite_names_the_loss_term_or_the_tensor():
    model = Net()
    means = {"loss": 1.5, "ce": 1.0, "dml": 0.5, "top1_error": 50.0}
    assert find_not_finite(model, means) is None
    assert find_not_finite(model, means | {"loss": nan, "dml": nan}) == "dml"
    assert find_not_finite(model, means | {"loss": inf, "ce": inf, "dml": -inf}) == "ce, dml"
    assert find_not_finite(model, means | {"loss": inf}) == "loss"
    model.bn.running_var[2] = inf
    assert find_not_finite(model, means) == "bn.running_var"
    with torch.no_grad():
        model.bodies[1].bias[0] = nan
    assert find_not_finite(model, means) == "bodies.1.bias"


def test_a_rate_too_high_is_found():
    model, objective, meter = Net().train(), all_methods(), Meter(CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    result = train_one_epoch(model, objective, optimizer, Batches(), contextlib.nullcontext, meter, train_step)
    assert find_not_finite(model, result["train"]) is not None


def test_ensemble_nll_stays_finite_where_no_member_gives_the_label_a_probability():
    """-log((exp(-800) + exp(-900)) / 2) = 800 + log 2, though exp(-800) is no float64."""
    logits = torch.tensor([[[0.0, 800.0]], [[0.0, 900.0]]])
    found = evaluate(logits, torch.tensor([0]), [True])
    assert found["ensemble"]["nll"] == pytest.approx(800 + math.log(2), rel=1e-12)
