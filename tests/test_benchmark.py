"""The benchmark: its arithmetic, its lines, and the pipeline that it compares with; not how fast anything is."""

import json
import sys
from pathlib import Path

import torch

from main import parse_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import benchmark
from benchmark import build_loaders, build_model, build_objective, reference_pipeline

SMALL = "--PSKD --BYOT --width=4 --batch_size=8 --device=cpu --precision=fp32 --data_type=synthetic"


def test_flop_per_image_of_full_width_networks():
    for network, flop in (("resnet18", 3_569_270_784), ("resnext50_32x4d", 10_512_826_368)):
        model = build_model(parse_args(["--BYOT", "--classifier_type", network]), 100)
        assert benchmark.flop_per_image(model, 32) == flop


def test_process_that_fails_loses_no_other_line_and_table_is_of_the_newest_run(tmp_path, capsys):
    out = tmp_path / "figures.jsonl"
    command = [*SMALL.split(), "--rounds=1", "--steps=2", f"--out={out}", "--configs"]
    benchmark.command_line([*command, "eager"])
    benchmark.command_line([*command, "fp32", "--time_limit=1"])
    assert "no line for fp32" in capsys.readouterr().err
    by_hand = {"run": "newest", "flop_per_image": 2e9, "matrix_flop_per_second": 4e12, "seconds_compiling": 2}
    line = json.loads(out.read_text()) | by_hand
    for line["config"], rate in ("eager", 300), ("reference", 100), ("eager", 320), ("reference", 120):
        out.write_text(out.read_text() + json.dumps({**line, "rounds": [rate]}) + "\n")
    assert "| PSKD + BYOT | eager | 310.0 | 5.0 | 2.82 | 15.5% | 2.0 |  | 161.3 |  |\n" in benchmark.table([out])


def test_reference_pipeline_keeps_images_labels_and_memory_together():
    args = parse_args([*SMALL.split(), "--classes=3", "--limit_train=24"])
    (loader, _), objective = build_loaders(args, "cpu"), build_objective(args, 24, 3)
    arguments = args, loader, build_model(args, 3), objective, torch.device("cpu")
    step, reference = reference_pipeline.build(*arguments)
    for batch in reference:
        assert batch[1].equal(loader.labels[batch[2]])
        step(*batch, 8)
    assert objective.targets.memory.sum(dim=1).allclose(torch.ones(24))
