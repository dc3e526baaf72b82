"""Signals that ask a command to stop: from a user, a closing terminal or a scheduler."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


class Stopped(KeyboardInterrupt):
    """An interruption by a signal other than SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Raise Stopped."""
    raise Stopped(number)


@contextlib.contextmanager
def handled(handler: Handler, signals: tuple[int, ...] = STOPPING) -> Iterator[None]:
    """Call `handler` for these signals inside the block, if the main thread runs it.

    A SIGHUP that is ignored stays ignored (nohup). Handlers of other libraries are kept.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
        before = {number: old for number in signals if _may_replace(number, old := signal.getsignal(number))}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _may_replace(number: int, handler: object) -> bool:
    if handler is signal.SIG_IGN:
        return number != signal.SIGHUP
    own = ("ringrl.", "signal", "_signal")
    return handler is signal.SIG_DFL or (callable(handler) and str(handler.__module__).startswith(own))
