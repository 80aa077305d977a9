"""Images per second of training: the reference pipeline, and each way in which main.py can compute its steps.

    python scripts/benchmark.py --PSKD --BYOT --DML --configs reference eager graph --out figures.jsonl

Each configuration runs in a process of its own, which appends a JSON line to --out when it is done: on a GPU all
rounds, on a CPU one, the configurations taking turns, so that what disturbs the machine disturbs all of them. Any flag
of main.py may be given too; images are synthetic unless --data_type says otherwise.
"""

import argparse
import contextlib
import fcntl
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reference_pipeline

import main
from data import build_loaders
from loss import METHODS, build_objective
from models import build_model
from utils.cuda_graph import GraphedStep
from utils.distributed import local_device
from utils.engine import TrainStep, build_optimizer, train_one_epoch
from utils.flags import number_type
from utils.runtime import machine_facts, set_up_torch

# Name -> flags of main.py. `reference` and names in _nchw keep images and weights in NCHW, the others in channels_last.
CONFIGS = {
    "reference": "--precision=fp32",
    "eager": "",
    "graph": "--cuda_graph",
    "compiled": "--compile",
    "compiled_graph": "--compile --cuda_graph",
    "fp32": "--precision=fp32",
    "eager_nchw": "",
    "graph_nchw": "--cuda_graph",
}
ROW = ("classifier_type", *METHODS, "width", "batch_size", "device_name", "config")  # what tells table rows apart
COLUMNS = {
    "images/s": ("images_per_second", ".1f"),
    "half IQR": ("half_iqr", ".1f"),
    "times reference": ("times_reference", ".2f"),
    "of matrix ceiling": ("share_of_ceiling", ".1%"),
    "compiling, s": ("seconds_compiling", ".1f"),
    "peak GPU GiB": ("peak_memory_gib", ".1f"),
    "s per 50,000 images": ("seconds_per_50000", ".1f"),
    "s per epoch of main.py": ("seconds_per_epoch", ".2f"),
}


