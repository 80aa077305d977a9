"""Errors that become one line, and signals that end a run."""

import contextlib
import signal
import traceback
from pathlib import Path

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
        half = ", or use --precision bf16" if args.precision in ("fp32", "tf32") else ""
        functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if not functions.isdisjoint(("predict", "evaluate")):  # whose batch has a size of its own
            return f"out of memory in evaluation on {args.device}: free memory that other programs use{half}"
        what = f"out of memory in training with --batch_size {args.batch_size} on {args.device}"
        return f"{what}: lower --batch_size, --image_size or --width{half}"
    if any(type(e).__module__.startswith(("torch._dynamo", "torch._inductor")) for e in chain):
        return f"--compile does not work here ({first_line(error)}); rerun without it"
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
