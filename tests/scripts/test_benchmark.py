"""The benchmark: its arithmetic, its lines, and what each configuration computes; not how fast anything is."""

import contextlib
import io
import json
import multiprocessing
from types import SimpleNamespace
from unittest import mock

import benchmark
import pytest
import torch
from conftest import ROOT
from helpers import make_small

from data.loader import Loader

SMALL = ["--PSKD", "--BYOT", "--width=4", "--batch_size=8", "--device=cpu", "--precision=fp32"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> SimpleNamespace:
    """The line of a process that ends, and what is said of one that fails after it."""
    out = tmp_path_factory.mktemp("measured") / "figures.jsonl"
    command = [*SMALL, "--rounds=1", "--steps=2", f"--out={out}", "--configs"]
    benchmark.command_line([*command, "eager"])
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        benchmark.command_line([*command, "fp32", "--data_type=folder", f"--data_path={out.parent}"])
    return SimpleNamespace(text=out.read_text(), error=error.getvalue())


@pytest.mark.slow
def test_process_that_fails_loses_no_other_line(measured):
    assert json.loads(measured.text)["config"] == "eager"
    assert "no line for fp32: exit status 1" in measured.error


def test_configuration_that_this_machine_lacks_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.command_line([*SMALL, f"--out={tmp_path / 'figures.jsonl'}", "--configs", "graph"])
    assert "--cuda_graph: needs one GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_table_shows_medians_and_keeps_runs_of_the_script_apart(measured, tmp_path):
    line = json.loads(measured.text)
    line |= {"run": "other", "seconds_compiling": 2}
    lines = [measured.text]
    for config, rate in (("eager", 300), ("reference", 100), ("eager", 320), ("reference", 120)):
        lines.append(json.dumps({**line, "config": config, "rounds": [rate]}) + "\n")
    (tmp_path / "figures.jsonl").write_text("".join(lines))
    table = benchmark.table([tmp_path / "figures.jsonl"])
    assert "| PSKD + BYOT | eager | 310.0 | 5.0 | 2.82 | 2.0 |  |\n" in table


def test_recorded_table_is_the_one_of_the_page():
    results = ROOT / "scripts" / "results"
    table = benchmark.table([results / "benchmark_cpu.jsonl"])
    assert "| resnet18 | PSKD + BYOT + DML | fp32 | 29.8 |" in table
    assert table in (results / "README.md").read_text()


CONFIGS = ["reference", "eager", "eager_nchw"]


class Spy:
    """Of each training epoch: the kinds of step, batches and targets, and whether images reach the network in NCHW."""

    def __init__(self):
        self.epochs = []
        self.labels = set()  # (row, label)
        self.memories = []
        self.train_one_epoch = benchmark.train_one_epoch

    def __call__(self, step, batches):
        layouts = set()
        step.model.layer1.register_forward_pre_hook(lambda _, inputs: layouts.add(inputs[0].is_contiguous()))
        trained = self.train_one_epoch(step, batches)
        targets = step.objective.soften
        self.epochs.append((type(step), type(batches), type(targets), set(layouts)))
        self.memories.append(targets.memory.sum(dim=1))
        for _, labels, index in batches:
            self.labels.update(zip(index.tolist(), labels.tolist(), strict=True))
        return trained


@pytest.fixture(scope="module")
def spied(tmp_path_factory) -> SimpleNamespace:
    """All configurations, in this process, and their lines."""
    out = tmp_path_factory.mktemp("spied") / "figures.jsonl"
    context = mock.Mock(Process=lambda target, args: mock.Mock(start=lambda: target(*args), exitcode=0))
    spy = Spy()
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(multiprocessing, "get_context", lambda _: context)
        patch.setattr(benchmark, "train_one_epoch", spy)
        benchmark.command_line([*SMALL, "--rounds=2", "--steps=2", f"--out={out}", "--configs", *CONFIGS])
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    return SimpleNamespace(spy=spy, lines=lines)


def test_configurations_take_turns_on_a_cpu(spied):
    turns = [(line["config"], len(line["rounds"])) for line in spied.lines]
    assert turns == [(name, 1) for name in 2 * CONFIGS]


def test_each_configuration_has_its_own_step_batches_and_layout(spied):
    reference = (benchmark.ReferenceStep, benchmark.DataLoader, benchmark.HostTargets, {True})
    ours = (benchmark.TrainStep, Loader, benchmark.ProgressiveTargets)
    first_epochs = spied.spy.epochs[::2]
    assert first_epochs == 2 * [reference, (*ours, {False}), (*ours, {True})]


def test_an_image_has_the_same_label_in_all_configurations(spied):
    assert len(spied.spy.labels) == 16


def test_every_configuration_remembers_its_predictions(spied):
    for memory in spied.spy.memories:
        torch.testing.assert_close(memory, torch.ones(16))
