"""SIGINT, SIGTERM and SIGHUP as an exception, so that a run can say what it keeps before it ends."""

import contextlib
import signal


class Interrupted(BaseException):
    """A signal arrived; `number` is the signal's. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def signals_raise():
    """Within, Ctrl-C, preemption and a terminal that is closed raise Interrupted; a second signal ends the process at
    once. A SIGHUP that is ignored, as under nohup, stays so."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def handler(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
