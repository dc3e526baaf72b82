"""Progress of an ablation in the terminal: a moving line, or plain lines elsewhere."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ringrl.evaluation.formatting import duration

_SHOWN = 3  # names of running cells


class AblationProgress(Progress):
    """Context manager that shows how many cells are finished, running and failed, and the time left.

    The time left is the sum of the `estimates` (name -> seconds), scaled by the real seconds of the finished cells.
    """

    def __init__(self, estimates: Mapping[str, float], workers: int, console: Console) -> None:
        columns = TextColumn("[bold]cells"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
        super().__init__(
            *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True
        )
        self._left, self._workers = dict(estimates), workers
        self._running: dict[str, float] = {}
        self._finished = self._failed = 0
        self._estimated = self._taken = 0.0  # seconds of the finished cells that take time
        self._bar = self.add_task("", total=len(estimates))

    def begin(self, name: str) -> None:
        """Show that a cell starts."""
        self._running[name] = time.perf_counter()
        self._show()

    def end(self, name: str, failure: str | None) -> None:
        """Show and print that a cell ends, with the reason if it failed."""
        seconds, estimate = time.perf_counter() - self._running.pop(name), self._left.pop(name)
        if failure is not None:
            self._failed += 1
        else:
            self._finished += 1
            if estimate:
                self._taken, self._estimated = self._taken + seconds, self._estimated + estimate
        self._show()
        end = f"finished in {duration(seconds)}" if failure is None else f"failed: {failure}"
        self._print(f"{name}: {end}" if self.console.is_terminal else f"{name}: {end}; {self._state()}")

    def still_running(self) -> None:
        """Print a line that the work continues, unless a terminal shows it."""
        if not self.console.is_terminal:
            self._print(self._line())

    @property
    def seconds_left(self) -> float:
        """Estimated seconds left."""
        factor = self._taken / self._estimated if self._estimated else 1.0
        whole, now = factor * sum(self._left.values()), time.perf_counter()
        begun = sum(now - since for since in self._running.values())
        return max(0.0, whole - begun) / max(1, min(self._workers, len(self._left)))

    def _state(self) -> str:
        running = len(self._running)
        waiting = len(self._left) - running
        counts = f"{self._finished} finished, {running} running, {self._failed} failed, {waiting} waiting"
        return f"{counts}, {duration(self.seconds_left)} left"

    def _line(self) -> str:
        names = ", ".join(list(self._running)[:_SHOWN]) + (" ..." if len(self._running) > _SHOWN else "")
        return f"{self._state()}: {names}" if names else self._state()

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _show(self) -> None:
        self.update(self._bar, completed=self._finished + self._failed, description=escape(self._line()))
