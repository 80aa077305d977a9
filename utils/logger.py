"""One record per epoch -> the console, experiment.log and TensorBoard; a progress bar on a terminal."""

import contextlib
import importlib.util
import sys
import threading
from datetime import timedelta
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from utils import figures
from utils.flags import RUNTIME_FLAGS
from utils.metrics import METRICS


class Logger:
    """Reports a run of `num_epochs` epochs into its directory; with `directory` None (other ranks), does nothing."""

    def __init__(self, directory: Path | None, num_epochs: int):
        self.silent = directory is None
        self.num_epochs = num_epochs
        if self.silent:
            return
        self._log = open(directory / "experiment.log", "a", encoding="utf-8", errors="replace")  # noqa: SIM115
        # An OSError of TensorBoard's own thread is raised again by the next call: no traceback of the thread as well.
        threading.excepthook = lambda args: issubclass(args.exc_type, OSError) or threading.__excepthook__(args)
        self._board = SummaryWriter(str(directory / "tensorboard"))
        self._draws = importlib.util.find_spec("matplotlib") is not None

    def say(self, text: str) -> None:
        """Print a line and append it to experiment.log."""
        if self.silent:
            return
        for out in (sys.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):  # a closed pager must not stop the run
                out.write(text + "\n")  # in one write: several runs may share a terminal or pipe
                out.flush()

    def bar(self, epoch: int):
        """A `progress` argument for train_one_epoch: a bar on a terminal, nothing elsewhere."""

        def progress(loader, meter):
            options = {"desc": f"epoch {epoch + 1}/{self.num_epochs}", "unit": "img", "leave": False}
            options["disable"] = True if self.silent else None  # None: unless standard error is a terminal
            with tqdm(total=loader.num_samples, mininterval=1, dynamic_ncols=True, **options) as bar:
                for batch in loader:
                    yield batch
                    if bar.update(min(loader.batch_size, loader.num_samples - bar.n)):  # drawn, once per second
                        means = meter.own_means(bar.n)  # waits for the device
                        bar.set_postfix_str(f"loss {means['loss']:.3f}, top-1 err {means['top1_error']:.1f} %")

        return progress

    def start(self, flags: dict, loader) -> None:
        """Before the first epoch: the command line's flags, and images of the training loader's current epoch."""
        if self.silent:
            return
        if not self._draws:
            self.say("note: no pictures in TensorBoard without matplotlib (pip install -r scripts/requirements.txt)")
        self._write(loader.epoch, {}, figures.training_images(loader), hyper_parameters(flags)[:2])

    def epoch(self, record: dict, is_new: bool = True) -> None:
        """A line of metrics.jsonl to TensorBoard and, if this command ran the epoch, to the console."""
        if self.silent:
            return
        self._write(record["epoch"], scalars(record))
        if not is_new:
            return
        done = record["epoch"] + 1
        seconds = sum(value for name, value in record.items() if name.startswith("seconds"))
        metrics = (f"{m.heading} {record['val'][name]:.{m.decimals}f}" for name, m in METRICS.items())
        self.say(
            f"epoch {done}/{self.num_epochs}  lr {record['lr']:.4g}  loss {record['train']['loss']:.4f}"
            f"  top-1 err {record['train']['top1_error']:.2f}  | val {'  '.join(metrics)}"
            f"  | {record['images_per_second']:.0f} img/s,"
            f" {timedelta(seconds=int((self.num_epochs - done) * seconds))} left"
        )

    def finish(self, flags: dict, results: dict, logits: Tensor, labels: Tensor, loader) -> None:
        """After the last epoch: figures, the test split's metrics, and the table of results.json's content.

        logits (M, K), labels (M,): the last epoch's predictions of the validation loader's images.
        """
        if self.silent:
            return
        test = results.get("test", {}).get("last", {})
        values = {f"test/{name}": value for name, value in test.get("val", {}).items()}
        pictures = figures.predictions(logits.cpu(), labels.cpu(), loader)
        self._write(results["last"]["epoch"], values, pictures, hyper_parameters(flags)[2:])
        for line in results_table(results):
            self.say(line)

    def close(self) -> None:
        if not self.silent:
            self._board.close()
            self._log.close()

    def _write(self, epoch: int, values: dict[str, float], pictures=(), summaries=()) -> None:
        """To TensorBoard: scalars, (name, figure) pairs, protocol buffers. Raises OSError naming its directory."""
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, epoch)
            for name, figure in pictures if self._draws else ():
                self._board.add_figure(f"figures/{name}", figure, epoch)
            for summary in summaries:
                self._board.file_writer.add_summary(summary)
            self._board.flush()
        except OSError as error:  # its own file name would be in bytes
            raise OSError(error.errno, error.strerror, self._board.log_dir) from None


