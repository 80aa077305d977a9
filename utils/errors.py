"""Errors that become one line, signals that end a run, and the streams that both are told on."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # PyTorch on a CPU, on a GPU, CUDA libraries


class UserError(Exception):
    """An error that the user can fix: `main.py` prints its one line and exits with status 1.

    The message names the file or flag that is wrong and says what to do.
    """


class NonFiniteError(ValueError):
    """A NaN or an infinity in the loss, the weights or the logits; the message says where."""


class Interrupted(BaseException):
    """A signal arrived; `number` is the signal's. Not an Exception, so that no handler on the way swallows it."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def signals_raise():
    """Within, signals that ask a process to end raise Interrupted; a second one ends the process at once.

    A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """
    # the last two are what clusters send before the time limit
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
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
    if isinstance(error, NonFiniteError):
        remedy = "a lower --lr, more steps per epoch" + ("" if args.precision == "fp32" else " or --precision fp32")
        return f"{error} (NaN or infinity); earlier checkpoints are kept; try {remedy}"
    if isinstance(error, OSError):
        path = error.filename or Path(args.experiments_dir, args.run_name)
        return f"{path}: {error.strerror or error}; fix it and rerun the same command"
    if is_out_of_memory(error):
        half = ", or use --precision bf16" if args.precision in ("fp32", "tf32") else ""
        if getattr(error, "phase", "training") == "evaluation":  # whose batch has a size of its own
            return f"out of memory in evaluation on {args.device}: free memory that other programs use{half}"
        what = f"out of memory in training with --batch_size {args.batch_size} on {args.device}"
        return f"{what}: lower --batch_size, --image_size or --width{half}"
    if "can't start new thread" in str(error):
        return "no further thread can be started: raise the limit of processes (ulimit -u)"
    if any(type(e).__module__.startswith(("torch._dynamo", "torch._inductor")) for e in _chain(error)):
        return f"--compile does not work here ({first_line(error)}); rerun without it"
    return None


@contextlib.contextmanager
def phase(name: str):
    """Within, or in a function that this decorates, an error says in its `phase` where it arose."""
    try:
        yield
    except Exception as error:
        error.phase = name
        raise


def is_out_of_memory(error: Exception) -> bool:
    return any(isinstance(e, MemoryError) or any(text in str(e) for text in OUT_OF_MEMORY) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, such as one inside a graph capture, which another hides."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def printable(text: str) -> str:
    """Text on one line, with control characters and bytes that are no UTF-8 escaped: names of files may hold both."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print a line on standard output, or on `stream`, in one write, since several runs may share a terminal. That
    nobody can read it, as after a closed pager or on a full disk, stops nothing."""
    with contextlib.suppress(OSError):
        print(f"{text}\n", end="", file=stream, flush=True)


def print_error(message: str) -> None:
    """Print `error: ` and the message on standard error, in one line whatever names of files it holds."""
    tell(f"error: {printable(message)}", sys.stderr)


def run_command(command: Callable[[], int | None]) -> None:
    """Call a script's `main`, and exit with the status that it returns.

    Standard output and error may be closed, also while it runs, and escape what their encoding lacks.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `>&-`: the next file that is opened would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):  # a notebook's is another
            stream.reconfigure(errors="backslashreplace")
    try:
        status = command()
    finally:
        for name in ("stdout", "stderr"):
            with contextlib.suppress(OSError):  # a full disk: Python says so at its end, with status 120
                try:
                    getattr(sys, name).flush()
                except BrokenPipeError:
                    setattr(sys, name, None)  # a pager that was left: Python would complain at its end
    sys.exit(status)


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def first_names(names: list[str]) -> str:
    """At most five names, and dots where there are more."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
