"""Contexts for training: n trajectories of a store, ordered, relabelled to a target, as one long sequence.

The batch of a step is a pure function of (seed, step): a run that is resumed, or read on other hosts, sees the same.
It is planned first (which trajectories, in which order, towards which return: cheap, and done alike on every host), and
then any part of it can be read.
"""

import dataclasses
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int

from ringrl.config import ContextConfig
from ringrl.context import Context
from ringrl.data.contexts import ContextPlan, read_contexts
from ringrl.data.normalisation import Normalisation
from ringrl.data.selection import Episodes, eligible_episodes
from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

RETURN_RANGES = 10  # of `return_stratified`


def episodes_for_contexts(
    store: EpisodeStore, task: str, config: ContextConfig, seed: int, selected_by: str | None = None
) -> Episodes:
    """The episodes that contexts are drawn from, in the order they were collected.

    Raises:
      UserError: a task that the store has no rewards for, or fewer episodes than one context holds.
    """
    for name in (task, *config.other_tasks):
        if name not in store.tasks:
            raise UserError(
                f"{store.path}: is a {store.domain} dataset and has no rewards for task {name}; "
                f"it has {', '.join(store.tasks)}"
            )
    found = eligible_episodes(store, selected_by or task, seed, config.max_transitions, config.best_fraction)
    if config.trajectories > len(found):
        raise UserError(
            f"context.trajectories: {config.trajectories} do not fit the {len(found)} eligible episodes of "
            f"{store.path}; ask for fewer, or raise context.best_fraction or context.max_transitions where they are set"
        )
    return found


@dataclasses.dataclass(frozen=True)
class ContextSampler:
    """Draws batches of contexts from a store.

    Each context holds `config.trajectories` distinct trajectories (2305.16554, section 3): sorted ascending by
    return, every return-to-go starts from the best trajectory's return, R_t = R_0 - sum of rewards so far, and the
    completion token is 1 on the last step of a trajectory that reaches that target.
    """

    store: EpisodeStore
    task: str
    config: ContextConfig
    normalisation: Normalisation
    batch_size: int
    seed: int
    selected_by: str | None = None  # the task whose returns config.best_fraction goes by, where it is another one

    def __post_init__(self) -> None:
        self.eligible  # noqa: B018  UserError where contexts cannot be drawn

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those whose rewards take turns."""
        return (self.task, *self.config.other_tasks)

    @cached_property
    def eligible(self) -> Episodes:
        """Episodes that may be drawn, in the order they were collected."""
        return episodes_for_contexts(self.store, self.task, self.config, self.seed, self.selected_by)

    @property
    def time(self) -> int:
        """Steps of the longest context that can be drawn; shorter ones are padded to it."""
        return self.config.trajectories * int(self.store.lengths[self.eligible].max())

    @property
    def steps_per_batch(self) -> int:
        """Timesteps in a batch, padding included."""
        return self.batch_size * self.time

    def batch(self, step: int) -> Context:
        """The batch of contexts of an optimiser step in the order of time, every array (batch_size, time, ...)."""
        return self.read(self.plan(step), slice(None), np.arange(self.time))

    def plan(self, step: int) -> ContextPlan:
        """What the batch of an optimiser step consists of."""
        streams = ([self.seed, 0 if self.config.sampling == "fixed" else step, i] for i in range(self.batch_size))
        tasks, drawn = zip(*(self._draw(np.random.default_rng(stream)) for stream in streams), strict=True)
        episodes = np.stack(drawn)
        returns = np.stack([self._returns[task][chosen] for task, chosen in zip(tasks, drawn, strict=True)])
        targets = self._targets(returns)
        starts = np.zeros((len(episodes), self.config.trajectories + 1), np.int64)
        np.cumsum(self.store.lengths[episodes], axis=1, out=starts[:, 1:])
        return ContextPlan(np.array(tasks), episodes, targets, returns >= targets, starts)

    def _targets(self, returns: Float64[np.ndarray, "batch trajectories"]) -> Float64[np.ndarray, "batch trajectories"]:
        """The return asked of each trajectory; nan: none."""
        if self.config.target == "none":
            return np.full_like(returns, np.nan)
        return returns if self.config.target == "own" else np.broadcast_to(returns.max(1, keepdims=True), returns.shape)

    def read(self, plan: ContextPlan, rows: slice, times: Int[np.ndarray, " time"]) -> Context:
        """The given contexts of a planned batch, at the given times in the given order (len(rows), len(times), ...).

        Only what these need is read from the store. Times beyond a context's last step are padding.
        """
        part = ContextPlan(*(column[rows] for column in plan))
        return read_contexts(self.store, self.normalisation, part, times)

    @cached_property
    def _returns(self) -> dict[str, Float64[np.ndarray, " episodes"]]:
        return {task: self.store.returns(task).astype(np.float64) for task in self.tasks}

    @cached_property
    def _weights(self) -> dict[str, Float64[np.ndarray, " episodes"] | None]:
        return {task: self._weights_of(task) for task in self.tasks}

    def _weights_of(self, task: str) -> Float64[np.ndarray, " episodes"] | None:
        """How likely each eligible episode is drawn for a task; None: all alike."""
        if self.config.sampling != "return_stratified":
            return None
        returns = self._returns[task][self.eligible]
        edges = np.linspace(returns.min(), returns.max(), RETURN_RANGES + 1)[1:-1]
        ranges = np.digitize(returns, edges)
        weights = 1 / np.bincount(ranges, minlength=RETURN_RANGES)[ranges]
        return weights / weights.sum()

    def _draw(self, random: np.random.Generator) -> tuple[str, Episodes]:
        """The task of one context and its episodes, in order."""
        task = self.tasks[random.integers(len(self.tasks))] if self.config.other_tasks else self.task
        return task, self._draw_episodes(task, random)

    def _draw_episodes(self, task: str, random: np.random.Generator) -> Episodes:
        count = self.config.trajectories
        if self.config.sampling == "history_window":
            first = random.integers(len(self.eligible) - count + 1)
            chosen = random.permutation(self.eligible[first : first + count])
        else:
            chosen = random.choice(self.eligible, count, replace=False, p=self._weights[task])
        if self.config.order == "random":
            return chosen
        if self.config.order == "history":
            return np.sort(chosen)
        ascending = chosen[np.argsort(self._returns[task][chosen], kind="stable")]
        return ascending if self.config.order == "ascending" else ascending[::-1]
