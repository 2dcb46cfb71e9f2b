"""Turns signals into a request to stop, which the program answers with a checkpoint, or at once if there is nothing to save."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

CLEAR_LINE = "\r\x1b[2K"  # of a terminal
# Of a scheduler (TERM; USR1 and USR2 are SLURM's warnings), a person (INT) and a terminal that was closed (HUP).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """Ends a program that was asked to stop. Not an Exception, since libraries might catch that."""


class StopRequest:
    """Whether the program was asked to stop: by a signal to this process, or, in a run of several, to any of them."""

    def __init__(self) -> None:
        self.requested = False
        self.signal = ""  # its name, if this process got it
        self.agree: Callable[[bool], bool] | None = None  # Watch.agree: all processes stop at the same call of poll
        self._at_once = 0

    def poll(self) -> bool:
        """Whether to stop here. All processes of a run call it in the same order, and get the same answer."""
        if self.agree is not None:
            return self.agree(self.requested)
        return self.requested

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block a signal raises Stopped; so does entering it after a signal. For long work that may be cut off.

        Without effect once several processes agree on when to stop: the others would wait for the one that stopped alone.
        """
        self._at_once += 1
        try:
            if self.requested and self.agree is None:
                raise Stopped(self.signal)
            yield
        finally:
            self._at_once -= 1

    def on_signal(self, number: int) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = not self.requested
        self.requested, self.signal = True, signal.Signals(number).name
        if self._at_once and self.agree is None:
            raise Stopped(self.signal)
        if first:
            again = "; Ctrl-C again to abort" if number == signal.SIGINT else ""
            _say(f"{self.signal}: stopping after this step{again}")


def _say(text: str) -> None:
    """Prints a line on standard error, in place of a progress bar there. The streams of Python cannot be used within a signal."""
    with suppress(OSError):
        os.write(2, (CLEAR_LINE * os.isatty(2) + text + "\n").encode())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGNALS into a request to stop; a second Ctrl-C ends the program at once.

    A signal that is ignored on purpose, as SIGHUP by nohup, stays ignored. Outside of the main thread, where Python allows no
    signal handlers, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: request.on_signal(number))
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
