"""The process around a run: errors that become one line, signals, random seeds, facts of the machine."""

import contextlib
import functools
import platform
import re
import signal
import subprocess
from pathlib import Path

import torch
import torchvision

# Keys of config.json that say where a run was computed.
MACHINE_FACTS = ("python", "torch", "torchvision", "device_name", "processes", "git_commit")

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # PyTorch on a CPU, on a GPU, CUDA libraries


class UserError(Exception):
    """An error that the user can fix: `main.py` prints its one line and exits with status 1.

    The message names the file or flag that is wrong and says what to do.
    """


class Interrupted(BaseException):
    """A signal arrived; `number` is the signal's. Not an Exception, so that no handler on the way swallows it."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def signals_raise():
    """Within, SIGINT, SIGTERM and SIGHUP raise Interrupted; a second signal ends the process at once.

    A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}

    def handler(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def describe_error(error: Exception, args) -> str | None:
    """One line for an error that is not a bug of this program; None for all others.

    Args:
        args: the command line.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return f"standard output: {error.strerror}"
    if isinstance(error, OSError):
        path = error.filename or Path(args.experiments_dir, args.run_name)
        return f"{path}: {error.strerror or error}; fix it and rerun the same command"
    chain, e = [], error  # an error inside a graph capture hides the one that caused it
    while e is not None:
        chain.append(e)
        e = e.__cause__ or e.__context__
    if any(isinstance(e, MemoryError) or any(text in str(e) for text in OUT_OF_MEMORY) for e in chain):
        return (
            f"out of memory with --batch_size {args.batch_size} on {args.device}: lower --batch_size, --image_size or"
            " --width, or use --precision bf16"
        )
    if any(type(e).__module__.startswith(("torch._dynamo", "torch._inductor")) for e in chain):
        return f"--compile does not work here ({first_line(error)}); rerun without it"
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def set_up_torch(seed: int, device: torch.device, precision: str) -> None:
    """Seed PyTorch and choose how float32 products are computed.

    Nothing in a training step draws from the global generators (weights come from `build_model`'s own seed, order
    and augmentation from the loader's), so seeding them is for code that a user adds.
    """
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = True  # few shapes, each used thousands of times


@functools.cache
def machine_facts(device: torch.device, processes: int = 1) -> dict:
    """MACHINE_FACTS and their values: versions, device, number of processes, git commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        model = re.search(r"model name\s*: (.+)", _cpu_info())
        name = f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"
    versions = (platform.python_version(), torch.__version__, torchvision.__version__)
    return dict(zip(MACHINE_FACTS, (*versions, name, processes, _git_commit()), strict=True))


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, bf16 is slower than float32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpu_info().split())


def _cpu_info() -> str:
    """Linux's description of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _git_commit() -> str | None:
    """The commit of this code, marked where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty= with changes"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return git.stdout.strip()