class NCHWStep(TrainStep):
    def forward(self, images, *batch):
        return super().forward(images.contiguous(), *batch)


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product of random numbers, the best of a hundred."""
    n, dtype = 8192 if device.type == "cuda" else 512, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


@torch.no_grad()
def flop_per_image(model: torch.nn.Module, image_size: int) -> int:
    """FLOP of forward and backward: three times the forward's, less the gradient of the images, which nobody needs.
    (PyTorch counts the backward of grouped convolutions wrong.)"""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=model.fc.weight.device))
    return 3 * counter.get_total_flops() - 2 * model.conv1.weight.numel() * image_size**2


def time_steps(args: argparse.Namespace, own: argparse.Namespace, out) -> dict:
    """Speed over own.rounds epochs of own.steps steps after a first one."""
    device, nchw = local_device(args.device), own.worker == "reference" or own.worker.endswith("_nchw")
    on_gpu = device.type == "cuda"
    args.precision = "tf32" if own.worker == "reference" and on_gpu else args.precision  # PyTorch's default there
    set_up_torch(args.seed, device, args.precision)
    args.limit_train = (own.steps or (78 if on_gpu else 3)) * args.batch_size
    loader, _ = build_loaders(args, device)
    model = build_model(args, loader.num_classes).train()
    model.to(device, memory_format=torch.contiguous_format if nchw else torch.channels_last)
    objective = build_objective(args, loader.num_samples, loader.num_classes).to(device)
    if own.worker == "reference":
        step, loader = reference_pipeline.build(args, loader, model, objective, device)
    else:
        optimizer, kind = build_optimizer(args, model), NCHWStep if nchw else TrainStep
        step = kind(model, objective, optimizer, device, args.precision, args.compile)
        step = GraphedStep(step) if args.cuda_graph else step
    fcntl.flock(out, fcntl.LOCK_EX)  # processes that write to one file are timed one after the other
    epochs, line = [], {"run": own.run, "precision": args.precision}
    for epoch in range(own.rounds + 1):
        objective.set_epoch(epoch)
        loader.set_epoch(epoch)
        epochs.append(train_one_epoch(step, loader))
        if on_gpu and epoch == 0:
            torch.cuda.empty_cache()  # of what choosing kernels and compiling needed
            torch.cuda.reset_peak_memory_stats(device)
    if on_gpu:  # reserved, because replaying a graph allocates nothing
        line["peak_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    line["rounds"] = [epoch["images_per_second"] for epoch in epochs[1:]]
    line["seconds_compiling"] = epochs[0]["seconds"] - min(epoch["seconds"] for epoch in epochs)
    line["matrix_flop_per_second"] = matrix_rate(device, args.precision)
    return line | {"flop_per_image": flop_per_image(model, args.image_size)}


def time_epochs(argv: list[str], own: argparse.Namespace, out) -> dict:
    """Medians over own.rounds epochs of main.py after a first one."""
    fcntl.flock(out, fcntl.LOCK_EX)
    with tempfile.TemporaryDirectory() as parent, contextlib.redirect_stdout(sys.stderr):
        if main.main([*argv, f"--end_epoch={own.rounds + 1}", f"--experiments_dir={parent}", "--run_name=run"]):
            sys.exit(1)
        records = [json.loads(text) for text in Path(parent, "run", "metrics.jsonl").read_text().splitlines()[1:]]
    median = {n: float(np.median([r[n] for r in records])) for n in ("seconds", "seconds_validation", "seconds_saving")}
    return {**median, "seconds_per_epoch": sum(median.values())}


def measure(own: argparse.Namespace, argv: list[str]) -> None:
    """Append a line of configuration `own.worker`."""
    argv = [*argv, *CONFIGS[own.worker].split()]
    args = main.parse_args(argv)
    line = {"config": own.worker, **machine_facts(local_device(args.device))}
    line |= {name: getattr(args, name) for name in ROW if name in args}
    with open(own.out, "a") as out:
        line |= time_epochs(argv, own, out) if own.epoch else time_steps(args, own, out)
        out.write(json.dumps(line) + "\n")


def table(files: list[str]) -> str:
    """Markdown, one row for each of ROW: all rounds of its newest run, and its newest epoch."""
    rows = {}
    for line in (json.loads(text) for file in files for text in Path(file).read_text().splitlines()):
        row = rows.setdefault(tuple(line[name] for name in ROW), {})
        if "rounds" in line and line["run"] == row.get("run"):
            line["rounds"] += row["rounds"]
        row.update(line)
    timed = [row for row in rows.values() if "rounds" in row]
    references = {row["run"]: np.median(row["rounds"]) for row in timed if row["config"] == "reference"}
    for row in timed:
        low, rate, high = np.percentile(row["rounds"], (25, 50, 75))
        row |= {"images_per_second": rate, "half_iqr": (high - low) / 2, "seconds_per_50000": 50_000 / rate}
        row["share_of_ceiling"] = rate * row["flop_per_image"] / row["matrix_flop_per_second"]
        if row["run"] in references:
            row["times_reference"] = rate / references[row["run"]]
    text = [" | ".join(["| network", "methods", "configuration", *COLUMNS]) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for row in rows.values():
        cells = ["| " + row["classifier_type"], " + ".join(m for m in METHODS if row[m]) or "none", row["config"]]
        cells += [format(row[name], spec) if name in row else "" for name, spec in COLUMNS.values()]
        text.append(" | ".join(cells) + " |")
    return "\n".join(text)


def command_line(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add, number = parser.add_argument, number_type(int, 1, 10**6)
    add("--configs", nargs="+", choices=CONFIGS, default=["reference", "eager"], metavar="C", help=", ".join(CONFIGS))
    add("--rounds", type=number, default=5, help="per configuration, after one to warm up (default: 5)")
    add("--steps", type=number, help="per round (default: 78 on a GPU, 3 on a CPU)")
    add("--epoch", action="store_true", help="time complete epochs of main.py instead, with validation and saving")
    add("--time_limit", type=number, metavar="SECONDS", help="of each process")
    add("--out", default="benchmark.jsonl", metavar="FILE", help="where lines are appended (default: %(default)s)")
    add("--table", nargs="+", metavar="FILE", help="print the table of these files, and stop")
    add("--worker", help=argparse.SUPPRESS)
    add("--run", help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args(argv)
    if own.table:
        return print(table(own.table))
    rest = ["--data_type", "synthetic", *rest]
    if own.worker:
        return measure(own, rest)
    if own.epoch and not {"reference", "eager_nchw", "graph_nchw"}.isdisjoint(own.configs):
        parser.error("argument --epoch: main.py has no configuration `reference` or `_nchw`; give other --configs")
    Path(own.out).touch()
    devices = {main.parse_args([*rest, *CONFIGS[name].split()]).device for name in own.configs}
    repeats, rounds = (own.rounds, 1) if devices == {"cpu"} and not own.epoch else (1, own.rounds)
    command = [sys.executable, __file__, *argv, "--rounds", str(rounds), "--run", str(time.time()), "--worker"]
    for name in own.configs * repeats:
        try:
            subprocess.run([*command, name], check=True, timeout=own.time_limit)
        except subprocess.SubprocessError as e:
            print(f"note: no line for {name}: {e}", file=sys.stderr)
    print(table([own.out]))


if __name__ == "__main__":
    command_line(sys.argv[1:])
