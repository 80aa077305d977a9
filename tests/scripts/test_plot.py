"""scripts/plot.py and scripts/figures.py: figures of fabricated runs, the numbers that they show, what is left out."""

import json
import os
import shutil
import subprocess
import sys
import types
import xml.etree.ElementTree

import figures
import intervals
import numpy as np
import plot
import pytest
import runs
import summarize
import torch
from helpers import make_finished_run, metrics, record

from utils.metrics import classification_metrics

LABELS = torch.arange(60) % 5
CURVE = [(30, 60), (60, 75), (110, 80)]  # MACs, accuracy


def exits_block(top1, seed):
    """The test split's block of a run with exits, of which one is trained, and an early-exit curve."""
    curve = []
    for macs, accuracy in CURVE:
        if macs != 60:
            accuracy += seed % 3
        curve.append({"threshold": 0.5, "multiply_adds": macs, "accuracy": accuracy})
    early_exit = {"backbone_multiply_adds": 100, "curve": curve, "chosen": curve[0]}
    classifiers = {"exit 1": metrics(top1 + 9), "final": metrics(top1), "ensemble": metrics(top1 - 1)}
    return {"metrics": classifiers, "early_exit": early_exit}


def make_run(root, name, top1, seed, ece=4.0, methods=(), **config):
    """A run of four epochs with validation errors 40, 30, 20 and 10 above `top1`, its error on the test split.
    Returns the error of its predictions."""
    test = {"epoch": 3, "temperatures": {"final": 2.0}, "calibrated": {"final": {"ece": ece}}}
    test |= exits_block(top1, seed) if "BYOT" in methods else {"metrics": {"final": metrics(top1)}}
    history = [record(t, top1 + 40 - 10 * t) for t in range(4)]
    results = {"epochs": 4, "last": history[-1], "test": {"last": test}}
    flags = {method: method in methods for method in ("PSKD", "BYOT", "DML")} | {"end_epoch": 4, "val_split": 0.1}
    make_finished_run(root, name, top1, seed, results=results, **flags, **config)
    directory = root / name
    lines = [json.dumps(line) for line in history]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(60, 5, generator=generator)
    logits = noise + torch.eye(5)[LABELS]
    np.savez(directory / "predictions.npz", logits=logits.numpy(), labels=LABELS.numpy())
    return classification_metrics(logits, LABELS)["top1_error"]


def draw(root, name):
    """The figure of that name of the runs in `root`."""
    groups, _ = runs.load([root], "last")
    with figures.drawing() as Figure:
        if name == "differences":
            return plot.draw_differences(Figure, groups)
        return plot.draw_lines(Figure, name, groups)


@pytest.fixture
def root(tmp_path):
    """Two seeds with exits and two without."""
    for seed in (1, 2):
        make_run(tmp_path, f"baseline{seed}", 25.0, seed)
        make_run(tmp_path, f"byot{seed}", 20.0 + 2 * seed, seed, ece=3 + seed, methods=["BYOT"])
    return tmp_path


def points(line):
    return line.get_xydata().tolist()


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


def test_exits_have_their_names_places_and_accuracies(root):
    (axis,) = draw(root, "exits").axes
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert labels == ["exit 1", "exit 2", "exit 3", "final", "ensemble"]
    baseline, _, byot, ensemble = map(points, axis.lines)
    assert baseline == [[3, 75]]
    assert byot == [[0, 68], [3, 77]]
    assert ensemble == [[4, 78]]


def test_early_exit_shows_the_baseline_a_curve_and_each_run_s_threshold(root):
    (axis,) = draw(root, "early_exit").axes
    baseline, curve, *crosses = map(points, axis.lines)
    assert baseline == [[0, 75], [100, 75]]
    assert curve == [[30, 61.5], [60, 75], [110, 81.5]]
    assert crosses == [[[30, 61]], [[30, 62]]]


