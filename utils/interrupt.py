"""SIGINT and SIGTERM as an exception, so that a run can say what it keeps before it ends."""

import contextlib
import signal


class Interrupted(BaseException):
    """A signal arrived; `number` is the signal's. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def signals_raise():
    """Within, SIGINT and SIGTERM raise Interrupted; a second one ends the process at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
