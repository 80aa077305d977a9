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
import summarize
import torch
from helpers import metrics, record, write

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
    """A run of four epochs with validation errors 40, 30, 20 and 10 above `top1`, its last error on the test split.
    Returns the error of its predictions."""
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
    write(directory / "config.json", config)
    write(directory / "results.json", results)
    lines = [json.dumps(line) for line in history]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(60, 5, generator=generator)
    logits = noise + torch.eye(5)[LABELS]
    np.savez(directory / "predictions.npz", logits=logits.numpy(), labels=LABELS.numpy())
    return classification_metrics(logits, LABELS)["top1_error"]


def draw(root, name):
    """The figure of that name of the runs in `root`."""
    groups, _ = runs.group_runs(runs.find_runs([root]), "last")
    styles = plot.group_styles(groups)
    with figures.drawing() as Figure:
        if name == "error_against_ranking":
            return plot.error_against_ranking(Figure, groups, styles)
        return plot.draw(Figure, getattr(plot, name), groups, styles)


@pytest.fixture
def root(tmp_path):
    """Two seeds with exits and two without."""
    for seed in (1, 2):
        make_run(tmp_path, f"baseline{seed}", 25.0, seed)
        make_run(tmp_path, f"byot{seed}", 20.0 + 2 * seed, seed, nll=0.3 + seed / 100, BYOT=True)
    return tmp_path


def points(line):
    return line.get_xydata().tolist()


def shown_points(lines):
    """(marker, [x, y]) of lines of one point, without those of classifiers that do not exist."""
    found = []
    for line in lines:
        data = line.get_xydata()
        if np.isfinite(data).sum() == 2:
            found.append((line.get_marker(), points(line)[0]))
    return found


def test_learning_curves_are_means_in_a_band_of_one_deviation(root):
    (axis,) = draw(root, "learning_curves").axes
    _, byot = axis.lines
    assert points(byot) == [[1, 63], [2, 53], [3, 43], [4, 33]]  # of errors 22 and 24
    _, band = axis.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(33 - 2**0.5)
    assert heights.max() == pytest.approx(63 + 2**0.5)


def test_risk_coverage_ends_at_the_error_of_all_images(tmp_path):
    errors = [make_run(tmp_path, str(seed), 0, seed) for seed in (1, 2)]
    (axis,) = draw(tmp_path, "risk_coverage").axes
    last = points(axis.lines[0])[-1]
    assert last == pytest.approx([100, np.mean(errors)])


def test_reliability_shows_accuracy_by_bin():
    confidence = torch.tensor([0.15, 0.25, 0.95, 0.95], dtype=torch.float64)
    error = torch.tensor([1, 0, 0, 1], dtype=torch.float64)
    other = torch.tensor([0.15, 0.35, 0.95, 0.95], dtype=torch.float64)  # nothing in the bin of 0.25
    predictions = [(confidence, error), (other, 1 - error)]
    with figures.drawing() as Figure:
        axis = Figure().subplots()
        figures.reliability_diagram(axis, predictions, color="black")
    _, line = axis.lines  # the first is the diagonal
    assert points(line) == [pytest.approx([15, 50]), pytest.approx([95, 50])]
    _, areas = axis.collections  # the first is the band
    assert areas.get_sizes() == pytest.approx([150 * 2 / 8, 150 * 4 / 8])


def test_exits_have_their_names_and_places(root):
    (axis,) = draw(root, "exits").axes
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert labels == ["exit 1", "exit 2", "exit 3", "final", "ensemble"]
    lines = [line for line in axis.lines if line.get_linestyle() != "None"]
    baseline, _, byot, _ = map(points, lines[:4])
    assert baseline == [[3, 75]]
    assert byot == [pytest.approx([0, 68], abs=0.1), pytest.approx([3, 77], abs=0.1)]


def test_exits_are_marked_by_kind(root):
    (axis,) = draw(root, "exits").axes
    markers = [line for line in axis.lines if line.get_linestyle() == "None"]
    heights = [(marker, y) for marker, (_, y) in shown_points(markers)]
    assert heights == [("D", 75), ("o", 68), ("D", 77), ("*", 78)]


def test_early_exit_shows_curve_and_classifiers(root):
    (axis,) = draw(root, "early_exit").axes
    baseline, curve, *others = axis.lines
    crosses = [points(line) for line in others if line.get_marker() == "x"]
    classifiers = [line for line in others if line.get_marker() != "x"]
    assert points(baseline) == [[100, 75]]
    assert points(curve) == [[30, 61.5], [60, 75], [110, 81.5]]
    assert crosses == [[[30, 61]], [[30, 62]]]  # each run's chosen threshold
    assert shown_points(classifiers) == [("o", [30, 68]), ("D", [100, 77]), ("*", [110, 78])]


