"""The loops, against the same loops written out; metrics of all classifiers; what is not finite."""

import copy
from math import inf, log, nan, sqrt

import pytest
import torch
import torch.nn.functional as F

from loss import build_objective
from main import parse_args
from models import build_model
from utils import distributed, engine, flags, metrics
from utils.errors import NonFiniteError
from utils.metrics import METRICS, classification_metrics, extended_metrics


class Batches:
    """A loader of eight images in batches of 3, 3 and 2."""

    batch_size, num_samples = 3, 8
    images = torch.arange(8 * 3 * 16 * 16, dtype=torch.float32).view(8, 3, 16, 16).sin()
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])

    def __init__(self, order):
        self.order = torch.tensor(order)

    def __iter__(self):
        for index in self.order.split(self.batch_size):
            yield self.images[index], self.labels[index], index


def build(words: str = "--PSKD --BYOT --DML --end_epoch 2"):
    args = parse_args(["--device", "cpu", "--precision", "fp32", "--width", "4", *words.split()])
    return build_model(args, 4).train(), build_objective(args, 8, 4).train(), args


def mix_up(images, labels):
    """Each image with another one of the batch, both drawn from the global generator; labels (N, 4)."""
    weight, other = torch.rand(()), torch.randperm(len(labels))
    y = F.one_hot(labels, 4).float()
    return torch.lerp(images[other], images, weight), torch.lerp(y[other], y, weight)


def test_schedule_drops_at_each_epoch_given():
    schedule = engine.build_schedule(build("--lr 0.1 --lr_decay_rate 0.2 --lr_decay_schedule 2 3 5")[2])
    assert [schedule(epoch) for epoch in range(6)] == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.004, 0.0008])


def test_the_paper_s_schedule_to_the_bit():
    schedule = engine.build_schedule(build()[2])
    expected = [0.1] * 150 + [0.1 * 0.1] * 75 + [0.1 * 0.1**2] * 75
    assert [schedule(epoch) for epoch in range(300)] == expected


def test_cosine_schedule_worked_by_hand():
    schedule = engine.build_schedule(build("--lr 0.2 --lr_schedule cosine --end_epoch 4 --lr_decay_schedule 1")[2])
    expected = [0.2, 0.1 * (1 + sqrt(0.5)), 0.1, 0.1 * (1 - sqrt(0.5))]  # cosines of 0, 45, 90, 135 degrees
    assert [schedule(epoch) for epoch in range(4)] == pytest.approx(expected, rel=1e-15)


def test_warmup_rises_linearly_to_the_schedule():
    schedule = engine.build_schedule(build("--lr 0.4 --warmup_epochs 3 --lr_decay_schedule 5")[2])
    assert [schedule(epoch) for epoch in range(7)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.04, 0.04], rel=1e-15)


def test_cosine_begins_at_the_full_rate_after_warmup():
    schedule = engine.build_schedule(build("--lr 0.2 --lr_schedule cosine --end_epoch 3 --warmup_epochs 1")[2])
    assert [schedule(epoch) for epoch in range(3)] == pytest.approx([0.1, 0.2, 0.1], rel=1e-15)


@pytest.mark.parametrize("processes", [1, 2])
def test_meter_weights_by_images_in_float64(processes, monkeypatch):
    """Of two processes the other one has the same images."""
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "all_reduce_sum_", lambda sums: sums.mul_(processes))
    meter = engine.Meter(torch.device("cpu"))
    for value, n, num_wrong in ((2.0**24, 3, 2), (1.0, 3, 0), (5.0, 1, 1)):  # 2^24 + 1 is not a float32
        logits = torch.eye(2)[[1] * num_wrong + [0] * (n - num_wrong)]
        parts = {"ce": torch.tensor(value), "dml": torch.tensor(-value / 2)}
        meter.update(parts, logits, torch.zeros(n, dtype=torch.int64), n * processes)
        meter.num_images += n * processes
    ce = (3 * 2**24 + 3 * 1 + 1 * 5) / 7
    expected = {"loss": ce / 2, "ce": ce, "dml": -ce / 2, "top1_error": 100 * 3 / 7}
    assert meter.means() == meter.local_means() == pytest.approx(expected, rel=1e-14)


