"""utils/logger.py and utils/figures.py: event files, experiment.log, progress bar, results table, figures."""

import io
import shutil
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from utils import figures
from utils.logger import Logger, results_table
from utils.metrics import reliability

FLAGS = {"lr": 0.1, "a_method": True, "lr_decay_schedule": [5, 7], "limit_val": None, "workers": 8}
LABELS = torch.arange(6) % 3
LOGITS = torch.tensor([[5.0, 0, 0], [4, 0, 0], [0, 1, 2], [0, 3, 0], [0, 9, 0], [1, 0, 2]])  # rows 1 and 3 are wrong


def metrics(top1):
    return {"top1_error": top1, "top5_error": 4.0, "nll": 0.5, "ece": 3.0, "aurc": 50.0, "eaurc": 20.0}


def record(epoch, top1):
    return {
        "epoch": epoch, "lr": 0.1, "alpha_t": None, "seconds": 2.0, "seconds_validation": 0.5, "seconds_saving": 0.6,
        "images_per_second": 99.0, "train": {"loss": 1.5, "ce": 1.0, "hint": 0.5, "top1_error": 60.0},
        "val": metrics(top1), "exits": [None, metrics(top1 + 5)], "ensemble": metrics(top1 - 1),
    }  # fmt: skip


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


def log_run(directory, history, num_resumed=0):
    """Log a run of three epochs, the first `num_resumed` of which come from a checkpoint; return its events."""
    log = Logger(directory, 3)
    for i, line in enumerate(history):
        log.epoch(line, is_new=i >= num_resumed)
    log.start(FLAGS, FakeLoader())
    results = {"last": record(2, 20.0), "best": record(1, 18.0), "test": {"last": record(2, 25.0)}}
    log.finish(FLAGS, results, LOGITS, LABELS, FakeLoader())
    log.close()
    return EventAccumulator(str(directory / "tensorboard"), {"scalars": 0, "images": 0}).Reload()


@pytest.mark.filterwarnings("error:Glyph")
def test_event_file_equals_the_records_also_of_an_older_run(tmp_path, capsys):
    history = [record(0, 30.0), record(1, 18.0), record(2, 20.0)]
    del history[0]["seconds_saving"], history[0]["val"]["eaurc"]
    events = log_run(tmp_path, history, num_resumed=1)
    expected = {f"test/{name}": [(2, pytest.approx(value))] for name, value in metrics(25.0).items()}
    for line in history:
        groups = {"run": line, "exits/2": line["exits"][1]} | {
            name: line[name] for name in ("train", "val", "ensemble")
        }
        for tag, value in [(f"{group}/{name}", v) for group, values in groups.items() for name, v in values.items()]:
            if isinstance(value, (int, float)):
                expected.setdefault(tag, []).append((line["epoch"], pytest.approx(value)))
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == expected
    assert {f"figures/{name}" for name in ("training_images", "predictions", "mistakes")} == set(
        events.Tags()["images"]
    )
    out = capsys.readouterr().out
    assert (tmp_path / "experiment.log").read_text() == out
    assert [f"epoch {t}/3" in out for t in (1, 2, 3)] == [False, True, True] and "0:00:03 left" in out
    start = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    flags = HParamsPluginData.FromString(start).session_start_info.hparams
    shown = {name: value.string_value or value.number_value for name, value in flags.items()}
    assert shown == {"lr": 0.1, "a_method": "True", "lr_decay_schedule": "[5, 7]", "limit_val": "None"}


def test_without_matplotlib_no_figures_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not log_run(tmp_path, []).Tags()["images"]
    assert capsys.readouterr().out.count("scripts/requirements.txt") == 1


def test_lost_tensorboard_folder_is_one_error_that_names_it(tmp_path, monkeypatch):
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    log = Logger(tmp_path, 3)
    shutil.rmtree(tmp_path / "tensorboard")
    thread = threading.Thread(target=(tmp_path / "tensorboard" / "x").touch)  # as TensorBoard's own, which is slower
    thread.start()
    thread.join()
    with pytest.raises(OSError) as error:
        log.epoch(record(0, 30.0))
    assert error.value.filename == str(tmp_path / "tensorboard") and not tracebacks