def test_differences_have_a_panel_for_each_quantity_and_a_row_for_each_setting(root):
    make_run(root, "dml", 24.0, 1, methods=["DML"])
    first, *_ = axes = draw(root, "differences").axes
    assert [axis.get_title() for axis in axes] == ["top-1 err (%)", "ECE (%)", "ECE after T (%)"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["BYOT", "DML"]


def test_differences_have_the_interval_of_seeds_paired_with_the_baseline(root, capsys):
    make_run(root, "byot3", 2.0, 3, methods=["BYOT"])  # without a baseline
    axis = draw(root, "differences").axes[0]
    assert "left out of differences: BYOT, seed 3 (no baseline" in capsys.readouterr().out
    (byot,) = axis.containers
    assert points(byot.lines[0]) == [[-2, 0]]
    half = intervals.student_quantile(0.95, 1) * 1  # of -3 and -1: deviation sqrt 2, of their mean 1
    (bar,) = byot.lines[2][0].get_segments()
    assert bar[:, 0] == pytest.approx([-2 - half, -2 + half])
    assert byot.lines[0].get_markerfacecolor() == "white"  # which has 0 in it


def test_ten_groups_differ_in_colour_and_in_line_and_90_in_one_of_them():
    groups = [types.SimpleNamespace(label=label) for label in ("baseline", *map(str, range(90)))]
    styles = plot.group_styles(groups)
    lines = [(style["color"], str(style["linestyle"])) for style in styles.values()]
    colours, dashes = zip(*lines[:10], strict=True)
    assert len(set(colours)) == len(set(dashes)) == 10
    assert len(set(lines)) == 91


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


def test_caption_says_how_many_runs_a_setting_has(root):
    for seed in range(8):
        make_run(root, f"dml{seed}", 25.0, seed, methods=["DML"])
    assert "Runs per setting: 2 to 8." in draw(root, "learning_curves").get_suptitle().replace("\n", " ")


def test_runs_left_out_for_one_reason_share_a_line(root, capsys):
    for seed in (1, 2, 3):
        make_run(root, f"dml{seed}", 25.0, seed, methods=["DML"])
        make_run(root, f"pskd{seed}", 25.0, seed, methods=["PSKD"])
    draw(root, "early_exit")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.count("/dml") + line.count("/pskd") == 5
    assert line.endswith(", ... (no trained exits, or no --val_split)")


def test_panels_show_only_data_sets_that_have_the_figure(root, capsys):
    make_run(root, "dml", 25.0, 1, methods=["DML"], data_type="synthetic")
    assert len(draw(root, "early_exit").axes) == 1


def test_a_study_file_has_no_epochs(root, tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    summarize.main([str(root), "--export", str(file)])
    capsys.readouterr()
    assert plot.main([str(file), "--out", str(tmp_path / "figures")]) == 0
    out = capsys.readouterr().out
    assert "left out of learning_curves" in out
    assert "needs the run directory: a study file has neither epochs nor predictions" in out


NAMES = ("differences", "reliability", "risk_coverage", "learning_curves", "exits", "early_exit")


def test_every_figure_is_written_as_png_and_pdf(root):
    (root / "baseline1" / "predictions.npz").unlink()
    out = root / "a" / "figures"
    assert plot.main([str(root), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {f"{name}.{kind}" for name in NAMES for kind in ("png", "pdf")}
    assert b"/FontFile2" in (out / "exits.pdf").read_bytes()  # an embedded TrueType font


def test_early_exit_has_few_curves_unless_others_are_asked_for(root, monkeypatch):
    make_run(root, "other", 25.0, 1, methods=["BYOT"], lr=0.2)
    drawn = []
    monkeypatch.setattr(plot, "draw_lines", lambda _, name, groups: drawn.append((name, len(groups))))

    def num_drawn(*words) -> int:
        assert plot.main([str(root), "--out", str(root / "figures"), *words]) == 0
        return dict(drawn)["early_exit"]

    assert num_drawn() == 2
    assert num_drawn("--only", "BYOT", "BYOT, lr 0.2") == 3
    for seed in (1, 2):
        shutil.rmtree(root / f"byot{seed}")
    assert num_drawn() == 2  # the baseline, and the other's curve in place of none


def test_legend_fits_into_the_figure(root):
    for i in range(7):
        make_run(root, f"long{i}", 25.0, 1, methods=["BYOT"], lr=0.2 + i, weight_decay=0.001 * i)
    figure = draw(root, "early_exit")
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_a_notebooks_backend_is_not_used():
    code = "import figures\nwith figures.drawing() as Figure: Figure().canvas.draw()"
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment["PYTHONPATH"] = f"{plot.ROOT}{os.pathsep}{plot.ROOT / 'scripts'}"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_the_method_s_picture_is_an_svg_that_readme_shows():
    name = "scripts/results/method.svg"
    assert xml.etree.ElementTree.parse(plot.ROOT / name).getroot().tag.endswith("svg")
    assert f"({name})" in (plot.ROOT / "README.md").read_text()