def test_meter_takes_the_largest_of_soft_labels_as_the_class():
    meter = engine.Meter(torch.device("cpu"))
    meter.update({"ce": torch.tensor(1.0)}, torch.eye(3), torch.tensor([[0.6, 0.4, 0], [0.6, 0.4, 0], [0, 0, 1]]), 3)
    meter.num_images = 3
    assert meter.means()["top1_error"] == pytest.approx(100 / 3)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision, transform", [("fp32", None), ("bf16", None), ("fp16", None), ("fp32", mix_up)])
def test_an_epoch_equals_the_loop_written_out(precision, transform):
    """Weights, memory and means to the bit, over two epochs whose last batch is smaller."""
    words = f"--PSKD --BYOT --DML --end_epoch 2 --precision {precision}"
    (model, objective, args), (reference, reference_objective, _) = build(words), build(words)
    optimizer = engine.build_optimizer(args, model)
    step = engine.TrainStep(model, objective, optimizer, torch.device("cpu"), precision, transform=transform)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for epoch, order in enumerate(((4, 0, 6, 2, 1, 5, 3, 7), (3, 1, 0, 7, 5, 6, 4, 2))):
        objective.set_epoch(epoch)
        torch.manual_seed(epoch)
        result = engine.train_one_epoch(step, Batches(order))
        reference_objective.set_epoch(epoch)
        torch.manual_seed(epoch)
        sums, wrong = {}, 0
        for images, labels, index in Batches(order):
            if transform:
                images, labels = transform(images, labels)
            with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
                outputs = reference(images)
            loss, parts = reference_objective(outputs, labels, index)
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0) + len(labels) * value.item()
            classes = labels.argmax(1) if transform else labels
            wrong += (outputs.logits.argmax(1) != classes).sum().item()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        reference_objective.end_epoch()
        assert not objective.targets.seen.any()  # the objective was told that the epoch ended
        expected = {name: value / 8 for name, value in sums.items()} | {"top1_error": 100 * wrong / 8}
        assert result["train"] == pytest.approx(expected, rel=1e-6)
        assert ("skipped_steps" in result) == (precision == "fp16")
        for ours, theirs in ((model, reference), (objective, reference_objective)):
            torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def fp16_step(scale: float, **settings):
    """A TrainStep whose losses are scaled by `scale`, its network and its objective."""
    model, objective, args = build("--PSKD --BYOT --DML --end_epoch 2 --precision fp16")
    step = engine.TrainStep(model, objective, engine.build_optimizer(args, model), torch.device("cpu"), args.precision)
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": scale} | settings)
    return step, model, objective


def test_fp16_skips_a_step_whose_gradients_overflow_and_keeps_its_predictions():
    step, model, objective = fp16_step(2.0**40)
    before = copy.deepcopy(list(model.parameters()))
    skipped = engine.train_one_epoch(step, Batches(range(8)))
    assert skipped["skipped_steps"] == 3 and all(map(torch.equal, model.parameters(), before))
    assert not any(state["momentum_buffer"].any() for state in step.optimizer.state.values())
    assert step.scaler.state_dict()["scale"] == 2.0**37
    assert 0 < skipped["train"]["loss"] < inf and 0 < skipped["train"]["byot_hint"] < inf
    torch.testing.assert_close(objective.targets.memory.sum(dim=1), torch.ones(8))
    assert engine.first_nonfinite(model, skipped["train"]) is None

    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": 64.0})
    trained = engine.train_one_epoch(step, Batches(range(8)))
    assert trained["skipped_steps"] == 0 and not any(map(torch.equal, model.parameters(), before))


def test_fp16_on_a_cpu_is_accepted_with_a_note():
    args = build("--precision fp16")[2]
    assert any("fp16 on a CPU" in note for note in flags.notes(args, torch.device("cpu")))


def test_fp16_resumes_to_the_bit_with_scale_and_steps_since_it_grew():
    through, stopped, resumed = (fp16_step(64.0, growth_interval=5) for _ in range(3))
    for step, _, _ in (through, stopped):
        engine.train_one_epoch(step, Batches(range(8)))
    for part in (lambda run: run[0].scaler, lambda run: run[0].optimizer, lambda run: run[1], lambda run: run[2]):
        part(resumed).load_state_dict(copy.deepcopy(part(stopped).state_dict()))
    for step, _, _ in (through, resumed):
        engine.train_one_epoch(step, Batches(range(8)))
    assert through[0].scaler.state_dict() == resumed[0].scaler.state_dict()
    assert resumed[0].scaler.state_dict()["scale"] == 128.0  # it grew in the fifth step
    torch.testing.assert_close(through[1].state_dict(), resumed[1].state_dict(), rtol=0, atol=0)


