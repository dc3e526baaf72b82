"""Progress of evaluations in the terminal: a table that is redrawn, or plain lines if the output is no terminal."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ringrl.errors import printable
from ringrl.evaluation.formatting import ABSENT, duration, number
from ringrl.evaluation.protocol import Evaluation, Part
from ringrl.evaluation.rollout import EpisodeBatch
from ringrl.evaluation.scores import EvaluationSummary, finite_mean, random_return, score_or_none
from ringrl.methods import title_of
from ringrl.pace import Pace


class EvaluationProgress:
    """Progress callbacks. The base class ignores every event."""

    def on_begin(self, evaluation: Evaluation) -> None:
        """Called when an evaluation starts."""

    def on_step(self, streams: int) -> None:
        """Called after every simulated step, with the number of environments that were stepped."""

    def on_episode(self, part: Part, index: int, episode: EpisodeBatch) -> None:
        """Called when an episode has ended or was read from the journal."""

    def on_finish(self, evaluation: Evaluation, summary: EvaluationSummary, *, rolled_out: bool) -> None:
        """Called when the results are written; `rolled_out` is False if they were written by an earlier command."""

    def on_message(self, text: str) -> None:
        """Called with a line for the user."""


@dataclass
class _Row:
    """The state of one evaluation."""

    evaluation: Evaluation
    state: str = "waiting"
    returns: dict[Part, list[float | None]] = field(default_factory=dict)  # mean return of each finished episode
    failed: int = 0
    finished_steps: int = 0  # environment steps of finished episodes
    simulated: int = 0  # environment steps that were simulated
    current_steps: int = 0  # environment steps of the current episode
    began: float = 0.0

    @property
    def rate(self) -> float:
        """Return the environment steps per second."""
        return self.simulated / max(time.perf_counter() - self.began, 1e-9)

    @property
    def left(self) -> str:
        """Return the time left as h:mm:ss."""
        steps = self.evaluation.steps - self.finished_steps - self.current_steps
        return duration(steps / self.rate if self.simulated else None)


class ProgressTable(EvaluationProgress):
    """Shows the progress of evaluations, as a context manager."""

    def __init__(self, evaluations: Sequence[Evaluation], console: Console) -> None:
        self._rows = [_Row(evaluation) for evaluation in evaluations]
        self._console = console
        self._pace = Pace()
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._console.is_terminal:
            self._live.transient = kind is None  # the table of an interrupted evaluation remains visible
            self._live.stop()
        if kind is KeyboardInterrupt:
            self.on_message("interrupted; the same command resumes after the last finished episode")

    def on_begin(self, evaluation: Evaluation) -> None:
        self._row = next(row for row in self._rows if row.evaluation is evaluation)
        self._row.began, self._row.state = time.perf_counter(), "running"

    def on_step(self, streams: int) -> None:
        self._row.simulated += streams
        self._row.current_steps += streams
        if not self._console.is_terminal and self._pace.is_due():
            row = self._row
            steps = f"{row.finished_steps + row.current_steps:,} of {row.evaluation.steps:,} steps"
            self.on_message(f"{_name(row.evaluation)}: {steps}, {row.rate:.0f} steps/s, {row.left} left")

    def on_episode(self, part: Part, index: int, episode: EpisodeBatch) -> None:
        row = self._row
        finished, mean = int(np.isfinite(episode.returns).sum()), finite_mean(episode.returns.tolist())
        row.returns.setdefault(part, []).append(mean)
        row.failed += len(episode.returns) - finished
        pace = f"{row.rate:.0f} steps/s, {row.left} left" if row.current_steps else "from the journal"
        row.finished_steps, row.current_steps = row.finished_steps + episode.reward.size, 0
        if not self._console.is_terminal:
            place = f"episode {index + 1} of {row.evaluation.protocol.episodes}"
            place += "" if part == "context" else " of the control"
            result = "every stream failed" if mean is None else f"mean return {mean:.1f} of {finished} streams"
            self.on_message(f"{_name(row.evaluation)}: {place}: {result}, {pace}")

    def on_finish(self, evaluation: Evaluation, summary: EvaluationSummary, *, rolled_out: bool) -> None:
        row = self._row
        row.state = "done" if rolled_out else "was done"
        row.failed = summary.failed + summary.failed_without_context
        row.returns = {"context": list(summary.returns), "control": list(summary.returns_without_context)}
        if not rolled_out:
            self.on_message(f"{_name(evaluation)}: {evaluation.results} contains this evaluation; --again repeats it")

    def on_message(self, text: str) -> None:
        self._pace.restart()
        self._console.print(printable(text), soft_wrap=True, markup=False, highlight=False)

    def table(self) -> Table:
        """Return the table of the current state."""
        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("Task", "Method", "Mean return of episode 1, 2, ..."):
            shown.add_column(name)
        for name in ("Ended", "Failed", "Steps/s", "Left"):
            shown.add_column(name, justify="right", no_wrap=True)
        for row in self._rows:
            template, running = row.evaluation.template, row.state == "running"
            shown.add_row(
                escape(template.task),
                escape(title_of(template.method, template.train_trajectories)),
                " ".join(number(value) for value in row.returns.get("context", [])) or row.state,
                f"{sum(map(len, row.returns.values()))}/{template.test_trajectories * len(row.evaluation.parts)}",
                str(row.failed) if row.failed else ABSENT,
                f"{row.rate:.0f}" if running and row.simulated else ABSENT,
                row.left if running else row.state,
            )
        return shown


def final_table(summaries: Sequence[EvaluationSummary], data_means: Mapping[str, float] | None = None) -> Group:
    """Return one table per task: mean returns over the streams, with normalised scores in brackets.

    Args:
        summaries: evaluations, grouped by task.
        data_means: task -> mean return of the training data. Tasks without a known mean are absent.
    """
    tables = [
        _task_table(task, list(group), (data_means or {}).get(task))
        for task, group in itertools.groupby(summaries, lambda summary: summary.task)
    ]
    legend = "Means over streams"
    if any(score is not None for summary in summaries for score in summary.scores.values()):
        legend += "; normalised scores in brackets"
    legend += ". Episodes: streams x n, one after another in a context."
    if any(summary.metrics_without_context for summary in summaries):
        legend += " No memory: the mean of the control, whose memory is cleared before each episode."
    return Group(*tables, Text(legend, style="dim"))


def _task_table(task: str, summaries: Sequence[EvaluationSummary], data_mean: float | None) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=0, title=escape(task), title_justify="left", title_style="bold")
    shown.add_column("Policy", min_width=20, overflow="fold")
    for name in ("Target", "Episodes", "Mean", "Last", "No memory", "Failed"):
        shown.add_column(name, justify="right", no_wrap=True, min_width=8)  # aligns the columns of several tasks
    for summary in summaries:
        failed = summary.failed + summary.failed_without_context
        names = [Path(summary.checkpoint).name] if summary.checkpoint else []
        names.append(title_of(summary.method, summary.train_trajectories))
        if summary.prompt_trajectories:
            control = f" ({summary.prompt_control})" if summary.prompt_control else ""
            names.append(f"after a prompt of {summary.prompt_trajectories}{control}")
        shown.add_row(
            escape("\n".join(map(printable, names))),
            number(summary.target_return),
            f"{summary.streams} x {summary.episodes}",
            *(_with_score(summary.metrics, summary.scores, name) for name in ("mean", "last")),
            _with_score(summary.metrics_without_context, summary.scores_without_context, "mean"),
            str(failed) if failed else ABSENT,
        )
    known = None if any(summary.method == "random" for summary in summaries) else random_return(task)
    for name, value in ((title_of("random"), known), ("Dataset, all episodes", data_mean)):
        if value is not None:
            shown.add_row(name, "", "", _with_score({"mean": value}, {"mean": score_or_none(task, value)}, "mean"))
    return shown


def _with_score(metrics: Mapping[str, float | None], scores: Mapping[str, float | None], name: str) -> str:
    value, score = metrics.get(name), scores.get(name)
    return number(value) if score is None else f"{number(value)} ({round(score)})"


def _name(evaluation: Evaluation) -> str:
    template = evaluation.template
    return f"{template.task}, {title_of(template.method, template.train_trajectories)}"
