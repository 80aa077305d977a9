"""The benchmark: its arithmetic, its lines, and what each configuration computes; not how fast anything is."""

import json
import multiprocessing
from pathlib import Path
from unittest import mock

import benchmark
import pytest
import torch
from conftest import ROOT

from data.loader import Loader
from main import parse_args

SMALL = "--PSKD --BYOT --width=4 --batch_size=8 --device=cpu --precision=fp32"


@pytest.mark.parametrize("network, flop", [("resnet18", 3_569_270_784), ("resnext50_32x4d", 10_512_826_368)])
def test_flop_per_image_of_full_width_networks(network, flop):
    model = benchmark.build_model(parse_args(["--BYOT", "--classifier_type", network]), 100)
    assert benchmark.flop_per_image(model, 32) == flop


def test_process_that_fails_loses_no_other_line_and_table_keeps_runs_apart(tmp_path, capsys):
    out = tmp_path / "figures.jsonl"
    command = [*SMALL.split(), "--rounds=1", "--steps=2", f"--out={out}", "--configs"]
    benchmark.command_line([*command, "eager"])
    benchmark.command_line([*command, "fp32", "--time_limit=1"])
    with pytest.raises(SystemExit):
        benchmark.command_line([*command, "graph"])
    error = capsys.readouterr().err
    assert "no line for fp32: time limit" in error and "--cuda_graph: needs one GPU" in error
    by_hand = {"run": "other", "flop_per_image": 2e9, "matrix_flop_per_second": 4e12, "seconds_compiling": 2}
    line = json.loads(out.read_text()) | by_hand
    for line["config"], rate in ("eager", 300), ("reference", 100), ("eager", 320), ("reference", 120):
        out.write_text(out.read_text() + json.dumps({**line, "rounds": [rate]}) + "\n")
    assert "| PSKD + BYOT | eager | 310.0 | 5.0 | 2.82 | 15.5% | 2.0 |  |  |\n" in benchmark.table([out])
    assert "| eager | 48.5 | 0.9 | 2.27 | 41.2% |" in benchmark.table([ROOT / "scripts/results/benchmark_cpu.jsonl"])


def test_configurations_take_turns_on_a_cpu_each_with_its_own_step_batches_and_layout(tmp_path, monkeypatch):
    seen, labels_of, train = [], set(), benchmark.train_one_epoch

    def spy(step, batches):
        is_nchw = set()
        step.model.layer1.register_forward_pre_hook(lambda _, inputs: is_nchw.add(inputs[0].is_contiguous()))
        trained = train(step, batches)
        seen.append((type(step), type(batches), type(step.objective.targets), set(is_nchw)))
        assert step.objective.targets.memory.sum(dim=1).allclose(torch.ones(16))
        for _, labels, index in batches:
            labels_of.update(zip(index.tolist(), labels.tolist(), strict=True))
        return trained

    monkeypatch.setattr(benchmark, "train_one_epoch", spy)
    context = mock.Mock(Process=lambda target, args: mock.Mock(start=lambda: target(*args), exitcode=0))
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)  # in this process
    configs, out = ["reference", "eager", "eager_nchw"], tmp_path / "figures.jsonl"
    benchmark.command_line([*SMALL.split(), "--rounds=2", "--steps=2", f"--out={out}", "--configs", *configs])
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [(line["config"], len(line["rounds"])) for line in lines] == [(name, 1) for name in 2 * configs]
    ours = (benchmark.TrainStep, Loader, benchmark.ProgressiveTargets)
    reference = (benchmark.ReferenceStep, benchmark.DataLoader, benchmark.HostTargets, {True})
    assert seen[::2] == 2 * [reference, (*ours, {False}), (*ours, {True})]
    assert len(labels_of) == 16  # the same label for an image in all of them


def test_epoch_is_training_validation_and_saving_without_the_first(monkeypatch):
    def write_metrics(argv):
        args = parse_args(argv)
        run = Path(args.experiments_dir, args.run_name)
        run.mkdir()
        lines = [{"seconds": n, "seconds_validation": n / 10, "seconds_saving": n / 100} for n in (900, 100, 500, 300)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines[: args.end_epoch])))
        return 0

    monkeypatch.setattr(benchmark.main, "main", write_metrics)
    assert benchmark.time_epochs(SMALL.split(), 3) == {"seconds_per_epoch": 333}
