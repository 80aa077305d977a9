"""utils/logger.py and utils/figures.py: what stands in the event files, on the console and on the pictures."""

import io
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from data.files import Split
from data.loader import Loader
from utils import figures, logger
from utils.logger import Logger, results_table
from utils.metrics import reliability, risk_coverage_curve

NAMES = ["cat", "dog", "owl"]
FLAGS = {
    "PSKD": True,
    "BYOT": False,
    "lr": 0.1,
    "lr_decay_schedule": [5, 7],
    "limit_val": None,
    "run_name": "a",
    "seed": 3,
}


def metrics(top1):
    return {"top1_error": top1, "top5_error": 4.0, "nll": 0.5, "ece": 3.0, "aurc": 50.0, "eaurc": 20.0}


def record(epoch, top1):
    return {
        "epoch": epoch, "lr": 0.1, "alpha_t": None, "seconds": 2.0 + epoch, "images_per_second": 100.0,
        "train": {"loss": 1.5, "ce": 1.0, "byot": 0.5, "top1_error": 60.0}, "val": metrics(top1),
        "exits": [None, metrics(top1 + 5)], "ensemble": metrics(top1 - 1),
    }  # fmt: skip


def loader(n=6, **training):
    """Image i is of one colour, 10 i, and of class i mod 3."""
    images = np.repeat(np.arange(n, dtype=np.uint8) * 10, 32 * 32 * 3).reshape(n, 32, 32, 3)
    split = Split(images, np.arange(n) % 3)
    return Loader(split, NAMES, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 32, torch.device("cpu"), **training)


def results(last, best):
    return {"last": record(*last), "best": record(*best), "seconds_per_epoch": 2.5}


def run(directory, history, resumed=0):
    """Three epochs at most, the first `resumed` of them from a checkpoint's history; the events."""
    directory.mkdir(exist_ok=True)
    log = Logger(directory, 3)
    for past in history[:resumed]:
        log.epoch(past)
    log.start(FLAGS, loader(augmentation="crop", batch_size=4))
    for new in history[resumed:]:
        log.epoch(new, 2.0)
    logits = torch.tensor([[5.0, 0, 0], [4, 0, 0], [0, 1, 2], [0, 3, 0], [0, 9, 0], [1, 0, 2]])
    log.finish(FLAGS, results((2, 20.0), (1, 18.0)), logits, torch.arange(6) % 3, loader())
    log.close()
    events = EventAccumulator(str(directory / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_every_number_of_a_record_is_a_scalar_once_a_step(tmp_path, capsys):
    events = run(tmp_path / "run", [record(0, 30.0), record(1, 18.0), record(2, 20.0)], resumed=2)
    six = list(metrics(0))
    expected = {f"{group}/{name}" for group in ("val", "exits/2", "ensemble") for name in six}
    expected |= {f"train/{name}" for name in ("loss", "ce", "byot", "top1_error")} | {"val/best_top1_error"}
    expected |= {f"run/{name}" for name in ("lr", "images_per_second", "seconds", "median_seconds")}
    assert set(events.Tags()["scalars"]) == expected
    for tag in expected:
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2]
    assert [event.value for event in events.Scalars("val/top1_error")] == [30, 18, 20]
    assert [event.value for event in events.Scalars("val/best_top1_error")] == [30, 18, 18]
    assert [event.value for event in events.Scalars("exits/2/top1_error")] == [35, 23, 25]
    assert [event.value for event in events.Scalars("run/median_seconds")] == [2, 2.5, 3]
    out = capsys.readouterr().out
    assert "epoch 3/3" in out and "epoch 2/3" not in out  # the past is not told again
    assert (tmp_path / "run" / "experiment.log").read_text() == out


def test_pictures_and_hparams_are_in_the_run_itself(tmp_path):
    events = run(tmp_path / "run", [record(0, 30.0)])
    pictures = ("training_images", "reliability", "risk_coverage", "most_confident_mistakes")
    assert set(events.Tags()["images"]) == {f"figures/{name}" for name in pictures}
    for name in pictures:
        (event,) = events.Images(f"figures/{name}")
        assert event.width > 300 and event.encoded_image_string.startswith(b"\x89PNG")
    assert [path.is_file() for path in (tmp_path / "run" / "tensorboard").iterdir()] == [True]

    parts = events.PluginTagToContent("hparams")
    experiment, start, end = (
        HParamsPluginData.FromString(parts[f"_hparams_/{name}"])
        for name in ("experiment", "session_start_info", "session_end_info")
    )
    flags = {key: value.string_value or value.number_value for key, value in start.session_start_info.hparams.items()}
    shown = {"PSKD": "on", "BYOT": "off", "lr": 0.1, "lr_decay_schedule": "5 7", "limit_val": "none", "seed": 3}
    assert flags == shown  # without run_name, which says where, not what
    columns = experiment.experiment
    assert {info.name for info in columns.hparam_infos} == set(shown)
    assert {info.name for info in columns.hparam_infos if info.differs} == {"PSKD", "BYOT", "seed"}
    scores = {info.name.tag for info in columns.metric_infos}
    assert {f"val/{name}" for name in metrics(0)} | {"val/best_top1_error", "run/median_seconds"} <= scores
    assert end.session_end_info.status == 1  # success


def test_a_running_run_has_flags_and_no_end(tmp_path):
    log = Logger(tmp_path, 3)
    log.start(FLAGS, loader(augmentation="crop", batch_size=4))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.PluginTagToContent("hparams")) == {"_hparams_/experiment", "_hparams_/session_start_info"}


