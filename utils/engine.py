"""Optimiser, schedule, one step, one epoch of training, one pass of validation. They know no method."""

import math
import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from utils import distributed, launch
from utils.compile import Compiled
from utils.errors import phase
from utils.metrics import all_metrics, per_sample, rows_per_chunk
from utils.records import Classifiers, classifier_names


def build_optimizer(args, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9 and weight decay on every parameter (the published script's)."""
    on_gpu = next(model.parameters()).is_cuda  # where one fused kernel updates all parameters
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=on_gpu or None
    )
    if args.precision == "fp16":
        # The fused update (seen with PyTorch 2.14) allocates momentum in the first step, and if that step is skipped,
        # leaves it uninitialised. From 0 the first momentum is the first gradient, as it is without this.
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def build_schedule(args) -> Callable[[int], float]:
    """The learning rate as a function of the epoch t = 0..T-1.

    `step`: `--lr`, times `--lr_decay_rate` for each epoch of `--lr_decay_schedule` that has been reached (paper).
    `cosine`: lr (1 + cos(pi (t - N) / (T - N))) / 2 after N epochs of warm-up (Loshchilov and Hutter, ICLR 2017, one
    cycle).
    Warm-up: lr (t + 1) / (N + 1) for t < N, so that epoch N is the first at the full rate (Goyal et al., 2017).
    """
    warmup = args.warmup_epochs

    def schedule(epoch: int) -> float:
        if epoch < warmup:
            return args.lr * (epoch + 1) / (warmup + 1)
        if args.lr_schedule == "cosine":
            progress = (epoch - warmup) / (args.end_epoch - warmup)
            return args.lr * (1 + math.cos(math.pi * progress)) / 2
        return args.lr * args.lr_decay_rate ** sum(epoch >= e for e in args.lr_decay_schedule)

    return schedule


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which the network computes. Without a cache of casts, which would outlive a captured step."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


class Meter:
    """Means over an epoch's images, kept on the device, so that no step waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] | None = None
        self.sums: Tensor | None = None  # (parts,) float64
        self.num_wrong = torch.zeros(1, dtype=torch.float64, device=device)
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps without an update (fp16)
        self.num_images = 0  # over all processes; counted by train_one_epoch, since a replayed step runs no Python

    def reset(self) -> None:
        self.num_images = 0
        self.num_wrong.zero_()
        self.num_skipped.zero_()
        if self.sums is not None:
            self.sums.zero_()

    def update(self, parts: dict[str, Tensor], logits: Tensor, labels: Tensor, batch_size: int) -> None:
        """Add a step: the parts of its loss, this process's logits (N, K) and labels, and the number of images in the
        batch over all processes. Labels are classes (N,) or probabilities (N, K), whose largest is then the class."""
        if self.sums is None:
            self.names = list(parts)
            self.sums = torch.zeros(len(parts), dtype=torch.float64, device=self.device)
        # A part's mean over processes is the global batch's (loss/objective.py); wrong predictions just add up.
        self.sums.add_(torch.stack(list(parts.values())), alpha=batch_size / launch.WORLD.size)
        classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
        self.num_wrong += (logits.argmax(dim=1) != classes).sum()

    def means(self, estimated: bool = False) -> dict[str, float]:
        """`loss`, each of its parts, and `top1_error` (%) over the epoch's images so far. Waits for the device and for
        the other processes; or else estimates them from this process's shard alone."""
        sums = torch.cat([self.sums, self.num_wrong])
        sums = sums * launch.WORLD.size if estimated else distributed.all_reduce_sum_(sums)
        *parts, wrong = (sums / self.num_images).tolist()
        return {"loss": sum(parts), **dict(zip(self.names, parts, strict=True)), "top1_error": 100 * wrong}


class TrainStep:
    """Forward, loss, backward, update and meter of one batch.

    Args:
        model: the network, in training mode, as it is or as Compiled and DistributedDataParallel wrap it.
        objective: `objective(outputs, labels, index, batch_size) -> (loss, parts)`.
        precision: `--precision`, under which the network computes.
        compile: run the objective through torch.compile.
        transform: the place where a batch may be changed before it is trained on:
            `transform(images (N, 3, S, S), labels (N,)) -> (images, soft labels (N, K))`. It runs at the beginning of
            every step, outside of what is compiled or captured. None leaves batches as they are.

    With fp16 the loss is scaled, so that small gradients do not become 0 (Micikevicius et al., ICLR 2018); losses and
    what they are computed from stay float32. Where scaled gradients overflow, the step is skipped: weights and momentum
    stay as they are, the scale is halved, and `meter.num_skipped` counts it. Its forward is as valid as any other: the
    meter and the objective's own memory take it as usual, and the learning rate does not wait for it. A loss that is
    not finite, in contrast, ends the run as in any precision, because BatchNorm's statistics have seen such numbers.
    `scaler` has the scale's `state_dict`, which is empty with the other precisions.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str,
        compile: bool = False,
        transform: Callable | None = None,
    ):
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.transform = transform or (lambda images, labels: (images, labels))
        self.device, self.precision = device, precision
        self.meter = Meter(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.loss = Compiled(objective) if compile else objective

    def __call__(self, images: Tensor, labels: Tensor, index: Tensor, batch_size: int) -> None:
        """images (N, 3, S, S), labels (N,), index (N,); batch_size: images in this step over all processes."""
        images, labels = self.transform(images, labels)
        self.update(images, labels, index, batch_size)

    def update(self, images: Tensor, labels: Tensor, index: Tensor, batch_size: int) -> None:
        """The step after the transform: labels are classes (N,) or probabilities (N, K)."""
        with autocast(self.precision, self.device):
            outputs = self.model(images)
        loss, parts = self.loss(outputs, labels, index, batch_size)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # scaled with fp16 alone
        self.scaler.step(self.optimizer)  # on a GPU nothing waits: the fused optimiser skips by itself
        if self.scaler.is_enabled():
            self._update_scale(torch.ones_like(loss))
        self.meter.update(parts, outputs.logits, labels, batch_size)

    def _update_scale(self, one: Tensor) -> None:
        """Halve the scale after a step that overflowed, and count it."""
        scale = self.scaler.scale(one)
        self.scaler.update()
        self.meter.num_skipped += self.scaler.scale(one) < scale


def train_one_epoch(step, loader, progress: Callable = lambda loader, meter: loader) -> dict:
    """Train on every image of the loader once.

    Args:
        step: a TrainStep or a GraphedStep around it; model and objective are in training mode and know the epoch.
        loader: gives (images, labels, index), and knows the epoch.
        progress: wraps the loader in a progress bar.

    Returns:
        `seconds`, `images_per_second`, and `train` with the means over the epoch; with fp16 also `skipped_steps`.
    """
    meter = step.meter
    meter.reset()
    start = time.perf_counter()
    for images, labels, index in progress(loader, meter):
        batch_size = min(loader.batch_size, loader.num_samples - meter.num_images)  # over all processes
        step(images, labels, index, batch_size)
        meter.num_images += batch_size
    step.objective.end_epoch()
    train = meter.means()  # waits for the device, so the clock is read after it
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "images_per_second": loader.num_samples / seconds, "train": train}
    if step.scaler.is_enabled():
        result["skipped_steps"] = meter.num_skipped.item()
    return result


@phase("evaluation")
@torch.no_grad()
def predict(model: nn.Module, loader, precision: str) -> tuple[Tensor, Tensor]:
    """Logits of every classifier for a complete split, shallow to deep, the final one last: (B, M, K) float32, and
    labels (M,). Every process has all of them."""
    model.eval()
    logits, all_labels = None, None
    start = distributed.shard(loader.num_samples).start
    for images, labels, _ in loader:
        with autocast(precision, images.device):
            outputs = model(images)
        batch = torch.stack([*outputs.exit_logits, outputs.logits])
        if logits is None:
            logits = batch.new_zeros(len(batch), loader.num_samples, batch.shape[2])
            all_labels = labels.new_zeros(loader.num_samples)
        stop = start + len(labels)
        logits[:, start:stop], all_labels[start:stop] = batch, labels
        start = stop
    # Each process filled its own rows and left zeros elsewhere: their sum is complete.
    return distributed.all_reduce_sum_(logits), distributed.all_reduce_sum_(all_labels)


@phase("evaluation")
def evaluate(logits: Tensor, labels: Tensor, trained: list[str]) -> Classifiers:
    """Metrics (`utils.records.METRICS`) of every classifier that a loss trains and, if there are several, of their
    `ensemble`, the mean of their probabilities.

    Args:
        logits: (B, M, K), shallow to deep, the final classifier last, as `predict` returns them.
        labels: (M,).
        trained: the classifiers' names, shallow to deep.

    Raises:
        NonFiniteError: logits that are not finite.
    """
    members = by_classifier(logits, trained)
    if len(members) > 1:
        members["ensemble"] = ensemble_logits(list(members.values()))
    samples = torch.stack([per_sample(z, labels) for z in members.values()])
    return dict(zip(members, map(all_metrics, samples.cpu()), strict=True))


def by_classifier(logits: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Of logits (B, M, K), shallow to deep, those of the named classifiers: (M, K) each."""
    return {name: z for name, z in zip(classifier_names(len(logits)), logits, strict=True) if name in names}


def ensemble_logits(members: list[Tensor]) -> Tensor:
    """Logits whose softmax is the mean of the members' probabilities: (M, K) each -> (M, K) float64."""
    rows = rows_per_chunk(members[0].shape[1])
    chunks = []
    for chunk in zip(*(logits.split(rows) for logits in members), strict=True):
        # log of the sum of probabilities, which softmax normalises; in logs, so that nothing underflows to an
        # infinite NLL
        log_probabilities = torch.stack(chunk).double().log_softmax(dim=2)
        chunks.append(log_probabilities.logsumexp(dim=0))
    return torch.cat(chunks)


def first_nonfinite(model: nn.Module, means: dict[str, float]) -> str | None:
    """What is NaN or infinite after an epoch: loss terms, by name, or else the first parameter or buffer.

    Called once per epoch, so that no step waits for it.
    """
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        return ", ".join(name for name in bad if name != "loss") or "loss"
    tensors = model.state_dict()
    are_finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return next((name for name, is_finite in zip(tensors, are_finite, strict=True) if not is_finite), None)
