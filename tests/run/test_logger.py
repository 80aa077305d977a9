"""utils/logger.py and utils/figures.py: event files, experiment.log, progress bar, results table, figures."""

import io
import shutil
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from utils import figures
from utils.logger import Logger
from utils.metrics import METRICS
from utils.records import results_table

FLAGS = {"lr": 0.1, "a_method": True, "lr_decay_schedule": [5, 7], "limit_val": None}
LABELS = torch.arange(6) % 3
LOGITS = torch.tensor([[5.0, 0, 0], [4, 0, 0], [0, 1, 2], [0, 3, 0], [0, 9, 0], [1, 0, 2]])  # rows 1 and 3 are wrong


CHOSEN = {"threshold": 0.7, "accuracy": 75.5, "multiply_adds": 130}
TEST = record(2, 25.0) | {"early_exit": {"backbone_multiply_adds": 200, "chosen": CHOSEN}}
TEST["calibrated"] = {"val": {"ece": 1.25, "nll": 0.4}, "exits": [None, {"ece": 1.5, "nll": 1.0}]}
RESULTS = {"last": record(2, 20.0), "best": record(1, 18.0), "test": {"last": TEST}}


class FakeLoader:
    """Image i is of one colour, 10 i, and of class i mod 3."""

    batch_size, num_samples, epoch = 4, 6, 0
    class_names = ("$_$", "n" * 5000, "犬")  # not mathtext, long, in a script that the font lacks

    def __iter__(self):
        for index in torch.arange(6).split(4):
            yield self.pictures(index), LABELS[index], index

    def pictures(self, index):
        return (10 * index)[:, None, None, None].expand(-1, 3, 8, 8).byte()

    denormalise = staticmethod(lambda images: images)


def log_run(directory):
    """Log a run of three epochs, the first of which comes from a checkpoint; return its events."""
    log = Logger(directory, 3)
    log.start("run: resnet18", ["slow"], FLAGS, FakeLoader(), [record(0, 30.0)])
    log.epoch(record(1, 18.0))
    log.epoch(record(2, 20.0))
    log.finish(RESULTS, LOGITS, LABELS, FakeLoader())
    log.close()
    return EventAccumulator(str(directory / "tensorboard" / directory.name), {"scalars": 0, "images": 0}).Reload()


@pytest.mark.filterwarnings("error:Glyph")
def test_event_file_and_console(tmp_path, capsys):
    events = log_run(tmp_path)
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    top1 = {"final": [30, 18, 20], "exit 2": [35, 23, 25], "ensemble": [29, 17, 19], "train": [60, 60, 60]}
    for tag, values in {**{f"{k}/top1_error": v for k, v in top1.items()}, "train/hint": [0.25] * 3}.items():
        assert found[tag] == list(enumerate(values, start=1))
    assert found["test/top1_error"] == [(3, 25)] and found["run/images_per_second"] == [(t, 99) for t in (1, 2, 3)]
    assert not {"run/alpha_t", "exit 1/nll"} & found.keys()
    assert set(events.Tags()["images"]) == {"figures/training_images", "figures/predictions", "figures/mistakes"}
    out = capsys.readouterr().out
    assert (tmp_path / "experiment.log").read_text() == out
    assert out.startswith("run: resnet18\nnote: slow\n")
    assert [f"epoch {t}/3" in out for t in (1, 2, 3)] == [False, True, True] and "0:00:03 left" in out
    hparams = {name: HParamsPluginData.FromString(c) for name, c in events.PluginTagToContent("hparams").items()}
    flags = hparams["_hparams_/session_start_info"].session_start_info.hparams
    shown = {name: value.string_value or value.number_value for name, value in flags.items()}
    assert shown == {"lr": 0.1, "a_method": "True", "lr_decay_schedule": "[5, 7]", "limit_val": "None"}
    columns = {column.name.tag for column in hparams["_hparams_/experiment"].experiment.metric_infos}
    assert {"final/nll", "ensemble/top1_error", "test/top1_error"} <= columns <= found.keys()


def test_console_tables_and_tensorboard_show_the_six_metrics_only(tmp_path, capsys):
    scalars = log_run(tmp_path).Tags()["scalars"]
    out = capsys.readouterr().out
    for name, metric in METRICS.items():
        assert (f"  {metric.heading} " in out) == metric.shown
        for group in ("final", "exit 2", "ensemble", "test"):
            assert (f"{group}/{name}" in scalars) == metric.shown