def test_ranking_has_a_panel_for_each_quantity(root):
    augrc, nll = draw(root, "error_against_ranking").axes
    assert augrc.get_ylabel() == "AUGRC (x 1000)"
    assert nll.get_ylabel() == "NLL after temperature scaling (nats)"


def test_ranking_shows_intervals_of_differences_from_the_baseline(root):
    _, axis = draw(root, "error_against_ranking").axes
    baseline, byot = axis.containers
    assert points(baseline.lines[0]) == [[25, 0.4]]
    assert not baseline.has_xerr
    assert points(byot.lines[0]) == [pytest.approx([23, 0.315])]
    half = intervals.student_quantile(0.95, 1) * 1  # of -3 and -1: deviation sqrt 2, of their mean 1
    (bar,) = byot.lines[2][0].get_segments()
    assert bar[:, 0] == pytest.approx([23 - half, 23 + half])
    dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert len(dotted) == 2


def test_ranking_shows_a_setting_at_the_baseline_plus_the_difference_of_their_common_seeds(root):
    make_run(root, "byot3", 2.0, 3, BYOT=True)  # without a baseline
    _, axis = draw(root, "error_against_ranking").axes
    _, byot = axis.containers
    assert points(byot.lines[0]) == [pytest.approx([23, 0.315])]


def test_ten_groups_differ_in_colour_and_line_and_72_in_both_and_in_marker():
    groups = [[types.SimpleNamespace(label=label)] for label in ("baseline", *map(str, range(72)))]
    styles = plot.group_styles(groups)
    assert styles["baseline"] == {"color": "black", "linestyle": "-", "marker": "o", "linewidth": 2.2}
    lines = [(style["color"], str(style["linestyle"])) for style in styles.values()]
    points = [(style["color"], style["marker"]) for style in styles.values()]
    colours, dashes = zip(*lines[:10], strict=True)
    assert len(set(colours)) == len(set(dashes)) == 10
    assert len(set(lines)) == len(set(points)) == 73


@pytest.mark.parametrize("name", ["reliability", "risk_coverage"])
def test_a_group_with_damaged_predictions_is_left_out(root, name, capsys):
    predictions = root / "baseline2" / "predictions.npz"
    predictions.write_bytes(b"PK\x03\x04 cut")
    (axis,) = draw(root, name).axes
    line, *others = capsys.readouterr().out.splitlines()
    assert line.startswith(f"left out of {name}: ")
    assert "/baseline1, " in line
    assert "/baseline2 (" in line
    assert not others
    assert axis.get_legend_handles_labels()[1] == ["BYOT"]


def test_runs_left_out_for_one_reason_share_a_line(root, capsys):
    for seed in (1, 2):
        make_run(root, f"dml{seed}", 25.0, seed, DML=True)
        make_run(root, f"pskd{seed}", 25.0, seed, PSKD=True)
    draw(root, "early_exit")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.count("/dml") + line.count("/pskd") == 3
    assert line.endswith(" and 1 more (no trained exits, or no --val_split)")


def test_a_group_without_early_exits_is_left_out(root, capsys):
    make_run(root, "dml", 25.0, 1, DML=True)
    draw(root, "early_exit")
    out = capsys.readouterr().out
    assert out.startswith("left out of early_exit: ")
    assert "/dml (no trained exits, or no --val_split)" in out


def test_panels_show_only_data_sets_that_have_the_figure(root, capsys):
    make_run(root, "dml", 25.0, 1, DML=True, data_type="synthetic")
    assert len(draw(root, "early_exit").axes) == 1


def test_a_study_file_has_no_epochs(root, tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    summarize.main([str(root), "--export", str(file)])
    capsys.readouterr()
    assert plot.main([str(file), "--out", str(tmp_path / "figures")]) == 0
    out = capsys.readouterr().out
    assert "left out of learning_curves" in out
    assert "needs the run directory: a study file has neither epochs nor predictions" in out


NAMES = ("error_against_ranking", "reliability", "risk_coverage", "learning_curves", "exits", "early_exit")


def test_every_figure_is_written_as_png_and_pdf(root):
    (root / "baseline1" / "predictions.npz").unlink()
    out = root / "a" / "figures"
    assert plot.main([str(root), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {f"{name}.{kind}" for name in NAMES for kind in ("png", "pdf")}
    assert b"/FontFile2" in (out / "exits.pdf").read_bytes()  # an embedded TrueType font


def test_a_notebooks_backend_is_not_used(tmp_path):
    image = tmp_path / "a.png"
    code = f"from utils import figures\nwith figures.drawing() as F:\n F().savefig({str(image)!r})"
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment["PYTHONPATH"] = str(plot.ROOT)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert image.exists()