def test_sheets_show_the_right_images_under_the_right_names(tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(figures, "sheet", lambda *args: sheets.append(args) or np.zeros((9, 9, 3), np.uint8))
    run(tmp_path, [record(0, 30.0)])
    (images, captions, title), (mistaken, reasons, _) = sheets

    plan = loader(augmentation="crop", batch_size=6)
    _, labels, index = next(iter(plan))
    assert captions == [[NAMES[label]] for label in labels]
    assert images.max(axis=(1, 2, 3)).tolist() == (10 * index).tolist()  # crops of one colour on black
    assert "first 6" in title and "epoch 1" in title

    # Rows 1 and 3 are wrong, and 1, by a logit of 4 against one of 3, is the surer.
    assert [caption[:2] for caption in reasons] == [("dog", "cat"), ("cat", "dog")]
    assert reasons[0][2] == f"{100 * torch.tensor([4.0, 0, 0]).softmax(0)[0]:.1f} % sure"
    assert (mistaken == np.array([10, 30], np.uint8)[:, None, None, None]).all()


def test_without_a_mistake_there_is_no_sheet_of_them():
    labels = torch.arange(6) % 3
    assert set(logger.pictures(10 * torch.eye(3)[labels], labels, loader())) == {"reliability", "risk_coverage"}


def test_silent_on_other_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = Logger(None, 3)
    log.say("a")
    log.start(FLAGS, None)
    log.epoch(record(0, 30.0), 2.0)
    log.finish(FLAGS, results((0, 3.0), (0, 3.0)), None, None, None)
    assert list(log.bar(0)([1, 2], None)) == [1, 2]
    log.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, drawn", [(Terminal(), True), (io.StringIO(), False)])
def test_the_bar_is_for_terminals(tmp_path, monkeypatch, stream, drawn):
    log = Logger(tmp_path, 3)
    monkeypatch.setattr(sys, "stderr", stream)
    batches = loader(augmentation="crop", batch_size=4)
    assert len(list(log.bar(0)(batches, None))) == 2
    assert ("epoch 1/3" in stream.getvalue()) == drawn
    assert not stream.getvalue().rpartition("\r")[2].strip()  # and it is wiped away for the epoch's line


def test_a_line_is_one_write(tmp_path, monkeypatch):
    log = Logger(tmp_path, 3)
    written = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    log.say("epoch 1/3")
    assert written == ["epoch 1/3\n"]


def test_end_table():
    lines = results_table(results((2, 20.0), (1, 18.0)) | {"test": {"last": record(2, 25.0), "best": record(1, 24.0)}})
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles == [
        "last epoch (3)", "last epoch on the test split", "best epoch (2)", "best epoch on the test split",
    ]  # fmt: skip
    assert lines[0].split() == ["top-1", "err", "top-5", "err", "NLL", "ECE", "AURC", "E-AURC"]
    start = lines.index("last epoch (3)")
    assert lines[start + 1] == "  exit 1: no loss trains this classifier"
    rows = [line.split() for line in lines[start + 2 : start + 5]]
    assert rows == [
        ["exit", "2", "25.00", "4.00", "0.5000", "3.00", "50.00", "20.00"],
        ["final", "20.00", "4.00", "0.5000", "3.00", "50.00", "20.00"],
        ["ensemble", "19.00", "4.00", "0.5000", "3.00", "50.00", "20.00"],
    ]
    assert len({len(line) for line in lines if line.startswith("  ") and ":" not in line}) == 1  # columns are flush


def test_end_table_says_once_that_the_last_epoch_is_the_best():
    assert "last epoch, also the best (3)" in results_table(results((2, 18.0), (2, 18.0)))
    assert sum("final" in line for line in results_table(results((2, 18.0), (2, 18.0)))) == 1
    assert "last epoch (3)" in results_table({"last": record(2, 18.0)})


def colour(pixels, name):
    """(H, W) bool: where a picture has exactly this colour."""
    return (pixels == [int(name[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2)


def test_reliability_bars_are_as_high_as_the_accuracy():
    confidence = torch.tensor([0.95] * 4, dtype=torch.float64)
    heights = {}
    for errors in (0, 2):
        wrong = torch.tensor([1.0] * errors + [0.0] * (4 - errors), dtype=torch.float64)
        picture = figures.reliability_diagram(*(part.numpy() for part in reliability(confidence, wrong)))
        assert picture.dtype == np.uint8 and picture.shape == (figures.HEIGHT, figures.WIDTH, 3)
        blue = colour(picture, figures.BLUE)[60:]  # below the legend
        assert not blue[:, :480].any()  # the last bin only
        heights[errors] = blue.any(axis=1).sum()
    # The gap's thin line and the line of mean confidence hide a little.
    assert heights[2] == pytest.approx(heights[0] / 2, abs=8)


def test_risk_coverage_line_is_where_the_error_is():
    wrong = torch.tensor([1.0] * 50 + [0.0] * 50, dtype=torch.float64)  # the surer half is wrong, all of it
    curve = risk_coverage_curve(torch.linspace(1, 0, 100, dtype=torch.float64), wrong).numpy()
    picture = figures.risk_coverage(curve, risk_coverage_curve(-wrong, wrong).numpy())
    rows = np.flatnonzero(colour(picture, figures.BLUE)[60:].sum(axis=1) > 200) + 60
    top, bottom = 65, figures.HEIGHT - 55  # of the frame, whose scale ends 1.1 times above the largest error
    assert rows.mean() == pytest.approx(bottom - (bottom - top) / 1.1, abs=2)


def test_a_sheet_keeps_the_pixels_and_cuts_long_names():
    images = np.zeros((9, 3, 32, 32), np.uint8)
    images[:, 0] = 200  # red
    before = images.copy()
    picture = figures.sheet(images, [("a" * 100, "b")] * 9, "title")
    assert colour(picture, "#c80000").sum() == 9 * 96 * 96
    assert picture.shape[1] == 8 * 104 + 8 and (images == before).all()
    assert (figures.sheet(images[:1], [("a",)], "t") != picture[:1, :1]).any()  # one image is a sheet too


def test_ticks_are_round_and_few():
    assert figures.ticks(100, 6) == [0, 20, 40, 60, 80, 100]
    assert figures.ticks(23.1, 6) == [0, 5, 10, 15, 20]
    assert figures.ticks(0.3, 6) == [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
