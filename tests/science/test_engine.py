"""The loops, against the same loops written out; metrics of all classifiers; what is not finite."""

import copy
from math import inf, log, nan, sqrt

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical

from loss import build_objective
from main import parse_args
from models import build_model
from utils import distributed, engine, flags, launch, metrics
from utils.launch import World
from utils.metrics import all_metrics, per_sample

CPU = torch.device("cpu")
ALL = "--PSKD --BYOT --DML --end_epoch 2"


class Batches:
    """A loader of eight images in batches of 3, 3 and 2."""

    batch_size, num_samples = 3, 8
    images = torch.arange(8 * 3 * 16 * 16, dtype=torch.float32).view(8, 3, 16, 16).sin()
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])

    def __init__(self, order=range(8)):
        self.order = torch.tensor(order)

    def __iter__(self):
        for index in self.order.split(self.batch_size):
            yield self.images[index], self.labels[index], index


def parse(words: str):
    return parse_args(["--device", "cpu", "--precision", "fp32", "--width", "4", *words.split()])


def build(args):
    """A network and its objective for four classes."""
    return build_model(args, 4).train(), build_objective(args, 8, 4).train()


def build_step(precision: str = "fp32", transform=None) -> engine.TrainStep:
    args = parse(f"{ALL} --precision {precision}")
    model, objective = build(args)
    optimizer = engine.build_optimizer(args, model)
    return engine.TrainStep(model, objective, optimizer, CPU, precision, transform=transform)


RATES = {
    "--lr 0.1 --lr_decay_rate 0.2 --lr_decay_schedule 2 3 5": [0.1, 0.1, 0.02, 0.004, 0.004, 0.0008],
    # cosines of 0, 45, 90 and 135 degrees
    "--lr 0.2 --lr_schedule cosine --end_epoch 4": [0.2, 0.1 * (1 + sqrt(0.5)), 0.1, 0.1 * (1 - sqrt(0.5))],
    "--lr 0.4 --warmup_epochs 3 --lr_decay_schedule 5": [0.1, 0.2, 0.3, 0.4, 0.4, 0.04, 0.04],
    "--lr 0.2 --lr_schedule cosine --end_epoch 3 --warmup_epochs 1": [0.1, 0.2, 0.1],
}


@pytest.mark.parametrize("words", RATES)
def test_learning_rates_worked_by_hand(words):
    schedule = engine.build_schedule(parse(words))
    found = [schedule(epoch) for epoch in range(len(RATES[words]))]
    assert found == pytest.approx(RATES[words], rel=1e-15)


@pytest.mark.parametrize("processes", [1, 2])
def test_meter_weights_by_images_in_float64(processes, monkeypatch):
    """Of two processes the other one has the same images."""
    monkeypatch.setattr(launch, "WORLD", World(size=processes))
    monkeypatch.setattr(distributed, "all_reduce_sum_", lambda sums: sums.mul_(processes))
    meter = engine.Meter(CPU)
    for ce, classes in ((2.0**24, [1, 1, 0]), (1.0, [0, 0, 0]), (2.0, [1])):  # 3 * 2^24 + 5 is not a float32
        logits = torch.eye(2)[classes]
        labels = torch.zeros(len(classes), dtype=torch.int64)
        parts = {"ce": torch.tensor(ce), "dml": torch.tensor(-ce / 2)}
        batch_size = len(classes) * processes
        meter.update(parts, logits, labels, batch_size)
        meter.num_images += batch_size
    ce = (3 * 2**24 + 3 * 1 + 1 * 2) / 7
    expected = {"loss": ce / 2, "ce": ce, "dml": -ce / 2, "top1_error": 100 * 3 / 7}
    assert meter.means() == pytest.approx(expected, rel=1e-14)
    assert meter.means(estimated=True) == meter.means()


def mix_up(images, labels):
    """Each image with another one of the batch, both drawn from the global generator; labels (N, 4)."""
    weight = torch.rand(())
    other = torch.randperm(len(labels))
    y = F.one_hot(labels, 4).float()
    return torch.lerp(images[other], images, weight), torch.lerp(y[other], y, weight)


