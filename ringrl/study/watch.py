"""How an ablation goes, for the terminal: a line that moves, or plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ringrl.evaluation.formatting import duration

_SHOWN = 3  # names of cells that run


class Watch:
    """Shows how many cells are done, running and failed, and the time left, as a context manager.

    The time left follows the estimates, corrected by how long the cells so far have really taken.

    Args:
      estimates: seconds of each cell that is to be run, by name; None where it was not timed.
      workers: how many run at once.
      console: where it is shown.
    """

    def __init__(self, estimates: Mapping[str, float | None], workers: int, console: Console) -> None:
        self._left, self._workers, self._console = dict(estimates), workers, console
        self._running: dict[str, float] = {}
        self._estimated = self._taken = 0.0  # seconds of the cells that are done
        self._done = self._failed = 0
        self._progress = Progress(
            TextColumn("[bold]cells"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._bar = self._progress.add_task("", total=len(estimates))

    def begin(self, name: str) -> None:
        """It runs now."""
        self._running[name] = time.perf_counter()
        self._show()

    def end(self, name: str, failure: str | None) -> None:
        """It has come to its end; why, where that is not the one wished for."""
        seconds = time.perf_counter() - self._running.pop(name)
        estimate = self._left.pop(name)
        if failure is None:
            self._done += 1
            self._taken += seconds
            self._estimated += seconds if estimate is None else estimate
        else:
            self._failed += 1
        self._show()
        end = f"finished in {duration(seconds)}" if failure is None else f"failed: {failure}"
        line = f"{name}: {end}" if self._console.is_terminal else f"{name}: {end}; {self._state()}"
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    @property
    def seconds_left(self) -> float | None:
        """By what is known; None where that is nothing."""
        count = len(self._left)
        if self._done:
            mean = self._taken / self._done
            factor = self._taken / max(self._estimated, 1e-9)
            whole = sum(mean if estimate is None else factor * estimate for estimate in self._left.values())
        elif count and None not in self._left.values():
            whole = sum(estimate or 0.0 for estimate in self._left.values())
        else:
            return 0.0 if not count else None
        now = time.perf_counter()
        begun = sum(now - since for since in self._running.values())
        return max(0.0, whole - begun) / max(1, min(self._workers, count))

    def _state(self) -> str:
        left = self.seconds_left
        counts = f"{self._done} done, {len(self._running)} running, {self._failed} failed, {self._waiting} waiting"
        return counts if left is None else f"{counts}, {duration(left)} left"

    @property
    def _waiting(self) -> int:
        return len(self._left) - len(self._running)

    def _show(self) -> None:
        names = ", ".join(list(self._running)[:_SHOWN]) + (" ..." if len(self._running) > _SHOWN else "")
        said = f"{self._state()}: {names}" if names else self._state()
        self._progress.update(self._bar, completed=self._done + self._failed, description=escape(said))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
