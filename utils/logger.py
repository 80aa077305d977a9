"""One record an epoch -> a line on the console and in experiment.log, a bar while it runs, TensorBoard."""

import contextlib
import statistics
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from utils import figures
from utils.flags import RUNTIME_FLAGS as NOT_DEFINING
from utils.metrics import METRICS, confidence_and_wrong, reliability, risk_coverage_curve

BAR_INTERVAL = 1.0  # seconds between two looks at the device's meters: each look waits for the device
NUM_IMAGES = 64  # on the sheet of training images
NUM_MISTAKES = 32

# TensorBoard's HParams tab shows the first five columns, and those marked as differing come first.
SHOWN_FIRST = ("PSKD", "BYOT", "DML", "classifier_type", "seed")


class Logger:
    """The main process's voice; with `directory` None (the other processes), silent.

    Args:
        directory: the run's.
        num_epochs: of the whole run, for the time left.
    """

    def __init__(self, directory: Path | None, num_epochs: int):
        self.num_epochs = num_epochs
        self.silent = directory is None
        if not self.silent:
            threading.excepthook = _quiet_about_disks
            self._log = open(directory / "experiment.log", "a", encoding="utf-8", errors="replace")  # noqa: SIM115
            self._board = SummaryWriter(str(directory / "tensorboard"))
        self._epoch_seconds = 0.0
        self._seconds, self._best = [], float("inf")

    def say(self, text: str) -> None:
        """Print a line and keep it in experiment.log."""
        if self.silent:
            return
        # One write a line, its end included: the lines of several runs in one terminal or pipe stay whole.
        for out in (sys.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):  # a pager that was closed stops no run
                out.write(text + "\n")
                out.flush()

    def bar(self, epoch: int):
        """A `progress` argument for train_one_epoch: a bar on a terminal, nothing elsewhere."""

        def progress(loader, meter):
            hidden = self.silent or not sys.stderr.isatty()
            if hidden:
                yield from loader
                return
            looked, seen = time.monotonic(), 0
            epochs_left = self.num_epochs - epoch - 1
            name = f"epoch {epoch + 1}/{self.num_epochs}"
            with tqdm(total=loader.num_samples, desc=name, unit="img", leave=False, dynamic_ncols=True) as bar:
                for batch in loader:
                    yield batch
                    n = min(loader.batch_size, loader.num_samples - seen)
                    seen += n
                    bar.update(n)
                    if time.monotonic() - looked > BAR_INTERVAL:
                        looked = time.monotonic()
                        means = meter.own_means(seen)
                        elapsed = bar.format_dict["elapsed"]
                        left = elapsed * (loader.num_samples - seen) / seen
                        left += epochs_left * (self._epoch_seconds or elapsed + left)
                        bar.set_postfix_str(
                            f"loss {means['loss']:.3f}, top-1 err {means['top1_error']:.1f} %,"
                            f" run ends in {timedelta(seconds=int(left))}",
                            refresh=False,
                        )

        return progress

    def start(self, flags: dict, loader) -> None:
        """Before the first epoch: a sheet of augmented training images, and the flags for the HParams tab.

        Args:
            flags: the command line; those that do not define the experiment are left out.
            loader: the training loader, of whose current epoch the first images are shown.
        """
        if self.silent:
            return
        images, labels, num = [], [], 0
        for batch, of_batch, _ in loader:
            images.append(loader.denormalise(batch[: NUM_IMAGES - num]))
            labels += of_batch[: NUM_IMAGES - num].tolist()
            num = len(labels)
            if num == NUM_IMAGES:
                break
        captions = [[loader.class_names[label]] for label in labels]
        title = f"The first {num} training images of epoch {loader.epoch + 1}, as the network sees them"
        self._image("training_images", figures.sheet(torch.cat(images).numpy(), captions, title), loader.epoch)
        for summary in hyper_parameters(flags)[:2]:
            self._board.file_writer.add_summary(summary)
        self._board.flush()

    def epoch(self, record: dict, is_new: bool = True) -> None:
        """A finished epoch: a line on the console (if it was run now, in `whole_seconds`), and TensorBoard."""
        if self.silent:
            return
        whole_seconds = record["seconds"] if is_new else None
        t, train, val = record["epoch"], record["train"], record["val"]
        if whole_seconds is not None:
            self._epoch_seconds = whole_seconds
            left = timedelta(seconds=int((self.num_epochs - t - 1) * whole_seconds))
            self.say(
                f"epoch {t + 1}/{self.num_epochs}  lr {record['lr']:.4g}  loss {train['loss']:.4f}"
                f"  train err {train['top1_error']:.2f} %  | val top-1 err {val['top1_error']:.2f} %"
                f"  top-5 {val['top5_error']:.2f} %  NLL {val['nll']:.4f}  ECE {val['ece']:.2f} %"
                f"  AURC {val['aurc']:.2f}  | {record['images_per_second']:.0f} img/s, {left} left"
            )
        self._seconds.append(record["seconds"])
        self._best = min(self._best, val["top1_error"])
        so_far = {"run/median_seconds": statistics.median(self._seconds), "val/best_top1_error": self._best}
        for name, value in (scalars(record) | so_far).items():
            self._board.add_scalar(name, value, t)
        if whole_seconds is not None:
            self._board.flush()

    def finish(self, flags: dict, results: dict, logits: Tensor | None, labels: Tensor, loader) -> None:
        """After the last epoch: the figures of its predictions, the final metrics, and the end table.

        Args:
            flags: as for `start`.
            results: what results.json holds.
            logits: (M, K) of the final classifier on the validation split, in its order; None: no figures.
            labels: (M,).
            loader: the validation loader, whose images the sheet of mistakes shows.
        """
        if self.silent:
            return
        last = results["last"]["epoch"]
        if logits is not None:
            for name, picture in pictures(logits, labels, loader).items():
                self._image(name, picture, last)
        for name, value in results.get("test", {}).get("last", {}).get("val", {}).items():
            self._board.add_scalar(f"test/{name}", value, last)
        self._board.file_writer.add_summary(hyper_parameters(flags)[2])
        for line in results_table(results):
            self.say(line)

    def _image(self, name: str, pixels, epoch: int) -> None:
        self._board.add_image(f"figures/{name}", pixels, epoch, dataformats="HWC")

    def close(self) -> None:
        if not self.silent:
            self._board.flush()  # raises what the writer's thread met; close would not
            self._board.close()
            self._log.close()


