"""Ending a run in good order when it is told to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether the run has been told to stop; it then finishes its step and saves."""

    asked = False

    def after(self, step: int) -> bool:
        """Whether this step is the last: of several processes, one that was told stops all after the same step."""
        return self.asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """SIGTERM (a scheduler's warning, `kill`) sets `asked` within the block, where the main thread runs it."""
    stop = Stop()
    if jax.process_count() > 1:  # JAX has caught the signal since the processes met
        yield stop
        return

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
