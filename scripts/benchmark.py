"""Images a second of the training step: the plain way, each of our options on its own, and all together.

    python scripts/benchmark.py --PSKD --BYOT --DML --classifier_type resnet18

The plain way is a DataLoader with PIL transforms, float32, NCHW, eager, PS-KD's memory on the host and `.item()`
in every step. All ways run in one process and in turn, round after round, so that what disturbs the machine
disturbs all of them; the table gives the median over rounds and, as spread, half the range of its middle half.
Any flag of main.py may be given; images are synthetic unless --data_type says otherwise.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DATASETS, build_loaders
from data.files import Split
from data.loader import Loader
from loss import build_objective
from loss.pskd import ProgressiveTargets
from models import build_model
from utils.cuda_graph import WARM_UP, GraphedStep
from utils.distributed import local_device
from utils.engine import Meter, autocast, train_step
from utils.flags import METHODS, number_type, parse_args
from utils.machine import describe_machine
from utils.metrics import classification_metrics
from utils.seed import set_up_torch

PHASES = ("data", "forward", "backward", "optimiser", "rest")
EPOCH_IMAGES = 50_000  # CIFAR-100's, the unit of the paper's seconds per epoch


@dataclass(frozen=True)
class Way:
    """How a step is computed. The defaults are the plain way."""

    device_loader: bool = False
    channels_last: bool = False
    bf16: bool = False
    asynchronous: bool = False  # memory and meters on the device, nothing read back
    compile: bool = False
    graph: bool = False


def ways(device: torch.device, bf16: bool, compile_: bool) -> dict[str, Way]:
    """Name -> way: the plain one, each option alone, what main.py does by default, and that compiled."""
    plain = Way()
    options = {"device loader": "device_loader", "channels_last": "channels_last", "asynchronous": "asynchronous"}
    if bf16:
        options["bf16"] = "bf16"
    if compile_:
        options["compile"] = "compile"
    table = {"plain": plain}
    table |= {f"plain + {name}": replace(plain, **{field: True}) for name, field in options.items()}
    whole = Way(device_loader=True, channels_last=True, bf16=bf16, asynchronous=True)
    table["main.py"] = whole
    if device.type == "cuda":
        table["main.py, captured"] = replace(whole, graph=True)
    if compile_:
        table["main.py --compile"] = replace(whole, compile=True, graph=device.type == "cuda")
    return table


class PlainImages(Dataset):
    """The loader's training images through PIL, one at a time, as published scripts read CIFAR."""

    def __init__(self, loader, size: int, mean, std):
        self.images, self.labels = loader.pictures(torch.arange(loader.num_samples)), loader.labels.cpu()
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(size, padding=size // 8),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.transform(self.images[i]), self.labels[i], i


class HostTargets(ProgressiveTargets):
    """PS-KD's memory where published scripts keep it: in host memory, whatever device the loss is on."""

    def _apply(self, fn, recurse=True):
        return self

    def forward(self, labels, index):
        return super().forward(labels.cpu(), index.cpu()).to(labels.device)

    def record(self, logits, index):
        super().record(logits.detach().cpu(), index.cpu())


class Trainer:
    """One way of training, ready to be timed."""

    def __init__(self, args, way: Way, device: torch.device, loader):
        self.way, self.device, self.batch_size = way, device, args.batch_size
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        self.layout = layout
        self.model = build_model(args, loader.num_classes).to(device, memory_format=layout).train()
        self.objective = build_objective(args, loader.num_samples, loader.num_classes)
        if args.PSKD and not way.asynchronous:
            self.objective.targets = HostTargets(loader.num_samples, loader.num_classes, args.alpha_T, args.end_epoch)
        self.objective.to(device).train().set_epoch(1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        self.autocast = functools.partial(autocast, "bf16" if way.bf16 else "fp32", device)
        self.network = torch.compile(self.model, dynamic=False) if way.compile else self.model
        self.meter = Meter(device)
        self.step = GraphedStep() if way.graph else train_step
        self.loader = loader
        if not way.device_loader:
            dataset = DATASETS[args.data_type]
            images = PlainImages(loader, args.image_size, dataset.mean, dataset.std)
            workers = {"num_workers": args.workers, "persistent_workers": True} if args.workers else {}
            self.loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True, **workers)
        self.batches = self._batches()

    def _batches(self):
        """Whole batches without end."""
        for epoch in itertools.count():
            if self.way.device_loader:
                self.loader.set_epoch(epoch)
            for images, labels, index in self.loader:
                if len(labels) == self.batch_size:
                    yield (
                        images.to(self.device, memory_format=self.layout),
                        labels.to(self.device),
                        index.to(self.device),
                    )

    def train(self, steps: int) -> float:
        """Seconds a step, over `steps` steps."""
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            batch = next(self.batches)
            self.step(self.network, self.objective, self.optimizer, self.autocast, self.meter, *batch, self.batch_size)
            if not self.way.asynchronous:
                self.meter.sums.sum().item()
        synchronise(self.device)
        return (time.perf_counter() - start) / steps

    def split(self, steps: int) -> dict[str, float]:
        """Seconds a step by phase; the device is waited for after each, so that their sum is no speed."""
        seconds = dict.fromkeys(PHASES, 0.0)
        last = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            synchronise(self.device)
            now = time.perf_counter()
            seconds[phase] += (now - last) / steps
            last = now

        for _ in range(steps):
            images, labels, index = next(self.batches)
            lap("data")
            with self.autocast():
                outputs = self.network(images)
            lap("forward")
            loss, parts = self.objective(outputs, labels, index)
            self.optimizer.zero_grad(set_to_none=True)
            lap("rest")
            loss.backward()
            lap("backward")
            self.optimizer.step()
            lap("optimiser")
            self.meter.update(parts, outputs.logits, labels, self.batch_size)
            if not self.way.asynchronous:
                self.meter.sums.sum().item()
            lap("rest")
        return seconds


def set_up(args: argparse.Namespace) -> torch.device:
    """As main.py does."""
    device = local_device(args.device)
    set_up_torch(args.seed, device, args.precision)
    return device


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_memory(device: torch.device) -> float:
    """Start to watch the peak; GiB held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident peak starts again from here
    return resident("VmRSS")


def peak_memory(device: torch.device) -> float:
    """GiB: on a GPU, what the allocator held at the most; on a CPU, the process's resident peak."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else resident("VmHWM")


def resident(entry: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{entry}:")[1].split()[0]) / 2**20


def matrix_rate(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a large matrix product on random data, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def flop_per_image(trainer: Trainer) -> float:
    """FLOP of forward and backward an image, counted by PyTorch."""
    images, labels, index = next(trainer.batches)
    with FlopCounterMode(display=False) as counter:
        loss, _ = trainer.objective(trainer.model(images), labels, index)
        loss.backward()
    trainer.model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(labels)


def middle_half(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return (quarters[2] - quarters[0]) / 2


def run(own: argparse.Namespace, args: argparse.Namespace) -> dict:
    """Time every way; returns what the table shows."""
    device = set_up(args)
    loader, _ = build_loaders(args, device)
    if loader.num_samples < args.batch_size:
        sys.exit(f"error: {loader.num_samples} training images make no batch of {args.batch_size}: lower --batch_size")
    table = ways(device, args.precision == "bf16", own.compiled)
    trainers, rows = {}, {}
    for name, way in table.items():
        print(f"warming up: {name}", file=sys.stderr, flush=True)
        held = start_memory(device)
        trainers[name] = Trainer(args, way, device, loader)
        trainers[name].train(max(own.warm_up, WARM_UP + 1) if way.graph else own.warm_up)
        rows[name] = {"peak_memory_gib": peak_memory(device) - held, "seconds_per_step": []}
    for r in range(own.rounds):
        for name, trainer in trainers.items():
            print(f"round {r + 1}/{own.rounds}: {name}", file=sys.stderr, flush=True)
            rows[name]["seconds_per_step"].append(trainer.train(own.steps))
    work = flop_per_image(trainers["plain"])
    ceilings = {bf16: matrix_rate(device, bf16) for bf16 in {way.bf16 for way in table.values()}}
    for name, trainer in trainers.items():
        row = rows[name]
        rates = [args.batch_size / s for s in row["seconds_per_step"]]
        row["images_per_second"] = statistics.median(rates)
        row["spread"] = middle_half(rates)
        row["seconds_per_50k"] = EPOCH_IMAGES / row["images_per_second"]
        row["share_of_ceiling"] = row["images_per_second"] * work / ceilings[trainer.way.bf16]
        if not trainer.way.graph:  # a captured step has no phases
            row["split"] = trainer.split(own.steps)
    return {
        "command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "classifier_type": args.classifier_type,
        "methods": [m for m in METHODS if getattr(args, m)],
        "batch_size": args.batch_size,
        "flop_per_image": work,
        "matrix_flop_per_second": {"bf16" if k else "fp32": v for k, v in ceilings.items()},
        "rounds": own.rounds,
        "steps": own.steps,
        "rows": rows,
        **describe_machine(device),
    }


def markdown(found: dict) -> str:
    """The table, with what it was measured on."""
    plain = found["rows"]["plain"]["images_per_second"]
    lines = [
        f"{found['classifier_type']}, {' + '.join(found['methods']) or 'baseline'}, batch {found['batch_size']}, on"
        f" {found['device_name']}, torch {found['torch']}; median of {found['rounds']} rounds of {found['steps']}"
        " steps.",
        "",
        "| way | images/s | times plain | s per 50,000 | share of matrix ceiling | peak GiB | "
        + " | ".join(f"{p} %" for p in PHASES)
        + " |",
        "|---" * (6 + len(PHASES)) + "|",
    ]
    for name, row in found["rows"].items():
        cells = [
            name,
            f"{row['images_per_second']:.1f} ± {row['spread']:.1f}",
            f"{row['images_per_second'] / plain:.2f}",
            f"{row['seconds_per_50k']:.1f}",
            f"{100 * row['share_of_ceiling']:.1f} %",
            f"{row['peak_memory_gib']:.2f}",
        ]
        split = row.get("split")
        total = sum(split.values()) if split else 1.0
        cells += [f"{100 * split[p] / total:.1f}" if split else "" for p in PHASES]
        lines.append("| " + " | ".join(cells) + " |")
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in found["matrix_flop_per_second"].items())
    lines += [
        "",
        f"Forward and backward: {found['flop_per_image'] / 1e9:.2f} GFLOP an image. Matrix product, GFLOP/s: {rates}.",
    ]
    return "\n".join(lines)


def profile(own: argparse.Namespace, args: argparse.Namespace) -> None:
    """Print where the time of main.py's own step goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    device = set_up(args)
    loader, _ = build_loaders(args, device)
    way = ways(device, args.precision == "bf16", False)["main.py"]
    trainer = Trainer(args, way, device, loader)
    trainer.train(own.warm_up)
    on_gpu = device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        trainer.train(own.steps)
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def median_seconds(work, device: torch.device, times: int = 9) -> float:
    """Median seconds of `work()`, once warm."""
    seconds = []
    for _ in range(times + 1):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def growth(args: argparse.Namespace) -> str:
    """How validation metrics and the part of a step outside the network grow with the number of images."""
    device = set_up(args)
    dataset = DATASETS["cifar100"]
    lines = ["| images M | metrics of M x 100 predictions, ms | loader and PS-KD a step of 128, ms |", "|---|---|---|"]
    for m in (10_000, 100_000, 1_000_000):
        logits, labels = torch.randn(m, 100, device=device), torch.randint(100, (m,), device=device)
        metrics = median_seconds(lambda: classification_metrics(logits, labels), device)  # noqa: B023
        pixels = np.random.default_rng(0).integers(0, 256, (m, 32, 32, 3), dtype=np.uint8)
        names = [str(k) for k in range(100)]
        split = Split(pixels, labels.cpu().numpy())
        loader = Loader(split, names, dataset.mean, dataset.std, 32, device, dataset.augmentation, args.batch_size)
        targets = ProgressiveTargets(m, 100, 0.8, 300).to(device)
        targets.set_epoch(1)
        batches = iter(loader)

        def step(batches=batches, targets=targets, logits=logits):
            for _ in range(16):  # a whole chunk of the loader's on a GPU
                _, labels, index = next(batches)
                targets(labels, index)
                targets.record(logits[: len(index)], index)

        next(batches)  # draws the epoch's random numbers, once
        seconds = median_seconds(step, device, times=3) / 16
        lines.append(f"| {m:,} | {1000 * metrics:.1f} | {1000 * seconds:.2f} |")
    return "\n".join(lines)


def command_line(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Every flag of main.py may be given too.", allow_abbrev=False
    )
    parser.add_argument(
        "--rounds", type=number_type(int, 1, 10**6), default=5, help="rounds over all ways (default: 5, for a median)"
    )
    parser.add_argument(
        "--steps",
        type=number_type(int, 1, 10**6),
        default=None,
        help="steps a round (default: 50 on a GPU, 2 on a CPU)",
    )
    parser.add_argument(
        "--warm_up",
        type=number_type(int, 1, 10**6),
        default=None,
        help="steps before (default: 10 on a GPU, 3 on a CPU)",
    )
    parser.add_argument("--compiled", action="store_true", help="also time torch.compile, which takes minutes to start")
    parser.add_argument("--profile", action="store_true", help="print a torch.profiler table of main.py's step instead")
    parser.add_argument(
        "--growth", action="store_true", help="time metrics and step against the number of images instead"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("--from_json", metavar="FILE", help="print the table of figures measured before, and stop")
    own, rest = parser.parse_known_args(argv)
    if own.from_json:
        try:
            print(markdown(json.loads(Path(own.from_json).read_text())))
        except (OSError, ValueError, KeyError, TypeError) as e:
            parser.error(f"argument --from_json: {own.from_json} does not hold a benchmark's figures ({e})")
        return
    args = parse_args(["--data_type", "synthetic", *rest])
    on_gpu = args.device.startswith("cuda")
    if not on_gpu:  # the plain way's loading processes would take the processor from the training
        args.workers = 0
    own.steps = own.steps or (50 if on_gpu else 2)
    own.warm_up = own.warm_up or (10 if on_gpu else 3)
    if own.growth:
        print(growth(args))
        return
    if own.profile:
        profile(own, args)
        return
    found = run(own, args)
    if own.json:
        Path(own.json).write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    command_line()
