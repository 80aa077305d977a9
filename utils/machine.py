"""What this machine is: where a result comes from, and what the processor can do."""

import contextlib
import functools
import platform
import subprocess
from pathlib import Path

import torch
import torchvision

from utils import distributed


@functools.cache
def describe_machine(device: torch.device) -> dict:
    """Versions, device name and git commit, as config.json keeps them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        models = [value for key, value in _cpu_info() if key == "model name"]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device_name": name,
        "processes": distributed.world_size(),
        "git_commit": _git_commit(),
    }


def has_bf16_instructions() -> bool:
    """Whether this processor multiplies bfloat16 itself; without, bf16 on the CPU is slower than float32."""
    words = {word for key, value in _cpu_info() if key in ("flags", "Features") for word in value.split()}
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_info() -> list[tuple[str, str]]:
    """Linux's lines about the processors; none elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        pairs = [line.partition(":") for line in f]
        return [(key.strip(), value.strip()) for key, _, value in pairs]
    return []


def _git_commit() -> str | None:
    """The commit of this code, marked where files differ from it; None outside a repository."""
    git = functools.partial(
        subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
    )
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with changes" if changed else commit
