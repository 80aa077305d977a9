"""utils/logger.py: event files, experiment.log, progress bar; the table of results."""

import io
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import records
from utils.exports import report
from utils.logger import Logger
from utils.records import METRICS, EpochRecord, RunRecord, from_json

EARLY_EXIT = {"backbone_multiply_adds": 200}
EARLY_EXIT["chosen"] = {"threshold": 0.7, "heldout_accuracy": 71.5, "heldout_multiply_adds": 120}
TESTED = {"accuracy": 75.5, "multiply_adds": 130}


def run_record(num_epochs: int = 3) -> RunRecord:
    """Of errors 30, 18 and 20 %; the second epoch is the best, the last was tested."""
    history = [from_json(EpochRecord, record(i, top1)) for i, top1 in enumerate([30.0, 18.0, 20.0])]
    last = records.TestRecord(2, {"final": 2.0}, record(2, 25.0)["val"], {"final": {"ece": 1.25, "nll": 0.4}})
    last.early_exit = {**EARLY_EXIT, "chosen": EARLY_EXIT["chosen"] | TESTED}
    return RunRecord({}, None, history=history[:num_epochs], test={"last": last})


class FakeLoader:
    """Two batches, of four and of two images."""

    num_samples, epoch = 6, 0

    def __iter__(self):
        return iter(torch.arange(6).split(4))


def log_run(directory: Path) -> EventAccumulator:
    """Log a run of three epochs, the first of which comes from a checkpoint; return its events."""
    log = Logger(directory, 3)
    run = run_record()
    log.start("run: resnet18", ["slow"], run.history[:1])
    for epoch in run.history[1:]:
        log.epoch(epoch)
    log.finish(run)
    log.close()
    events = EventAccumulator(str(directory / "tensorboard" / directory.name), {"scalars": 0})
    return events.Reload()


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> SimpleNamespace:
    """The events of a run, what it printed, and its experiment.log."""
    directory = tmp_path_factory.mktemp("logged")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        events = log_run(directory)
    return SimpleNamespace(events=events, out=out.getvalue(), log=(directory / "experiment.log").read_text())


def curve(logged, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar."""
    return [(event.step, event.value) for event in logged.events.Scalars(tag)]


CURVES = {  # of epochs 1 to 3
    "final/top1_error": [30, 18, 20],
    "exit 2/top1_error": [35, 23, 25],
    "ensemble/top1_error": [29, 17, 19],
    "train/top1_error": [60, 60, 60],
    "train/hint": [0.25, 0.25, 0.25],
    "run/images_per_second": [99, 99, 99],
}


@pytest.mark.parametrize("tag", CURVES)
def test_scalars_of_all_epochs_count_from_1(logged, tag):
    assert curve(logged, tag) == list(enumerate(CURVES[tag], start=1))


def test_metrics_of_the_test_split_are_scalars_of_the_last_epoch(logged):
    assert curve(logged, "test/top1_error") == [(3, 25)]


@pytest.mark.parametrize("tag", ["run/alpha_t", "exit 1/nll"])
def test_what_a_run_does_not_have_is_no_scalar(logged, tag):
    assert tag not in logged.events.Tags()["scalars"]


def test_log_file_holds_what_was_printed(logged):
    assert logged.log == logged.out


def test_headline_and_notes_are_printed_first(logged):
    assert logged.out.startswith("run: resnet18\nnote: slow\n")


def test_a_line_is_printed_for_each_epoch_that_was_trained(logged):
    printed = [f"epoch {number}/3" in logged.out for number in (1, 2, 3)]
    assert printed == [False, True, True]


def test_time_left_is_printed(logged):
    assert "0:00:03 left" in logged.out


@pytest.mark.parametrize("name", METRICS)
def test_console_and_tensorboard_show_the_six_metrics_only(logged, name):
    metric = METRICS[name]
    assert (f"  {metric.heading} " in logged.out) == metric.shown
    for classifier in ("final", "exit 2", "ensemble", "test"):
        assert (f"{classifier}/{name}" in logged.events.Tags()["scalars"]) == metric.shown


def test_lost_tensorboard_folder_is_one_error_that_names_it(tmp_path):
    log = Logger(tmp_path, 3)
    shutil.rmtree(tmp_path / "tensorboard")
    lost = tmp_path / "tensorboard" / tmp_path.name
    with pytest.raises(OSError) as error:
        log.epoch(run_record().history[0])
    assert error.value.filename == str(lost)


def test_error_of_tensorboards_own_thread_prints_no_traceback(tmp_path, monkeypatch):
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    monkeypatch.setattr(threading, "__excepthook__", tracebacks.append)
    Logger(tmp_path, 3)
    lost = tmp_path / "lost" / "events"
    thread = threading.Thread(target=lost.touch)
    thread.start()
    thread.join()
    assert not tracebacks


def draw_bar(directory: Path | None, is_terminal: bool, monkeypatch) -> str:
    """What two batches write to standard error."""
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("tqdm.std.time", clock.__next__)  # every look at the clock is 2 s later
    meter = SimpleNamespace(num_images=0)
    meter.means = lambda estimated: {"loss": 1.25, "top1_error": float(meter.num_images)}
    for batch in Logger(directory, 3).bar(FakeLoader(), meter):
        meter.num_images += len(batch)
    return stream.getvalue()


def test_bar_shows_the_error_so_far(tmp_path, monkeypatch):
    assert "top-1 err 4.0 %" in draw_bar(tmp_path, True, monkeypatch)


def test_no_bar_without_a_terminal(tmp_path, monkeypatch):
    assert draw_bar(tmp_path, False, monkeypatch) == ""


def test_no_bar_in_other_processes(monkeypatch):
    assert draw_bar(None, True, monkeypatch) == ""


def rows_of(run: RunRecord) -> list[list[str]]:
    """Of the report, line by line: the words, without the headings and units."""
    return [line.split() for line in report(run).splitlines()][2:]


def test_report_has_blocks_of_last_test_and_best_and_a_row_for_each_classifier():
    rows = rows_of(run_record())
    firsts = " ".join(row[0] for row in rows)
    assert firsts == "last exit final ensemble last exit final ensemble last final best exit final ensemble last"
    assert rows[1] == ["exit", "2", "25.00", "4.00", "0.5000", "3.00", "50.00", "20.00"]
    assert [row[-6] for row in (*rows[2:4], *rows[5:8], rows[12])] == [
        "20.00",
        "19.00",
        "30.00",
        "25.00",
        "24.00",
        "18.00",
    ]
    assert rows[9] == ["final", "-", "-", "0.4000", "1.25", "-", "-"]


@pytest.mark.parametrize("has_test_split, error, share", [(True, "24.50", "65"), (False, "28.50", "60")])
def test_report_has_threshold_error_and_cost_of_early_exit(has_test_split, error, share):
    run = run_record()
    if not has_test_split:
        run.test["last"] = records.TestRecord(2, {"final": 2.0}, early_exit=EARLY_EXIT)
    words = rows_of(run)[-1]
    assert words[:3] == ["last", "epoch", "(3):"]
    assert {"0.70,", error, share} <= set(words)


def test_report_has_one_block_for_one_epoch():
    run = run_record(num_epochs=2)
    run.test = None
    assert [row[0] for row in rows_of(run)] == ["last", "exit", "final", "ensemble"]


def test_wide_numbers_stay_apart_in_the_table():
    values = {"top1_error": 99.0, "top5_error": 94.0, "nll": 411032.429}
    *_, line = records.results_table({"last": {"final": values}}).splitlines()
    assert line.split()[1:4] == ["99.00", "94.00", "411032.4290"]
