"""Progress of evaluations in the terminal, and the table of their results."""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from rich import box
from rich.console import Console, Group
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
        """Called when an episode has ended."""

    def on_finish(self, evaluation: Evaluation, summary: EvaluationSummary, *, rolled_out: bool) -> None:
        """Called when the results are written; `rolled_out` is False if they were written by an earlier command."""

    def on_message(self, text: str) -> None:
        """Called with a line for the user."""


class ProgressLines(EvaluationProgress):
    """Context manager that prints a line per episode. A terminal also shows the steps, a log a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console, self._pace = console, Pace()
        self._status = console.status(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._status.stop()
        if kind is KeyboardInterrupt:
            self.on_message("interrupted; the same command keeps finished evaluations")

    def __rich__(self) -> str:
        """Return the line that a terminal shows."""
        return escape(self._state())

    def on_begin(self, evaluation: Evaluation) -> None:
        self._evaluation, self._began = evaluation, time.perf_counter()
        # Steps of finished episodes, steps of the current episode, and steps that were simulated now.
        self._finished_steps = self._current_steps = self._simulated = 0
        if self._console.is_terminal:
            self._status.start()

    def on_step(self, streams: int) -> None:
        self._simulated += streams
        self._current_steps += streams
        if not self._console.is_terminal and self._pace.is_due():
            self.on_message(self._state())

    def on_episode(self, part: Part, index: int, episode: EpisodeBatch) -> None:
        finished, mean = int(np.isfinite(episode.returns).sum()), finite_mean(episode.returns.tolist())
        self._finished_steps, self._current_steps = self._finished_steps + episode.reward.size, 0
        place = f"episode {index + 1} of {self._evaluation.protocol.episodes}"
        place += "" if part == "context" else " of the control"
        result = "every stream failed" if mean is None else f"mean return {mean:.1f} of {finished} streams"
        self.on_message(f"{_name(self._evaluation)}: {place}: {result}, {self._speed()}")

    def on_finish(self, evaluation: Evaluation, summary: EvaluationSummary, *, rolled_out: bool) -> None:
        if not rolled_out:
            self.on_message(f"{_name(evaluation)}: {evaluation.results} contains this evaluation; --again repeats it")

    def on_message(self, text: str) -> None:
        self._pace.restart()
        self._console.print(printable(text), soft_wrap=True, markup=False, highlight=False)

    def _state(self) -> str:
        steps = f"{self._finished_steps + self._current_steps:,} of {self._evaluation.steps:,} steps"
        return f"{_name(self._evaluation)}: {steps}, {self._speed()}"

    def _speed(self) -> str:
        """Return the environment steps per second and the time left."""
        rate = self._simulated / max(time.perf_counter() - self._began, 1e-9)
        left = self._evaluation.steps - self._finished_steps - self._current_steps
        return f"{rate:.0f} steps/s, {duration(left / rate if rate else None)} left"


def final_table(summaries: Sequence[EvaluationSummary], data_means: Mapping[str, float]) -> Group:
    """Return one table per task: mean returns over the streams, with normalised scores in brackets.

    The summaries are grouped by task. `data_means` has the mean return of a task's training data if it is known.
    """
    tables = [
        _task_table(task, list(group), data_means.get(task))
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
    recorded = next((summary.reference_returns for summary in summaries if summary.reference_returns), None)
    known = None if any(summary.method == "random" for summary in summaries) else random_return(task, recorded)
    for name, value in ((title_of("random"), known), ("Dataset, all episodes", data_mean)):
        if value is not None:
            shown.add_row(
                name, "", "", _with_score({"mean": value}, {"mean": score_or_none(task, value, recorded)}, "mean")
            )
    return shown


def _with_score(metrics: Mapping[str, float | None], scores: Mapping[str, float | None], name: str) -> str:
    value, score = metrics.get(name), scores.get(name)
    return number(value) if score is None else f"{number(value)} ({round(score)})"


def _name(evaluation: Evaluation) -> str:
    template = evaluation.template
    return f"{template.task}, {title_of(template.method, template.train_trajectories)}"
