"""scripts/plot.py: figures of fabricated runs, the numbers that they show, and what is left out."""

import json

import numpy as np
import plot
import pytest
import summarize
import torch
from helpers import metrics, record

from utils import figures
from utils.metrics import classification_metrics

LABELS = torch.arange(60) % 5


def make_run(root, name, top1, seed, **flags):
    """A run of four epochs with validation errors 40, 30, 20 and 10 above `top1`, its last error on the test split."""
    config = {"classifier_type": "resnet18", "data_type": "cifar100", "num_resnet_blocks": 3, "end_epoch": 4}
    config |= {"val_split": 0.1, "device_name": "GPU", "seed": seed, **flags}
    lines = [record(t, top1 + 40 - 10 * t) for t in range(4)]
    test = record(3, top1) | {"exits": [], "ensemble": None, "early_exit": None}
    if "BYOT" in flags:
        points = [(30, 60 + seed), (60, 75), (110, 80 + seed)]
        curve = [{"threshold": 0.5, "multiply_adds": m, "accuracy": a} for m, a in points]
        early_exit = {"backbone_multiply_adds": 100, "multiply_adds": [30, 60, 110], "curve": curve, "chosen": curve[0]}
        test = record(3, top1) | {"exits": [metrics(top1 + 9), None], "early_exit": early_exit}
    results = {"status": "finished", "epochs": 4, "last": lines[-1], "test": {"last": test}}
    (root / name).mkdir(parents=True)
    (root / name / "config.json").write_text(json.dumps(config))
    (root / name / "results.json").write_text(json.dumps(results))
    (root / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(seed)) + torch.eye(5)[LABELS]
    np.savez(root / name / "predictions.npz", logits=logits.numpy(), labels=LABELS.numpy())
    return classification_metrics(logits, LABELS)["top1_error"]


@pytest.fixture
def runs(tmp_path):
    """Two seeds with exits, and one baseline, whose predictions are damaged; and the top-1 errors of the two."""
    top1 = [make_run(tmp_path / "runs", f"byot{seed}", 20.0 + seed, seed, BYOT=True) for seed in (1, 3)]
    make_run(tmp_path / "runs", "baseline", 25.0, 1)
    (tmp_path / "runs" / "baseline" / "predictions.npz").write_bytes(b"PK\x03\x04 cut")
    return tmp_path / "runs", top1


def test_figures_show_means_over_seeds(runs):
    groups = summarize.group_runs(summarize.find_runs([runs[0]]), "last")[0]
    lines = {}
    with figures.drawing() as Figure:
        for name in ("risk_coverage", "learning_curves", "exits", "early_exit"):
            axis = plot.draw(Figure, getattr(plot, name), groups).axes[0]
            lines[name] = [line.get_xydata().tolist() for line in axis.lines]
            if name == "learning_curves":
                band = axis.collections[1].get_paths()[0].vertices[:, 1]
    assert lines["risk_coverage"][0][-1] == pytest.approx([100, np.mean(runs[1])])
    assert lines["learning_curves"][1] == [[1, 62], [2, 52], [3, 42], [4, 32]]
    assert [band.min(), band.max()] == pytest.approx([32 - 2**0.5, 62 + 2**0.5])
    baseline, _, exits, ensemble = lines["exits"]
    shift = ensemble[0][0] - 1.25
    assert baseline[2] == [1, 75] and ensemble == [[1.25 + shift, 79]] and 0 < shift < 0.05
    assert exits[::2] == [pytest.approx([1 / 3 + shift, 69]), pytest.approx([1 + shift, 78])]
    curve, classifiers = lines["early_exit"]
    assert curve == [[30, 62], [60, 75], [110, 82]]
    assert classifiers[0] == [30, 69] and classifiers[2:] == [[100, 78], [110, 79]]


def test_files_and_what_is_left_out(runs, tmp_path, capsys):
    plot.main([str(runs[0]), "--out", str(tmp_path / "a" / "figures")])
    files = {path.name: path.read_bytes() for path in (tmp_path / "a" / "figures").iterdir()}
    names = ("reliability", "risk_coverage", "learning_curves", "exits", "early_exit")
    assert files.keys() == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert b"/FontFile2" in files["exits.pdf"]  # an embedded TrueType font
    lines = [line for line in capsys.readouterr().out.splitlines() if "runs/baseline (" in line]
    assert [line.split()[3] for line in lines] == ["reliability:", "risk_coverage:", "early_exit:"]