def scalars(record: dict) -> dict[str, float]:
    """A line of metrics.jsonl by TensorBoard's names: `train/…`, `val/…`, `exits/1/…`, `ensemble/…`, `run/…`."""
    groups = {"run": {name: value for name, value in record.items() if isinstance(value, (int, float))}}
    groups |= {name: record[name] for name in ("train", "val", "ensemble")}
    groups |= {f"exits/{i}": metrics for i, metrics in enumerate(record["exits"], start=1)}
    return {f"{group}/{name}": value for group, entries in groups.items() for name, value in (entries or {}).items()}


def hyper_parameters(flags: dict) -> tuple:
    """The HParams tab's three summaries: its columns, this run's flags, and that the run is finished.

    They go into the run's own event file, where SummaryWriter.add_hparams would start a second run. The tab takes its
    columns from one of its runs, so every run names all of them.
    """
    flags = {name: value for name, value in flags.items() if name not in RUNTIME_FLAGS}
    flags = {name: value if type(value) in (int, float) else str(value) for name, value in flags.items()}
    columns = [*(f"val/{name}" for name in METRICS), "ensemble/top1_error", "test/top1_error", "run/seconds"]
    return hparams(flags, dict.fromkeys(columns))


def results_table(results: dict) -> list[str]:
    """Lines of text: each classifier's metrics in the last and the best epoch, and on the test split, if there is one,
    as they are, after temperature scaling, and with early exit."""

    def row(label: str, cells) -> str:
        return f"  {label:12}" + "".join(f"{cell:>11}" for cell in cells)

    lines = [row("", (m.heading for m in METRICS.values())), row("", (m.unit for m in METRICS.values()))]

    def add(title: str, record: dict) -> None:
        lines.append(title)
        classifiers = {f"exit {i}": metrics for i, metrics in enumerate(record["exits"], start=1)}
        for label, metrics in (classifiers | {"final": record["val"], "ensemble": record.get("ensemble")}).items():
            if metrics:  # not of an exit whose classifier no loss trains
                cells = (f"{metrics[k]:.{m.decimals}f}" if k in metrics else "-" for k, m in METRICS.items())
                lines.append(row(label, cells))

    last_is_best = results.get("best") == results["last"]
    for name in ("last",) if last_is_best or "best" not in results else ("last", "best"):
        title = f"{'last and best' if last_is_best else name} epoch"
        add(f"{title} ({results[name]['epoch'] + 1})", results[name])
        if test := results.get("test", {}).get(name):
            add(f"{title}, test split", test)
            if test.get("calibrated"):
                add(f"{title}, test split, after temperature scaling", test["calibrated"])
            if early_exit := test.get("early_exit"):
                chosen = early_exit["chosen"]
                share = 100 * chosen["multiply_adds"] / early_exit["backbone_multiply_adds"]
                lines.append(
                    f"  early exit at confidence {chosen['threshold']:.2f}: top-1 err {100 - chosen['accuracy']:.2f} %"
                    f" with {share:.0f} % of the backbone's multiply-adds"
                )
    return lines