class Reference:
    """The training loop written out, from the same weights as `build_step`."""

    def __init__(self, precision: str, transform):
        self.transform = transform
        self.model, self.objective = build(parse(ALL))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
        self.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.autocast = torch.autocast("cpu", dtype, enabled=precision != "fp32")

    def train_one_epoch(self, batches) -> dict[str, float]:
        """Sums of the loss and its parts over the images, and the number of wrong ones, divided by 8."""
        sums, wrong = {}, 0
        for images, labels, index in batches:
            if self.transform:
                images, labels = self.transform(images, labels)
            with self.autocast:
                outputs = self.model(images)
            loss, parts = self.objective(outputs, labels, index)
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0) + len(labels) * value.item()
            classes = labels.argmax(dim=1) if self.transform else labels
            wrong += (outputs.logits.argmax(dim=1) != classes).sum().item()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.objective.end_epoch()
        means = {name: value / 8 for name, value in sums.items()}
        return {**means, "top1_error": 100 * wrong / 8}


@pytest.mark.parametrize("precision, transform", [("fp32", None), ("bf16", None), ("fp16", None), ("fp32", mix_up)])
def test_an_epoch_equals_the_loop_written_out(precision, transform):
    """Weights, memory and means to the bit, over two epochs whose last batch is smaller."""
    step = build_step(precision, transform)
    reference = Reference(precision, transform)
    for epoch, order in enumerate(((4, 0, 6, 2, 1, 5, 3, 7), (3, 1, 0, 7, 5, 6, 4, 2))):
        step.objective.set_epoch(epoch)
        torch.manual_seed(epoch)
        result = engine.train_one_epoch(step, Batches(order))
        reference.objective.set_epoch(epoch)
        torch.manual_seed(epoch)
        expected = reference.train_one_epoch(Batches(order))
        assert result["train"] == pytest.approx(expected, rel=1e-6)
        assert ("skipped_steps" in result) == (precision == "fp16")
        assert not step.objective.soften.seen.any()  # the objective was told that the epoch ended
        assert_identical(step.model.state_dict(), reference.model.state_dict())
        assert_identical(step.objective.state_dict(), reference.objective.state_dict())


def set_scale(step, scale: float, **settings) -> None:
    """Of fp16's losses."""
    state = step.scaler.state_dict()
    step.scaler.load_state_dict({**state, "scale": scale, **settings})


def test_fp16_skips_steps_whose_gradients_overflow():
    step = build_step("fp16")
    set_scale(step, 2.0**40)
    before = copy.deepcopy(list(step.model.parameters()))
    result = engine.train_one_epoch(step, Batches())
    assert result["skipped_steps"] == 3
    assert all(map(torch.equal, step.model.parameters(), before))
    assert not any(state["momentum_buffer"].any() for state in step.optimizer.state.values())
    assert step.scaler.get_scale() == 2.0**37

    set_scale(step, 64.0)
    result = engine.train_one_epoch(step, Batches())
    assert result["skipped_steps"] == 0
    assert not any(map(torch.equal, step.model.parameters(), before))


def test_a_skipped_step_keeps_its_loss_and_predictions():
    step = build_step("fp16")
    set_scale(step, 2.0**40)
    means = engine.train_one_epoch(step, Batches())["train"]
    assert 0 < means["loss"] < inf
    assert 0 < means["byot_hint"] < inf
    memory = step.objective.soften.memory
    torch.testing.assert_close(memory.sum(dim=1), torch.ones(8))
    assert engine.first_nonfinite(step.model, means) is None


def test_fp16_on_a_cpu_is_accepted_with_a_note():
    notes = flags.notes(parse("--precision fp16"), set(), CPU)
    assert any("fp16 is slow" in note for note in notes)


def test_fp16_resumes_to_the_bit_with_scale_and_steps_since_it_grew():
    through, stopped, resumed = (build_step("fp16") for _ in range(3))
    for step in (through, stopped):
        set_scale(step, 64.0, growth_interval=5)
        engine.train_one_epoch(step, Batches())
    for name in ("model", "objective", "optimizer", "scaler"):
        state = getattr(stopped, name).state_dict()
        getattr(resumed, name).load_state_dict(copy.deepcopy(state))
    for step in (through, resumed):
        engine.train_one_epoch(step, Batches())
    assert resumed.scaler.get_scale() == 128.0  # it grew in the fifth step
    assert resumed.scaler.state_dict() == through.scaler.state_dict()
    assert_identical(resumed.model.state_dict(), through.model.state_dict())


