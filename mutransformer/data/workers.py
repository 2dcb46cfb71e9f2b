"""What worker processes have in common: they end with their parent, and signals of the terminal reach the parent alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that a terminal or a scheduler sends to all processes of a group


def set_up_worker(*stop: Connection) -> None:
    """Call it first in a worker process. Ends it when its parent has ended, or closed the other end of `stop`.

    The worker leaves its parent's process group, so that Ctrl-C or a signal to the group stops the parent in order: it still
    needs the workers to finish its step, and none of them prints a traceback.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        connection.wait([*stop, parent.sentinel])
        os._exit(1)

    # A thread, not PR_SET_PDEATHSIG: that would also strike when the thread that started the process ends. A worker that is
    # stopped, and whose threads do not run, is woken by the system as its group loses its parent.
    threading.Thread(target=exit_with_parent, daemon=True).start()
    with suppress(OSError):
        os.setpgid(0, 0)
    for number in _SIGNALS:  # ignoring one discards it, if it came while it was blocked
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which multiprocessing ends a worker


@contextmanager
def without_signals() -> Iterator[None]:
    """The processes and threads that the body starts do not take the signals of the group before set_up_worker() is called."""
    resource_tracker.ensure_running()  # multiprocessing starts it at first use, and then unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call_without_signals(action: Callable[[], T]) -> T:
    """The result of an action that starts processes and may take long: it runs in a thread, while this one answers signals."""
    outcome = Future[T]()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # of every kind, SystemExit too: without an outcome result() would wait forever
            outcome.set_exception(error)

    # Not an executor, whose threads hold up the end of the program.
    with without_signals():
        threading.Thread(target=run, daemon=True).start()
    return outcome.result()
