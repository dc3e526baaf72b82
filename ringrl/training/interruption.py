"""Ending a run in good order when it is told to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether the run has been told to stop; it then finishes its step and saves."""

    asked = False


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """SIGTERM (a scheduler's warning, `kill`) sets `asked` within the block, where the main thread runs it."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # signals belong to the main thread; in another nobody can ask
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
