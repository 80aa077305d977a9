"""The machine: random seeds, what the hardware can do, and the facts that a run records about it."""

import hashlib
import os
import platform
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import torch


def set_up_torch(device: torch.device, precision: str) -> None:
    """Choose how float32 products are computed on a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = True  # few shapes, each used thousands of times


def hashed_seed(text: str) -> int:
    """64 bits, hashed so that no two texts give near seeds."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_generators(seed: int, epoch: int, process: int) -> None:
    """Seed the global generators of torch, numpy and random for an epoch.

    Nothing in this program draws from them (weights come from `build_model`'s own seed, order and augmentation from
    the loader's). It is for code that a user adds: it resumes to the bit too, and each process draws its own numbers.
    """
    number = hashed_seed(f"{seed} {epoch} {process}")
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def environment(device: torch.device, processes: int = 1) -> dict:
    """The keys of config.json that say where a run was computed."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        model = re.search(r"model name\s*: (.+)", _cpu_info())
        name = f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"
    import torchvision  # here: it takes a second

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "device_name": name,
        "processes": processes,
        "git_commit": _git_commit(),
    }


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, bf16 is slower than float32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpu_info().split())


def _cpu_info() -> str:
    """Linux's description of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _git_commit() -> str | None:
    """The commit of this code, marked where files differ from it; None where this code is not a repository's root: it
    may lie unpacked inside another one, and git's variables may name yet another."""
    root = Path(__file__).resolve().parent.parent
    command = "git --git-dir=.git --work-tree=. describe --always --exclude=* --abbrev=40"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    options = {"cwd": root, "env": variables, "capture_output": True, "text": True, "timeout": 10, "check": True}
    try:
        return subprocess.run([*command.split(), "--dirty= with changes"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
