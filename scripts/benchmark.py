"""Images per second of training: the pipeline of published scripts, and each way in which main.py computes its steps.

    python scripts/benchmark.py --PSKD --BYOT --DML --configs reference eager graph --out figures.jsonl

Each configuration runs in a process of its own, which appends a JSON line to --out: on a GPU after all rounds, on a
CPU after one, the configurations taking turns, so that what disturbs the machine disturbs all of them. Any flag of
main.py may be given too; images are synthetic unless --data_type says otherwise.
"""

import argparse
import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
from data import build_loaders
from data.loader import resize
from loss import METHODS, build_objective
from loss.pskd import ProgressiveTargets
from models import build_model
from utils.compile import Compiled
from utils.cuda_graph import GraphedStep
from utils.distributed import local_device
from utils.engine import TrainStep, build_optimizer, train_one_epoch
from utils.machine import environment, set_up_torch
from utils.parser import Parser, number_type

CONFIGS = {  # name -> flags of main.py; the reference and _nchw keep weights and images in NCHW
    "reference": "--precision=fp32",
    "eager": "",
    "graph": "--cuda_graph",
    "compiled": "--compile",
    "compiled_graph": "--compile --cuda_graph",
    "fp32": "--precision=fp32",
    "eager_nchw": "",
    "graph_nchw": "--cuda_graph",
}
COLUMNS = {
    "images/s": ("images_per_second", ".1f"),
    "half IQR": ("half_iqr", ".1f"),
    "times reference": ("times_reference", ".2f"),
    "compiling, s": ("seconds_compiling", ".1f"),
    "peak GPU GiB": ("peak_memory_gib", ".1f"),
}


class ReferenceImages(Dataset):
    """A loader's images as published scripts read them: PIL images, and torchvision's transforms."""

    def __init__(self, loader):
        crop = transforms.RandomCrop(loader.image_size, padding=loader.image_size // 8)
        to_tensor = transforms.ToTensor(), transforms.Normalize(loader.record.mean, loader.record.std)
        self.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *to_tensor])
        self.raw_images = list(map(transforms.ToPILImage(), resize(loader.images.cpu(), loader.image_size).numpy()))
        self.labels = loader.labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row: int):
        return self.transform(self.raw_images[row]), self.labels[row], row


class ReferenceStep(TrainStep):
    """A published script's step: copies its batch to the device and waits for its loss."""

    def __call__(self, images, labels, index, batch_size):
        super().__call__(images.to(self.device), labels.to(self.device), index.to(self.device), batch_size)
        self.meter.sums.sum().item()


class HostTargets(ProgressiveTargets):
    """PS-KD's targets, whose memory is on the host, whatever device the loss is on."""

    def forward(self, outputs, labels, index):
        on_host = outputs._replace(logits=outputs.logits.detach().cpu())
        return super().forward(on_host, labels.cpu(), index.cpu()).to(labels.device)


