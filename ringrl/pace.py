"""Progress of long work, and the pace of progress lines where no bar is possible, for example in the log of a job."""

import time
from collections.abc import Callable

SECONDS = 30.0  # between two lines

Progress = Callable[[int, int], None]
"""Called with the number of finished items and the number of all items."""


def no_progress(finished: int, total: int) -> None:
    """Ignore progress."""


class Pace:
    """The time of the next line: `SECONDS` after the last one. With `at_once`, the first line is due now."""

    def __init__(self, *, at_once: bool = False) -> None:
        self._next = time.perf_counter() + (0 if at_once else SECONDS)

    def is_due(self) -> bool:
        """Return whether a line is due. The next is due `SECONDS` later."""
        if due := time.perf_counter() >= self._next:
            self.restart()
        return due

    def restart(self) -> None:
        """Count again from now."""
        self._next = time.perf_counter() + SECONDS