def test_without_matplotlib_no_figures_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not log_run(tmp_path).Tags()["images"]
    assert capsys.readouterr().out.count("scripts/requirements.txt") == 1


def test_lost_tensorboard_folder_is_one_error_that_names_it(tmp_path, monkeypatch):
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    log = Logger(tmp_path, 3)
    shutil.rmtree(tmp_path / "tensorboard")
    lost = tmp_path / "tensorboard" / tmp_path.name / "x"
    thread = threading.Thread(target=lost.touch)  # as TensorBoard's own, which is slower
    thread.start()
    thread.join()
    with pytest.raises(OSError) as error:
        log.epoch(record(0, 30.0))
    assert error.value.filename == str(tmp_path / "tensorboard" / tmp_path.name) and not tracebacks


def test_closed_stdout_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "write", mock.Mock(side_effect=BrokenPipeError))
    Logger(tmp_path, 3).info("text")
    assert (tmp_path / "experiment.log").read_text() == "text\n"


@pytest.mark.parametrize(("directory", "terminal"), [("run", True), ("run", False), (None, True)])
def test_bar_on_the_main_process_terminal_only(tmp_path, monkeypatch, directory, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", iter(range(0, 1000, 2)).__next__)  # every look at the clock is 2 s later
    log = Logger(directory and tmp_path, 3)
    meter = SimpleNamespace(num_images=0, local_means=lambda: {"loss": 1.25, "top1_error": float(meter.num_images)})
    for _, labels, _ in log.bar(FakeLoader(), meter):
        meter.num_images += len(labels)
    assert ("top-1 err 4.0 %" in stream.getvalue()) == bool(stream.getvalue()) == bool(directory and terminal)


def test_image_sheets_pair_images_and_names():
    ((_, training),) = figures.training_images(FakeLoader())
    _, (_, mistakes) = figures.predictions(LOGITS, LABELS, FakeLoader())
    first, second = (
        [(a.images[0].get_array()[0, 0, 0], *a.get_title().split("\n")) for a in f.axes] for f in (training, mistakes)
    )
    names = [name[:24] for name in FakeLoader.class_names]
    assert first == [(10 * i, names[i % 3]) for i in range(4)]
    # The most confident first: row 1 with a logit of 4, then row 3 with 3.
    probability = LOGITS.softmax(dim=1)
    assert second[0] == (10, names[1], names[0], f"{100 * probability[1, 0]:.1f} %")
    assert second[1:] == [(30, names[0], names[1], f"{100 * probability[3, 1]:.1f} %")]


def test_reliability_diagram_shows_means_over_runs_of_the_bins_that_all_have():
    first, second = ([0.95, 0.95, 0.55, 0.55], [1, 0, 0, 0]), ([0.91, 0.91, 0.51, 0.05], [0, 0, 1, 1])
    runs = [tuple(torch.tensor(values, dtype=torch.float64) for values in run) for run in (first, second)]
    with figures.drawing() as Figure:
        axis = Figure().subplots()
        figures.reliability_diagram(axis, runs, color="black")
    points = axis.collections[1]
    assert points.get_offsets().tolist() == [pytest.approx([53, 50]), pytest.approx([93, 75])]
    assert points.get_sizes()[0] / points.get_sizes()[1] == pytest.approx(3 / 4)  # 1.5 and 2 of 4 images


def test_results_table():
    lines = results_table(RESULTS).splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["last", "last", "last", "best"]
    rows = [line.split() for line in lines]
    assert rows[3] == ["exit", "2", "25.00", "4.00", "0.5000", "3.00", "50.00", "20.00"]
    assert [row[:2] for row in rows[4:6]] == [["final", "20.00"], ["ensemble", "19.00"]]
    assert [row[-6] for row in rows[7:10]] == ["30.00", "25.00", "24.00"]  # on the test split
    assert rows[12] == ["final", "-", "-", "0.4000", "1.25", "-", "-"]
    assert all(number in lines[13] for number in ("0.70", "24.50 %", " 65 %"))  # threshold, error, multiply-adds
    same = {"last": record(2, 18.0), "best": record(2, 18.0)}
    assert results_table(same).count("final") == results_table({"last": record(2, 18.0)}).count("final") == 1