def test_predict_gives_all_classifiers_in_order_of_the_split():
    model, _ = build(parse(ALL))
    logits, labels = engine.predict(model, Batches(), "fp32")
    outputs = model.eval()(Batches.images)
    expected = torch.stack([*outputs.exit_logits, outputs.logits]).detach()
    assert logits.shape == (4, 8, 4)
    assert not logits.requires_grad
    assert torch.equal(labels, Batches.labels)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


# Probabilities of exits 1 and 2 and of the final classifier, for two images of classes 0 and 1.
CLASSIFIERS = [[[0.8, 0.2], [0.3, 0.7]], [[0.1, 0.9], [0.9, 0.1]], [[0.4, 0.6], [0.2, 0.8]]]
LOGITS = torch.tensor(CLASSIFIERS, dtype=torch.float64).log()
LABELS = torch.tensor([0, 1])


NAMES = ["exit 1", "exit 2", "final"]


@pytest.mark.parametrize("trained", [NAMES, ["exit 1", "final"], ["exit 2", "final"], ["final"]])
def test_evaluate_gives_metrics_of_trained_classifiers_and_of_the_ensemble_of_several(trained):
    found = engine.evaluate(LOGITS, LABELS, trained)
    assert list(found) == [*trained, "ensemble"][: None if len(trained) > 1 else 1]
    for name, logits in zip(NAMES, LOGITS, strict=True):
        if name in trained:
            assert found[name] == all_metrics(per_sample(logits, LABELS))


def nll_of_ensemble(logits, labels, trained: list[str]) -> float:
    return engine.evaluate(logits, labels, trained)["ensemble"]["nll"]


def test_ensemble_is_the_mean_probability_of_trained_classifiers():
    # Of all: (0.8 + 0.1 + 0.4) / 3 for class 0 of the first image, (0.7 + 0.1 + 0.8) / 3 for class 1 of the second.
    of_all = nll_of_ensemble(LOGITS, LABELS, NAMES)
    assert of_all == pytest.approx(-(log(1.3 / 3) + log(1.6 / 3)) / 2, rel=1e-12)
    of_two = nll_of_ensemble(LOGITS, LABELS, ["exit 1", "final"])
    assert of_two == pytest.approx(-(log(0.6) + log(0.75)) / 2, rel=1e-12)


def test_ensemble_of_probabilities_below_the_smallest_float():
    """-log((exp(-800) + exp(-900)) / 2) = 800 + log 2, though exp(-800) is 0 in float64."""
    logits = torch.tensor([[[0.0, 800.0]], [[0.0, 900.0]]])
    assert nll_of_ensemble(logits, LABELS[:1], ["exit 1", "final"]) == pytest.approx(800 + log(2), rel=1e-12)


def test_evaluate_in_chunks_of_rows_gives_every_row_its_metrics(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 7, generator=generator)
    labels = torch.randint(7, (50,), generator=generator)
    expected = engine.evaluate(logits, labels, NAMES)
    monkeypatch.setattr(metrics, "CHUNK", 3 * 7)
    found = engine.evaluate(logits, labels, NAMES)
    for name in ("final", "ensemble"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12)


MEANS = {"loss": 1.5, "ce": 1.0, "dml": 0.5, "top1_error": 50.0}


def first_nonfinite(**means) -> str | None:
    model, _ = build(parse(""))
    return engine.first_nonfinite(model, MEANS | means)


def test_first_nonfinite_names_terms_of_the_loss():
    assert first_nonfinite() is None
    assert first_nonfinite(loss=nan, ce=inf, dml=nan) == "ce, dml"
    assert first_nonfinite(loss=inf) == "loss"


def test_first_nonfinite_names_the_first_parameter_or_buffer():
    model, _ = build(parse(ALL))
    for name, value in (("layer2.0.bn1.running_var", inf), ("bn1.running_mean", -inf), ("bn1.bias", nan)):
        model.state_dict()[name][2] = value
        assert engine.first_nonfinite(model, MEANS) == name