def test_closed_stdout_stops_nothing(tmp_path, monkeypatch):
    def write(text):
        raise BrokenPipeError

    monkeypatch.setattr(sys.stdout, "write", write)
    Logger(tmp_path, 3).say("text")
    assert (tmp_path / "experiment.log").read_text() == "text\n"


@pytest.mark.parametrize(("directory", "terminal"), [("run", True), ("run", False), (None, True)])
def test_bar_on_the_main_process_terminal_only(tmp_path, monkeypatch, directory, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", iter(range(0, 1000, 2)).__next__)  # every look at the clock is 2 s later
    log = Logger(directory and tmp_path, 3)
    meter = SimpleNamespace(own_means=lambda num_images: {"loss": 1.25, "top1_error": float(num_images)})
    assert len(list(log.bar(0)(FakeLoader(), meter))) == 2
    assert ("top-1 err 4.0 %" in stream.getvalue()) == bool(stream.getvalue()) == bool(directory and terminal)


def test_image_sheets_pair_images_and_names():
    ((_, training),) = figures.training_images(FakeLoader())
    _, (_, mistakes) = figures.predictions(LOGITS, LABELS, FakeLoader())
    shown = [
        [(a.images[0].get_array()[0, 0, 0], *a.get_title().split("\n")) for a in f.axes] for f in (training, mistakes)
    ]
    names = [name[:24] for name in FakeLoader.class_names]
    assert shown[0] == [(10 * i, names[i % 3]) for i in range(4)]
    # The most confident first: row 1 with a logit of 4, then row 3 with 3.
    assert [row[:3] for row in shown[1]] == [(10, names[1], names[0]), (30, names[0], names[1])]
    assert shown[1][0][3] == f"{100 * LOGITS[1].softmax(dim=0)[0]:.1f} %"


def test_reliability_diagram_shows_accuracy_and_gap():
    confidence, wrong = torch.tensor([[0.95, 0.95, 0.55, 0.55], [1, 0, 0, 0]], dtype=torch.float64)
    with figures.drawing() as Figure:
        axis = Figure().subplots()
        figures.reliability_diagram(axis, torch.stack(reliability(confidence, wrong)).numpy())
    accuracy, gap = ([bar.get_height() for bar in bars] for bars in axis.containers)
    assert accuracy == pytest.approx([0] * 5 + [100] + [0] * 3 + [50])
    assert gap == pytest.approx([0] * 5 + [-45] + [0] * 3 + [45])


def test_results_table():
    early_exit = {"backbone_multiply_adds": 200, "chosen": {"threshold": 0.7, "accuracy": 75.5, "multiply_adds": 130}}
    calibrated = {"val": {"ece": 1.25, "nll": 0.4}, "exits": [None, {"ece": 1.5, "nll": 1.0}]}
    test = record(2, 25.0) | {"calibrated": calibrated, "early_exit": early_exit}
    lines = results_table({"last": record(2, 20.0), "best": record(1, 18.0), "test": {"last": test}})
    assert [line.split()[0] for line in lines if line[0] != " "] == ["last", "last", "last", "best"]
    rows = [line.split() for line in lines]
    assert rows[3] == ["exit", "2", "25.00", "4.00", "0.5000", "3.00", "50.00", "20.00"]
    assert [row[:2] for row in rows[4:6]] == [["final", "20.00"], ["ensemble", "19.00"]]
    assert rows[12] == ["final", "-", "-", "0.4000", "1.25", "-", "-"]
    assert all(number in lines[13] for number in ("0.70", "24.50 %", " 65 %"))  # threshold, error, multiply-adds
    same = {"last": record(2, 18.0), "best": record(2, 18.0)}
    assert sum("final" in line for line in results_table(same)) == 1