def time_steps(name: str, args: argparse.Namespace, own: argparse.Namespace) -> dict:
    """Images per second in each of own.rounds epochs of own.steps steps, after a first one."""
    device, is_reference = local_device(args.device), name == "reference"
    on_gpu = device.type == "cuda"
    if is_reference and on_gpu:
        args.precision = "tf32"  # PyTorch's default there
    set_up_torch(device, args.precision)
    args.limit_train = (own.steps or (78 if on_gpu else 3)) * args.batch_size
    batches = loader = build_loaders(args, device)[0]
    model = build_model(args, loader.num_classes).train().to(device)
    if is_reference or name.endswith("_nchw"):
        model.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())  # the loader's are channels_last
    else:
        model.to(memory_format=torch.channels_last)
    objective = build_objective(args, loader.num_samples, loader.num_classes).to(device)
    optimizer = build_optimizer(args, model)
    if is_reference:
        workers = args.workers if on_gpu else 0  # on a CPU they would slow the training
        loading = {"shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
        batches = DataLoader(ReferenceImages(loader), args.batch_size, **loading)
        batches.num_samples = loader.num_samples  # which train_one_epoch reads
        optimizer.param_groups[0]["fused"] = None  # PyTorch's default
        if args.PSKD:
            objective.soften = HostTargets(loader.num_samples, loader.num_classes, args.alpha_T, args.end_epoch)
    step_type = ReferenceStep if is_reference else TrainStep
    network = Compiled(model) if args.compile else model
    step = step_type(network, objective, optimizer, device, args.precision, args.compile)
    if args.cuda_graph:
        step = GraphedStep(step)
    epochs = []
    for epoch in range(own.rounds + 1):
        objective.set_epoch(epoch)
        loader.set_epoch(epoch)
        epochs.append(train_one_epoch(step, batches))
        if on_gpu and epoch == 0:
            torch.cuda.empty_cache()  # of what choosing kernels and compiling needed
            torch.cuda.reset_peak_memory_stats(device)
    line = {"rounds": [epoch["images_per_second"] for epoch in epochs[1:]]}
    line["seconds_compiling"] = epochs[0]["seconds"] - min(epoch["seconds"] for epoch in epochs)
    if on_gpu:  # reserved, because replaying a graph allocates nothing
        line["peak_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return line


def measure(name: str, argv: list[str], own: argparse.Namespace) -> None:
    """Append the line of a configuration, with main.py's flags `argv` and this script's `own`."""
    args = main.parse_args(argv)
    where = environment(local_device(args.device))
    line = {"run": own.run, "config": name, **where, **vars(args), **time_steps(name, args, own)}
    with open(own.out, "a") as out:
        out.write(json.dumps(line) + "\n")


def table(files: list[str]) -> str:
    """Markdown, one row for each run of this script and configuration, with the median of all its rounds."""
    rows = {}
    for text in "".join(Path(file).read_text() for file in files).splitlines():
        line = json.loads(text)
        row = rows.setdefault((line.get("run"), line["config"]), {"rounds": []})
        row |= {**line, "rounds": row["rounds"] + line["rounds"]}
    cells = [["network", "methods", "configuration", *COLUMNS]]
    cells.append(["---"] * len(cells[0]))
    for (run, config), row in rows.items():
        low, rate, high = np.percentile(row["rounds"], (25, 50, 75))
        row |= {"images_per_second": rate, "half_iqr": (high - low) / 2}
        if (run, "reference") in rows:
            row["times_reference"] = rate / np.median(rows[run, "reference"]["rounds"])
        methods = " + ".join(method for method in METHODS if row[method]) or "none"
        values = [format(row[name], spec) if name in row else "" for name, spec in COLUMNS.values()]
        cells.append([row["classifier_type"], methods, config, *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def command_line(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add, number = parser.add_argument, number_type(int, 1, 10**6)
    add("--configs", nargs="+", choices=CONFIGS, default=["reference", "eager"], metavar="C", help=", ".join(CONFIGS))
    add("--rounds", type=number, default=5, help="per configuration, after one to warm up (default: 5)")
    add("--steps", type=number, help="per round (default: 78 on a GPU, 3 on a CPU)")
    add("--out", default="benchmark.jsonl", metavar="FILE", help="where lines are appended (default: %(default)s)")
    add("--table", nargs="+", metavar="FILE", help="print the table of these files, and stop")
    own, flags = parser.parse_known_args(argv)
    if own.table:
        print(table(own.table))
        return
    own.run = time.time()  # tells this run's lines from others
    argv_of = {name: ["--data_type=synthetic", *flags, *CONFIGS[name].split()] for name in own.configs}
    devices = {main.parse_args(argv).device for argv in argv_of.values()}
    turns = 1
    if devices == {"cpu"}:
        turns, own.rounds = own.rounds, 1
    Path(own.out).touch()  # before the work, not after it
    for name in own.configs * turns:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, argv_of[name], own))
        process.start()
        process.join()
        if process.exitcode != 0:
            print(f"note: no line for {name}: exit status {process.exitcode}", file=sys.stderr)
    print(table([own.out]))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    try:
        command_line(sys.argv[1:])
    except OSError as e:
        sys.exit(f"error: {e}")
