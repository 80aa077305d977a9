"""One record per epoch -> the console, experiment.log and TensorBoard; a progress bar on a terminal."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.errors import tell
from utils.exports import report
from utils.records import SHOWN, EpochRecord, RunRecord, shown_metrics, to_json
from utils.run_directory import LOG


class Logger:
    """Reports a run of `num_epochs` epochs into its directory; with `directory` None (other ranks), does nothing."""

    def __init__(self, directory: Path | None, num_epochs: int):
        self.silent = directory is None
        self.num_epochs = num_epochs
        if self.silent:
            return
        self._log = open(directory / LOG, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115
        # An OSError of TensorBoard's own thread is raised again by the next call: no traceback of the thread as well.
        print_traceback = threading.__excepthook__
        threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else print_traceback(args)
        # TensorBoard names a run by its folder: the run's name, wherever it is started.
        self._board = SummaryWriter(str(directory / "tensorboard" / directory.name))

    def info(self, text: str) -> None:
        """Print text and append it to experiment.log."""
        if self.silent:
            return
        self._log.write(f"{text}\n")
        tell(text)

    def bar(self, loader, meter) -> Iterator:
        """The loader's batches, on a terminal with a progress bar: a `progress` argument for train_one_epoch."""
        disable = True if self.silent else None  # None: unless standard error is a terminal
        text = f"epoch {loader.epoch + 1}/{self.num_epochs}"
        with tqdm(total=loader.num_samples, desc=text, unit="img", leave=False, mininterval=1, disable=disable) as bar:
            for batch in loader:
                yield batch
                if bar.update(meter.num_images - bar.n):  # drawn, once per second
                    means = meter.means(estimated=True)  # waits for the device
                    bar.set_postfix_str(f"loss {means['loss']:.3f}, top-1 err {means['top1_error']:.1f} %")

    def start(self, headline: str, notes: list[str], history: list[EpochRecord]) -> None:
        """Before the first epoch of this command: what is trained, warnings, and the records of earlier epochs."""
        if self.silent:
            return
        self.info(headline)
        for note in notes:
            self.info(f"note: {note}")
        for record in history:
            self._write(record.epoch, scalars(record))

    def epoch(self, record: EpochRecord) -> None:
        """After an epoch: its line of metrics.jsonl to TensorBoard, and a summary with the time left to the console."""
        self._write(record.epoch, scalars(record))
        done = record.epoch + 1
        parts = [f"{name} {value:.4f}" for name, value in record.train.items() if name not in ("loss", "top1_error")]
        loss = f"loss {record.train['loss']:.4f} = {' + '.join(parts)}"
        seconds = record.seconds + record.seconds_validation + record.seconds_saving
        left = timedelta(seconds=int((self.num_epochs - done) * seconds))
        metrics = [f"{m.heading} {record.val['final'][name]:.{m.decimals}f}" for name, m in SHOWN.items()]
        self.info(
            f"epoch {done}/{self.num_epochs}  lr {record.lr:.4g}  {loss}"
            f"  top-1 err {record.train['top1_error']:.2f}  | val {'  '.join(metrics)}"
            f"  | {record.images_per_second:.0f} img/s, {left} left"
        )
        if record.skipped_steps:
            self.info(f"note: steps skipped because scaled gradients overflowed (fp16): {record.skipped_steps}")

    def finish(self, run: RunRecord) -> None:
        """After the last epoch: the test split's metrics, and the table of the results."""
        test = run.test["last"].metrics if run.test else None
        if test:
            values = {f"test/{name}": value for name, value in shown_metrics(test["final"]).items()}
            self._write(run.history[-1].epoch, values)
        self.info(report(run))

    def close(self) -> None:
        self._board.close()
        self._log.close()

    def _write(self, epoch: int, values: dict[str, float]) -> None:
        """Scalars to TensorBoard, whose epochs count from 1. Raises OSError naming its directory."""
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, epoch + 1)
            self._board.flush()
        except OSError as error:  # its own file name would be in bytes
            raise OSError(error.errno, error.strerror, self._board.log_dir) from None


def scalars(record: EpochRecord) -> dict[str, float]:
    """A line of metrics.jsonl by TensorBoard's names: `train/…`, `exit 1/…`, `final/…`, `ensemble/…`, `run/…`."""
    values = {f"run/{name}": value for name, value in to_json(record).items() if isinstance(value, (int, float))}
    for group, metrics in {"train": record.train, **record.val}.items():
        for name, value in shown_metrics(metrics).items():
            values[f"{group}/{name}"] = value
    return values
