"""Contexts for training: n trajectories of a store, ordered, relabelled to a target, as one long sequence.

The batch of a step is a pure function of (seed, step), so a resumed run and every host see the same batches. A batch is
planned first (which trajectories, in which order, with which target return), which is cheap and done on every host.
Then any part of it can be read.
"""

import dataclasses
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int

from ringrl.config import ContextConfig
from ringrl.context import Context
from ringrl.data.sampling.contexts import ContextPlan, read_contexts
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.store.reader import EpisodeStore
from ringrl.errors import UserError

Episodes = Int[np.ndarray, " episodes"]

RETURN_RANGES = 10  # of `return_stratified`
SUBSET = 1  # the random stream of `subset` under a seed


def subset(store: EpisodeStore, seed: int, max_transitions: int | None) -> Episodes:
    """Return whole episodes of at most `max_transitions` steps together (None: all), in the order of collection.

    Episodes are taken in seed-shuffled order, so a smaller cap is a subset of a larger one.

    Raises:
      UserError: fewer transitions than the longest episode has.
    """
    if max_transitions is None:
        return np.arange(store.num_episodes)
    longest = int(store.lengths.max())
    if max_transitions < longest:
        raise UserError(
            f"context.max_transitions: {max_transitions} is less than one episode of {store.path} ({longest} steps); "
            "raise it"
        )
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SUBSET,))).permutation(store.num_episodes)
    count = np.searchsorted(np.cumsum(store.lengths[order]), max_transitions, side="right")
    return np.sort(order[:count])


def eligible_episodes(
    store: EpisodeStore, task: str, seed: int, max_transitions: int | None = None, best_fraction: float = 1.0
) -> Episodes:
    """Return the best fraction of `subset` by the returns of a task, in the order of collection.

    Raises:
      UserError: `max_transitions` below one episode, or a task that the store has no rewards for.
    """
    episodes = subset(store, seed, max_transitions)
    returns = store.returns(task)[episodes]
    count = max(1, round(best_fraction * len(episodes)))
    return episodes[np.sort(np.argsort(returns, kind="stable")[len(returns) - count :])]


def episodes_for_contexts(
    store: EpisodeStore, task: str, config: ContextConfig, seed: int, selected_by: str | None = None
) -> Episodes:
    """Return the episodes that contexts are drawn from, in the order of collection.

    Raises:
      UserError: a task that the store has no rewards for, or fewer episodes than one context holds.
    """
    for name in (task, *config.other_tasks):
        if name not in store.tasks:
            raise UserError(
                f"{store.path}: no rewards for task {name} (domain {store.domain}). Tasks: {', '.join(store.tasks)}"
            )
    found = eligible_episodes(store, selected_by or task, seed, config.max_transitions, config.best_fraction)
    if config.trajectories > len(found):
        raise UserError(
            f"context.trajectories: {config.trajectories} are more than the {len(found)} eligible episodes of "
            f"{store.path}; lower it, or raise context.best_fraction or context.max_transitions where they are set"
        )
    return found


@dataclasses.dataclass(frozen=True)
class ContextSampler:
    """Draws batches of contexts from a store.

    Each context holds `config.trajectories` distinct trajectories (2305.16554, section 3), sorted ascending by return.
    Every return-to-go starts from the best trajectory's return, R_t = R_0 - sum of rewards so far. The completion token
    is 1 on the last step of a trajectory that reaches the target.

    Attributes:
      store: the dataset.
      task: the task whose rewards are read.
      config: trajectories, order, sampling and target of a context.
      normalisation: scales observations, rewards and returns.
      batch_size: contexts in a batch.
      seed: of all draws.
      selected_by: the task whose returns `config.best_fraction` uses, by default `task`.

    Raises:
      UserError: a task without rewards, or too few episodes.
    """

    store: EpisodeStore
    task: str
    config: ContextConfig
    normalisation: Normalisation
    batch_size: int
    seed: int
    selected_by: str | None = None

    def __post_init__(self) -> None:
        self.eligible  # noqa: B018  raises UserError if contexts cannot be drawn

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that contexts are drawn for."""
        return (self.task, *self.config.other_tasks)

    @cached_property
    def eligible(self) -> Episodes:
        """Episodes that may be drawn, in the order of collection."""
        return episodes_for_contexts(self.store, self.task, self.config, self.seed, self.selected_by)

    @property
    def time(self) -> int:
        """Steps of the longest possible context. Shorter contexts are padded to it."""
        return self.config.trajectories * int(self.store.lengths[self.eligible].max())

    @property
    def steps_per_batch(self) -> int:
        """Timesteps in a batch, padding included."""
        return self.batch_size * self.time

    def batch(self, step: int) -> Context:
        """Return the batch of an optimiser step in the order of time, every array (batch_size, time, ...)."""
        return self.read(self.plan(step), slice(None), np.arange(self.time))

    def plan(self, step: int) -> ContextPlan:
        """Return the trajectories of the batch of an optimiser step."""
        streams = ([self.seed, 0 if self.config.sampling == "fixed" else step, i] for i in range(self.batch_size))
        tasks, drawn = zip(*(self._draw(np.random.default_rng(stream)) for stream in streams), strict=True)
        episodes = np.stack(drawn)
        returns = np.stack([self._returns[task][chosen] for task, chosen in zip(tasks, drawn, strict=True)])
        targets = self._targets(returns)
        starts = np.zeros((len(episodes), self.config.trajectories + 1), np.int64)
        np.cumsum(self.store.lengths[episodes], axis=1, out=starts[:, 1:])
        return ContextPlan(np.array(tasks), episodes, targets, returns >= targets, starts)

    def read(self, plan: ContextPlan, rows: slice, times: Int[np.ndarray, " time"]) -> Context:
        """Return the given contexts of a plan at the given times in the given order (len(rows), len(times), ...).

        Only the needed rows of the store are read. Times beyond a context's last step are padding.
        """
        part = ContextPlan(*(column[rows] for column in plan))
        return read_contexts(self.store, self.normalisation, part, times)

    def _targets(self, returns: Float64[np.ndarray, "batch trajectories"]) -> Float64[np.ndarray, "batch trajectories"]:
        """The target return of each trajectory, nan for none."""
        if self.config.target == "none":
            return np.full_like(returns, np.nan)
        return returns if self.config.target == "own" else np.broadcast_to(returns.max(1, keepdims=True), returns.shape)

    @cached_property
    def _returns(self) -> dict[str, Float64[np.ndarray, " episodes"]]:
        return {task: self.store.returns(task).astype(np.float64) for task in self.tasks}

    @cached_property
    def _weights(self) -> dict[str, Float64[np.ndarray, " episodes"] | None]:
        return {task: self._weights_of(task) for task in self.tasks}

    def _weights_of(self, task: str) -> Float64[np.ndarray, " episodes"] | None:
        """The probability of each eligible episode for a task. None: uniform."""
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
