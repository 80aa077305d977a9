"""scripts/plot.py: figures of fabricated runs, the numbers that they show, and what is left out."""

import json
import os
import subprocess
import sys
import types

import intervals
import numpy as np
import plot
import pytest
import runs
import torch
from helpers import metrics, record

from utils import figures
from utils.metrics import classification_metrics

LABELS = torch.arange(60) % 5
CURVE = [(30, 60), (60, 75), (110, 80)]  # MACs, accuracy


def exits_block(top1, seed):
    """What a run with exits adds to its test block: one trained exit of two, an early-exit curve."""
    curve = []
    for macs, accuracy in CURVE:
        if macs != 60:
            accuracy += seed % 3
        curve.append({"threshold": 0.5, "multiply_adds": macs, "accuracy": accuracy})
    early_exit = {"backbone_multiply_adds": 100, "multiply_adds": [30, 60, 110]}
    early_exit |= {"curve": curve, "chosen": curve[0]}
    return {"exits": [metrics(top1 + 9), None], "early_exit": early_exit}


def make_run(root, name, top1, seed, nll=0.4, **flags):
    """A run of four epochs with validation errors 40, 30, 20 and 10 above `top1`, its last error on the test split."""
    config = {"classifier_type": "resnet18", "data_type": "cifar100", "num_resnet_blocks": 3, "end_epoch": 4}
    config |= {"val_split": 0.1, "device_name": "GPU", "seed": seed, **flags}
    test = record(3, top1)
    if "BYOT" in flags:
        test |= exits_block(top1, seed)
    else:
        test |= {"exits": [], "ensemble": None, "early_exit": None}
    test["calibrated"] = {"val": {"nll": nll}, "exits": [None] * len(test["exits"])}
    history = [record(t, top1 + 40 - 10 * t) for t in range(4)]
    results = {"status": "finished", "epochs": 4, "last": history[-1], "test": {"last": test}}

    directory = root / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 5, generator=generator) + torch.eye(5)[LABELS]
    np.savez(directory / "predictions.npz", logits=logits.numpy(), labels=LABELS.numpy())
    return classification_metrics(logits, LABELS)["top1_error"]


@pytest.fixture
def axis_of(tmp_path):
    """axis_of(name) -> the axis of that figure, of two seeds with exits and without."""
    for seed in (1, 2):
        make_run(tmp_path, f"baseline{seed}", 25.0, seed)
        make_run(tmp_path, f"byot{seed}", 20.0 + 2 * seed, seed, BYOT=True, nll=0.3 + seed / 100)
    groups, _ = runs.group_runs(runs.find_runs([tmp_path]), "last")
    styles = plot.group_styles(groups)

    def call(name):
        with figures.drawing() as Figure:
            if name == "error_against_ranking":
                return plot.error_against_ranking(Figure, groups, styles).axes
            return plot.draw(Figure, getattr(plot, name), groups, styles).axes[0]

    return call


def points(line):
    return line.get_xydata().tolist()


def shown_points(lines):
    """(marker, [x, y]) of lines of one point, without those of classifiers that do not exist."""
    return [(line.get_marker(), points(line)[0]) for line in lines if np.isfinite(line.get_xydata()).sum() == 2]


def test_learning_curves_are_means_in_a_band_of_one_deviation(axis_of):
    axis = axis_of("learning_curves")
    assert points(axis.lines[1]) == [[1, 63], [2, 53], [3, 43], [4, 33]]  # of errors 22 and 24
    band = axis.collections[1].get_paths()[0].vertices[:, 1]
    assert [band.min(), band.max()] == pytest.approx([33 - 2**0.5, 63 + 2**0.5])


def test_risk_coverage_ends_at_the_error_of_all_images(axis_of, tmp_path):
    top1 = [make_run(tmp_path / "again", str(seed), 0, seed) for seed in (1, 2)]
    assert points(axis_of("risk_coverage").lines[0])[-1] == pytest.approx([100, np.mean(top1)])