def test_predict_gives_all_classifiers_in_order_of_the_split_and_changes_nothing():
    model = build()[0].train()
    before = copy.deepcopy(model.state_dict())
    logits, labels = engine.predict(model, Batches(range(8)), "fp32")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    outputs = model.eval()(Batches.images)
    expected = torch.stack([*outputs.exit_logits, outputs.logits]).detach()
    assert logits.shape == (4, 8, 4) and not logits.requires_grad and torch.equal(labels, Batches.labels)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


# Probabilities of exits 1 and 2 and of the final classifier, for two images of classes 0 and 1.
CLASSIFIERS = [[[0.8, 0.2], [0.3, 0.7]], [[0.1, 0.9], [0.9, 0.1]], [[0.4, 0.6], [0.2, 0.8]]]
LOGITS, LABELS = torch.tensor(CLASSIFIERS, dtype=torch.float64).log(), torch.tensor([0, 1])


def test_evaluate_gives_metrics_of_trained_classifiers_and_of_their_mean_probability():
    record = engine.evaluate(LOGITS, LABELS, [True, True])
    expected = [classification_metrics(z, LABELS) | extended_metrics(z, LABELS) for z in LOGITS]
    assert record["val"] == expected[2]
    assert record["exits"] == expected[:2]
    assert record["ensemble"].keys() == METRICS.keys()
    # (0.8 + 0.1 + 0.4) / 3 for class 0 of the first image, (0.7 + 0.1 + 0.8) / 3 for class 1 of the second.
    assert record["ensemble"]["nll"] == pytest.approx(-(log(1.3 / 3) + log(1.6 / 3)) / 2, rel=1e-12)
    record = engine.evaluate(LOGITS, LABELS, [True, False])
    assert record["exits"] == [expected[0], None] and record["val"] == expected[2]
    assert engine.evaluate(LOGITS, LABELS, [False, True])["exits"] == [None, expected[1]]
    assert record["ensemble"]["nll"] == pytest.approx(-(log(0.6) + log(0.75)) / 2, rel=1e-12)
    assert engine.evaluate(LOGITS, LABELS, [False, False])["ensemble"] is None
    assert engine.evaluate(LOGITS[2:], LABELS, []) == {"val": record["val"], "exits": [], "ensemble": None}
    # -log((exp(-800) + exp(-900)) / 2) = 800 + log 2, though exp(-800) is 0 in float64.
    record = engine.evaluate(torch.tensor([[[0.0, 800.0]], [[0.0, 900.0]]]), LABELS[:1], [True])
    assert record["ensemble"]["nll"] == pytest.approx(800 + log(2), rel=1e-12)


def test_evaluate_in_chunks_of_rows_gives_every_row_its_metrics(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 50, 7, generator=generator), torch.randint(7, (50,), generator=generator)
    expected = engine.evaluate(logits, labels, [True, True])
    monkeypatch.setattr(metrics, "CHUNK", 3 * 7)
    record = engine.evaluate(logits, labels, [True, True])
    for name in METRICS:
        for part in ("val", "ensemble"):
            assert record[part][name] == pytest.approx(expected[part][name], rel=1e-12)


@pytest.mark.parametrize("classifier", [0, 2])
def test_evaluate_refuses_logits_that_are_not_finite_by_an_error_of_their_own(classifier):
    logits = LOGITS.clone()
    logits[classifier, 1, 0] = nan
    with pytest.raises(NonFiniteError):
        engine.evaluate(logits, LABELS, [True, True])


def test_first_nonfinite_names_loss_terms_or_else_parameter_or_buffer():
    model, means = build()[0], {"loss": 1.5, "ce": 1.0, "dml": 0.5, "top1_error": 50.0}
    assert engine.first_nonfinite(model, means) is None
    assert engine.first_nonfinite(model, means | {"loss": nan, "ce": inf, "dml": nan}) == "ce, dml"
    assert engine.first_nonfinite(model, means | {"loss": inf}) == "loss"
    for name, value in (("layer2.0.bn1.running_var", inf), ("bn1.running_mean", -inf), ("bn1.bias", nan)):
        model.state_dict()[name][2] = value
        assert engine.first_nonfinite(model, means) == name