def _quiet_about_disks(args) -> None:
    """A `threading.excepthook`: on a full disk TensorBoard's thread ends in an OSError, which the writer's next call
    raises again, where main.py makes one line of it."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def scalars(record: dict) -> dict[str, float]:
    """A metrics.jsonl line as TensorBoard's flat names: `train/…`, `val/…`, `exits/1/…`, `ensemble/…`, `run/…`."""
    flat = {f"run/{k}": record[k] for k in ("lr", "alpha_t", "images_per_second", "seconds")}
    groups = {"train": record["train"], "val": record["val"], "ensemble": record["ensemble"]}
    groups |= {f"exits/{i}": metrics for i, metrics in enumerate(record["exits"], start=1)}
    for group, metrics in groups.items():
        flat |= {f"{group}/{k}": v for k, v in (metrics or {}).items()}
    return {k: v for k, v in flat.items() if v is not None}


def hyper_parameters(flags: dict) -> tuple:
    """The HParams tab's three summaries: its columns, this run's flags, and that the run is finished.

    The tab takes its columns from one run of a directory, so every run names the same ones: all flags that
    define the experiment, and scalars (`test/…` and `ensemble/…` stay empty where there are none). The run's own
    event file holds them; SummaryWriter.add_hparams would make another run of each.
    """
    values, choices = {}, {}
    for name in sorted(flags.keys() - NOT_DEFINING):
        value = flags[name]
        if isinstance(value, bool):
            value, choices[name] = "on" if value else "off", ["on", "off"]
        elif isinstance(value, (list, tuple)):
            value = " ".join(map(str, value))
        values[name] = "none" if value is None else value
    scores = [*(f"val/{name}" for name in METRICS), "val/best_top1_error", "ensemble/top1_error", "test/top1_error"]
    columns, start, end = hparams(values, dict.fromkeys([*scores, "run/median_seconds"]), choices)
    plugin = columns.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in SHOWN_FIRST
    plugin.content = content.SerializeToString()
    return columns, start, end


def pictures(logits: Tensor, labels: Tensor, loader) -> dict:
    """Name -> (H, W, 3) uint8: the figures of M predictions (M, K) against labels (M,).

    `loader` gives the class names and, by row, the images.
    """
    confidence, wrong = confidence_and_wrong(logits, labels)
    curve, perfect = (risk_coverage_curve(key, wrong).cpu().numpy() for key in (confidence, -wrong))
    made = {
        "reliability": figures.reliability_diagram(*(s.cpu().numpy() for s in reliability(confidence, wrong))),
        "risk_coverage": figures.risk_coverage(curve, perfect),
    }
    order = torch.where(wrong > 0, confidence, -1).argsort(descending=True, stable=True)
    rows = order[: min(NUM_MISTAKES, int(wrong.sum()))]
    if len(rows):
        names, predicted = loader.class_names, logits.argmax(dim=1)
        captions = [
            (names[labels[row]], names[predicted[row]], f"{100 * confidence[row]:.1f} % sure") for row in rows.tolist()
        ]
        title = f"The {len(rows)} most confident mistakes: true class, in red the predicted one"
        made["most_confident_mistakes"] = figures.sheet(loader.pictures(rows).numpy(), captions, title)
    return made


def results_table(results: dict) -> list[str]:
    """The end of a run: last and best epoch, and with them the test split's numbers where there are some; the
    six metrics of each classifier, as lines of text."""

    def row(label: str, entries) -> str:
        return f"  {label:12}" + "".join(f"{entry:>11}" for entry in entries)

    lines = [
        row("", (heading for heading, _, _ in METRICS.values())),
        row("", (unit for _, unit, _ in METRICS.values())),
    ]

    def add(title: str, record: dict) -> None:
        lines.append(title)
        classifiers = {f"exit {i}": metrics for i, metrics in enumerate(record["exits"], start=1)}
        if untrained := [label for label, metrics in classifiers.items() if metrics is None]:
            lines.append(f"  {', '.join(untrained)}: no loss trains this classifier")
        for label, metrics in (classifiers | {"final": record["val"], "ensemble": record["ensemble"]}).items():
            if metrics is not None:
                cells = (f"{metrics[k]:.{m.decimals}f}" if k in metrics else "-" for k, m in METRICS.items())
                lines.append(row(label, cells))

    same = "best" in results and results["best"]["epoch"] == results["last"]["epoch"]
    for name in ("last", "best"):
        if name not in results or (name == "best" and same):
            continue
        add(f"{'last epoch, also the best' if same else f'{name} epoch'} ({results[name]['epoch'] + 1})", results[name])
        if test := results.get("test", {}).get(name):
            add(f"{name} epoch on the test split", test)
    return lines