def test_reliability_shows_accuracy_by_bin():
    confidence = torch.tensor([0.15, 0.25, 0.95, 0.95], dtype=torch.float64)
    error = torch.tensor([1, 0, 0, 1], dtype=torch.float64)
    other = torch.tensor([0.15, 0.35, 0.95, 0.95], dtype=torch.float64)  # nothing in the bin of 0.25
    with figures.drawing() as Figure:
        axis = Figure().subplots()
        figures.reliability_diagram(axis, [(confidence, error), (other, 1 - error)], color="black")
    line = next(line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_xdata()[1] == 95)
    assert points(line) == [pytest.approx([15, 50]), pytest.approx([95, 50])]
    assert axis.collections[1].get_sizes() == pytest.approx([150 * 2 / 8, 150 * 4 / 8])


def test_exits_have_their_names_and_places(axis_of):
    axis = axis_of("exits")
    assert [text.get_text() for text in axis.get_xticklabels()] == ["exit 1", "exit 2", "exit 3", "final", "ensemble"]
    lines = [points(line) for line in axis.lines if line.get_linestyle() != "None"]
    baseline, _, byot, _ = lines[:4]
    assert baseline == [[3, 75]]
    assert byot == [pytest.approx([0, 68], abs=0.1), pytest.approx([3, 77], abs=0.1)]
    marked = shown_points(line for line in axis.lines if line.get_linestyle() == "None")
    heights = [(marker, y) for marker, (x, y) in marked if y != 75]  # without the baseline
    assert heights == [("o", 68), ("D", 77), ("*", 78)]


def test_early_exit_shows_curve_and_classifiers(axis_of):
    baseline, curve, *classifiers = axis_of("early_exit").lines
    assert points(baseline) == [[100, 75]]
    assert points(curve) == [[30, 61.5], [60, 75], [110, 81.5]]
    assert shown_points(classifiers) == [("o", [30, 68]), ("D", [100, 77]), ("*", [110, 78])]


def test_ranking_shows_intervals_of_differences_from_the_baseline(axis_of):
    augrc, nll = axis_of("error_against_ranking")
    assert (augrc.get_ylabel(), nll.get_ylabel()) == ("AUGRC (x 1000)", "NLL after temperature scaling (nats)")
    baseline, byot = nll.containers
    assert points(baseline.lines[0]) == [[25, 0.4]] and not baseline.has_xerr
    assert points(byot.lines[0]) == [pytest.approx([23, 0.315])]
    half = intervals.student_quantile(0.95, 1) * 1  # of -3 and -1: deviation sqrt 2, of their mean 1
    (bar,) = byot.lines[2][0].get_segments()
    assert bar[:, 0] == pytest.approx([23 - half, 23 + half])
    assert [line.get_linestyle() for line in nll.lines].count(":") == 2


def test_groups_differ_in_line_and_marker():
    groups = [[types.SimpleNamespace(label=label)] for label in ("baseline", *"abcdefghi")]
    styles = plot.group_styles(groups)
    assert styles["baseline"] == {"color": "black", "linestyle": "-", "marker": "o", "linewidth": 2.2}
    assert len({str(style["linestyle"]) for style in styles.values()}) == 10
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == 10


def test_files_and_what_is_left_out(tmp_path, capsys):
    make_run(tmp_path / "runs", "byot", 20.0, 1, BYOT=True)
    make_run(tmp_path / "runs", "baseline", 25.0, 1)
    (tmp_path / "runs" / "baseline" / "predictions.npz").write_bytes(b"PK\x03\x04 cut")
    make_run(tmp_path / "runs", "dml", 25.0, 1, DML=True)
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "a" / "figures")]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "a" / "figures").iterdir()}
    names = ("error_against_ranking", "reliability", "risk_coverage", "learning_curves", "exits", "early_exit")
    assert files.keys() == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert b"/FontFile2" in files["exits.pdf"]  # an embedded TrueType font
    out = capsys.readouterr().out
    left_out = [line.split()[3] for line in out.splitlines() if "left out" in line and "runs/baseline (" in line]
    assert left_out == ["reliability:", "risk_coverage:"]
    assert "left out of early_exit" in out


def test_a_notebooks_backend_is_not_used(tmp_path):
    code = f"from utils import figures\nwith figures.drawing() as F:\n F().savefig({str(tmp_path / 'a.png')!r})"
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment["PYTHONPATH"] = str(plot.ROOT)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "a.png").exists()
