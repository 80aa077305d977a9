"""scripts/plot.py: five figures of fabricated runs, the numbers that their lines and points stand at, its errors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.metrics import classification_metrics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import plot
import summarize

NAMES = ("reliability", "risk_coverage", "learning_curves", "exits", "error_time")


def metrics(top1):
    return {"top1_error": top1, "top5_error": 4.0, "nll": top1 / 20, "ece": 4.0, "aurc": 50.0, "eaurc": 20.0}


def predictions(seed):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (60,), generator=random)
    return torch.randn(60, 5, generator=random) + 2 * torch.eye(5)[labels], labels


def make_run(root, methods, seed, top1, predicted=True, status="finished", **flags):
    """Four epochs, in which the error falls by 10 each to `top1`; exits at 6 and 3 above with BYOT."""
    directory = root / "_".join([flags.get("classifier_type", "resnet18"), *methods, str(seed)])
    directory.mkdir(parents=True)
    config = {
        "classifier_type": "resnet18", "data_type": "cifar100", "num_resnet_blocks": 3, "end_epoch": 4, "seed": seed,
        "PSKD": False, "BYOT": False, "DML": False, "device_name": "GPU", "git_commit": "0" * 40, "torch": "2",
    }  # fmt: skip
    config |= dict.fromkeys(methods, True) | flags
    exits = [metrics(top1 + 6), metrics(top1 + 3)] if "BYOT" in methods else []
    ensemble = metrics(top1 - 1) if exits else None
    lines = [{"epoch": t, "val": metrics(top1 + 30 - 10 * t), "exits": exits, "ensemble": ensemble} for t in range(4)]
    results = {"status": status, "epochs": 4, "seconds_per_epoch": 5.0 + seed, "last": lines[-1], "best": lines[-1]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if predicted:
        logits, labels = predictions(seed)
        np.savez(directory / "predictions.npz", logits=logits.numpy(), labels=labels.numpy())
    return directory


@pytest.fixture
def groups(tmp_path):
    """groups() -> the groups of all runs in tmp_path/runs, as plot.py names them."""
    yield lambda: plot.name_groups(summarize.group_runs(summarize.find_runs([tmp_path / "runs"]), "last")[0])
    plot.plt.close("all")


def lines_of(axis):
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


def test_five_figures_in_two_formats_and_what_is_missing(tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path / "runs", ["PSKD"], seed, 20.0 + seed)
    make_run(tmp_path / "runs", ["BYOT"], 1, 21.0, predicted=False)
    (make_run(tmp_path / "runs", ["DML"], 1, 21.0) / "predictions.npz").write_bytes(b"PK\x03\x04 cut")
    make_run(tmp_path / "runs", [], 1, 21.0, status="running")
    out = tmp_path / "a" / "figures"
    assert plot.main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {f"{name}.{kind}" for name in NAMES for kind in ("png", "pdf")}
    printed = capsys.readouterr().out.splitlines()
    assert any("left out" in line and "running, 4 of 4 epochs" in line for line in printed)
    (lacking,) = [line for line in printed if "predictions.npz" in line]
    assert lacking.endswith(": resnet18_BYOT_1, resnet18_DML_1")
    for name in NAMES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        pdf = (out / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, embedded


def test_without_any_predictions_three_figures_are_left(tmp_path):
    make_run(tmp_path / "runs", ["PSKD"], 1, 20.0, predicted=False)
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path), "--format", "png"]) == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == set(NAMES[2:])


def test_calibration_and_risk_are_the_metrics(tmp_path, groups):
    for seed in (1, 2):
        make_run(tmp_path / "runs", ["PSKD"], seed, 20.0)
    scores = [classification_metrics(*predictions(seed)) for seed in (1, 2)]
    figure = plot.plot_reliability(groups())
    eces = [score["ece"] for score in scores]
    assert figure.axes[0].get_title() == f"PSKD\nECE {np.mean(eces):.2f} ± {np.std(eces, ddof=1):.2f} %, 2 seeds"
    shares = [bar.get_height() for bar in figure.axes[1].patches]
    assert sum(shares) == pytest.approx(100)

    axis = plot.plot_risk_coverage(groups()).axes[0]
    coverage, error = lines_of(axis)["PSKD"].get_data()
    assert coverage[-1] == 100 and error[-1] == pytest.approx(np.mean([score["top1_error"] for score in scores]))


def test_learning_curves_are_means_over_seeds_with_a_band(tmp_path, groups):
    make_run(tmp_path / "runs", ["PSKD"], 1, 20.0)
    make_run(tmp_path / "runs", ["PSKD"], 2, 22.0)
    make_run(tmp_path / "runs", [], 1, 30.0)
    error, nll = plot.plot_learning_curves(groups()).axes
    assert lines_of(error)["PSKD"].get_xdata().tolist() == [1, 2, 3, 4]
    assert lines_of(error)["PSKD"].get_ydata().tolist() == [51, 41, 31, 21]
    assert lines_of(nll)["baseline"].get_ydata() == pytest.approx([3, 2.5, 2, 1.5])
    (band,) = error.collections  # the baseline has one seed, so none
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(21 - 2**0.5) and heights.max() == pytest.approx(51 + 2**0.5)


def test_exits_stand_at_their_depth(tmp_path, groups):
    make_run(tmp_path / "runs", ["BYOT"], 1, 20.0)
    make_run(tmp_path / "runs", [], 1, 24.0)
    (axis,) = plot.plot_exits(groups()).axes
    ticks = dict(zip([label.get_text() for label in axis.get_xticklabels()], axis.get_xticks(), strict=True))
    assert list(ticks) == ["ensemble", "1/3", "2/3", "3/3"]
    byot, ensemble = [line for line in axis.get_lines() if line.get_color() == plot.COLOURS[1]]
    near = {"abs": 0.03}
    assert byot.get_xdata() == pytest.approx([ticks["1/3"], ticks["2/3"], ticks["3/3"]], **near)
    assert byot.get_ydata() == pytest.approx([74, 77, 80])
    assert (*ensemble.get_xdata(), *ensemble.get_ydata()) == pytest.approx((ticks["ensemble"], 81), **near)
    baseline = lines_of(axis)["baseline"]
    assert (*baseline.get_xdata(), *baseline.get_ydata()) == pytest.approx((ticks["3/3"], 76), **near)


def test_published_points_stand_beside_cifar100_alone(tmp_path, groups):
    for seed in (1, 2):
        make_run(tmp_path / "runs", ["PSKD"], seed, 20.0 + seed)
    make_run(tmp_path / "runs", ["PSKD"], 3, 50.0, data_type="synthetic")
    cifar, synthetic = plot.plot_error_time(groups()).axes
    assert cifar.get_title() == "resnet18\ndata_type cifar100"
    ours = lines_of(cifar)["PSKD"]
    assert (*ours.get_xdata(), *ours.get_ydata()) == (6.5, 21.5)
    hollow = [line for line in cifar.get_lines() if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    points = {(*line.get_xdata(), *line.get_ydata()) for line in hollow}
    assert len(points) == 8 and (27.0058, 19.94) in points  # Table 1's row 4
    assert len(synthetic.get_lines()) == 1


def test_a_label_has_one_look_and_no_two_labels_share_one(tmp_path, groups):
    for network in ("resnet18", "resnet50"):
        for methods in ([], ["PSKD"], ["PSKD", "BYOT", "DML"]):
            make_run(tmp_path / "runs", methods, 1, 20.0, classifier_type=network)
    named = groups()
    assert [group.label for group in named] == ["baseline", "PSKD", "PSKD+BYOT+DML"] * 2
    assert [group.panel for group in named] == ["resnet18"] * 3 + ["resnet50"] * 3
    assert all(a.look == b.look for a, b in zip(named[:3], named[3:], strict=True))
    for part in ("color", "linestyle", "marker"):
        assert len({str(group.look[part]) for group in named}) == 3


def test_options_name_a_group_and_settings_a_panel(tmp_path, groups):
    make_run(tmp_path / "a" / "runs", ["BYOT"], 1, 20.0)  # elsewhere
    make_run(tmp_path / "runs", ["BYOT"], 1, 20.0, BYOT_from_k_block=2)
    make_run(tmp_path / "runs", ["BYOT"], 2, 20.0, BYOT_from_k_block=1)
    make_run(tmp_path / "runs", ["PSKD"], 3, 20.0, lr=0.05)
    assert {(group.panel, group.label) for group in groups()} == {
        ("resnet18\nlr 0.1", "BYOT (BYOT_from_k_block 2)"),
        ("resnet18\nlr 0.1", "BYOT (BYOT_from_k_block 1)"),
        ("resnet18\nlr 0.05", "PSKD"),
    }


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        plot.main([str(tmp_path / "nowhere")])
    assert error.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith("nowhere: no such directory")
    (tmp_path / "empty").mkdir()
    assert plot.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: no finished run in {tmp_path / 'empty'}\n"
    directory = make_run(tmp_path / "runs", ["PSKD"], 1, 20.0, predicted=False)
    (directory / "metrics.jsonl").write_text('{"epoch": 0,')
    with pytest.raises(SystemExit, match=r"error: .*metrics\.jsonl cannot be read"):
        plot.main([str(directory), "--out", str(tmp_path / "out")])
