"""How evaluations go, and what they found, for the terminal: a table that fills in, or plain lines elsewhere."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ringrl.evaluation.episode import Episode
from ringrl.evaluation.formatting import ABSENT, duration, number
from ringrl.evaluation.play import Part
from ringrl.evaluation.session import Audience, Job
from ringrl.evaluation.summary import Summary, mean

_REDRAWN = 4  # times a second
_NUMBER = 8  # least width of a column, so that those of several tasks stand below each other


@dataclass
class _Line:
    """How one job goes."""

    job: Job
    state: str = "waiting"
    returns: dict[Part, list[float | None]] = field(default_factory=dict)  # mean of each episode that has ended
    failed: int = 0
    passed: int = 0  # environment steps of the episodes that have ended
    simulated: int = 0  # environment steps, those of the episode that goes on included
    within: int = 0  # of that one alone
    begun: float = 0.0

    @property
    def rate(self) -> float:
        """Environment steps per second since it began."""
        return self.simulated / max(time.perf_counter() - self.begun, 1e-9)

    @property
    def left(self) -> str:
        """Time, as h:mm:ss."""
        return duration((self.job.plan.steps - self.passed - self.within) / self.rate if self.simulated else None)


class Board(Audience):
    """Shows how the jobs go, as a context manager. On a terminal a table is redrawn, elsewhere lines are printed."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self._lines = [_Line(job) for job in jobs]
        self._console = console
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=_REDRAWN, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.transient = kind is None  # what has been seen of an interrupted evaluation stays
            self._live.stop()
        if kind is KeyboardInterrupt:
            self.remark("interrupted; the same command goes on after the last episode that ended")

    def begin(self, job: Job) -> None:
        """Its line is the one that moves."""
        self._now = next(line for line in self._lines if line.job is job)
        self._now.begun, self._now.state = time.perf_counter(), "running"

    def step(self, streams: int) -> None:
        """Count."""
        self._now.simulated += streams
        self._now.within += streams

    def episode(self, part: Part, index: int, episode: Episode) -> None:
        """Fill in its mean return."""
        line = self._now
        finished = int(np.isfinite(episode.returns).sum())
        line.returns.setdefault(part, []).append(mean(episode.returns.tolist()))
        line.failed += len(episode.returns) - finished
        pace = f"{line.rate:.0f} steps/s, {line.left} left" if line.within else "from the journal"
        line.passed, line.within = line.passed + episode.reward.size, 0
        words = f"episode {index + 1} of {line.job.plan.episodes}{'' if part == 'context' else ' of the control'}"
        value = line.returns[part][-1]
        found = "no stream finished it" if value is None else f"mean return {value:.1f} of {finished} streams"
        self._say(f"{_name(line.job)}: {words}: {found}, {pace}")

    def finish(self, job: Job, summary: Summary, *, rolled_out: bool) -> None:
        """Show what is known of it."""
        line = self._now
        line.state = "done" if rolled_out else "was done"
        line.failed = summary.failed + summary.failed_without_context
        line.returns = {"context": list(summary.returns), "control": list(summary.returns_without_context)}
        if not rolled_out:
            self.remark(f"{_name(job)}: {job.results} holds this very evaluation already; --again repeats it")

    def remark(self, text: str) -> None:
        """Print it above the table."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _say(self, text: str) -> None:
        if not self._console.is_terminal:
            self.remark(text)

    def table(self) -> Table:
        """As it stands now."""
        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("Task", "Method", "Mean return of episode 1, 2, ..."):
            shown.add_column(name)
        for name in ("Ended", "Failed", "Steps/s", "Left"):
            shown.add_column(name, justify="right", no_wrap=True)
        for line in self._lines:
            plan, runs = line.job.plan, line.state == "running"
            total = plan.episodes * (2 if plan.control else 1)
            shown.add_row(
                escape(plan.shared.task),
                escape(plan.shared.method),
                " ".join(number(value) for value in line.returns.get("context", [])) or line.state,
                f"{sum(map(len, line.returns.values()))}/{total}",
                str(line.failed) if line.failed else ABSENT,
                f"{line.rate:.0f}" if runs and line.simulated else ABSENT,
                line.left if runs else line.state,
            )
        return shown


def final_table(summaries: Sequence[Summary]) -> Group:
    """What was found, a table per task: mean returns over the streams, normalised scores in brackets."""
    tables = [
        _task_table(task, list(group)) for task, group in itertools.groupby(summaries, lambda summary: summary.task)
    ]
    meaning = (
        "Means over the streams; in brackets normalised scores. Episodes: streams x n, one after another in a context. "
        "Without context: best of n that do not remember each other."
    )
    return Group(*tables, Text(meaning, style="dim"))


def _task_table(task: str, summaries: Sequence[Summary]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=0, title=escape(task), title_justify="left", title_style="bold")
    shown.add_column("Method", min_width=12, overflow="fold")
    for name in ("Episodes", "First", "Last", "Mean", "Best of n", "Without\ncontext", "Failed"):
        shown.add_column(name, justify="right", no_wrap=True, min_width=_NUMBER)
    for summary in summaries:
        failed = summary.failed + summary.failed_without_context
        shown.add_row(
            escape(summary.method),
            f"{summary.streams} x {summary.episodes}",
            *(_both(summary.metrics, summary.scores, name) for name in ("first", "last", "mean", "best")),
            _both(summary.metrics_without_context, summary.scores_without_context, "best"),
            str(failed) if failed else ABSENT,
        )
    return shown


def _both(metrics: Mapping[str, float | None], scores: Mapping[str, float | None], name: str) -> str:
    value, score = metrics.get(name), scores.get(name)
    return number(value) if score is None else f"{number(value)} ({round(score)})"


def _name(job: Job) -> str:
    return f"{job.plan.shared.task}, {job.plan.shared.method}"
