"""Contexts for training: n trajectories of a store, ordered, relabelled to a target, as one long sequence.

The batch of a step is a pure function of (seed, step), so a resumed run and every host see the same batches. Every host
first plans a batch: the trajectories, their order and their target returns. Then any part of the batch can be read.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from ringrl.config import ContextConfig
from ringrl.context import Context, Outcome
from ringrl.cores import available_cores
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.store.format import reward_key
from ringrl.data.store.reader import EpisodeStore
from ringrl.errors import UserError

Episodes = Int[np.ndarray, " episodes"]

RETURN_RANGES = 10  # of `return_stratified`
SUBSET = 1  # the random stream of `subset` under a seed


def subset(store: EpisodeStore, seed: int, max_transitions: int | None) -> Episodes:
    """Return whole episodes of at most `max_transitions` steps together (None: all), in the order of collection.

    Episodes are taken in seed-shuffled order, so a smaller cap is a subset of a larger one.

    Raises UserError for fewer transitions than the longest episode has.
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

    Raises UserError for `max_transitions` below one episode, or a task that the store has no rewards for.
    """
    episodes = subset(store, seed, max_transitions)
    returns = store.returns(task)[episodes]
    count = max(1, round(best_fraction * len(episodes)))
    return episodes[np.sort(np.argsort(returns, kind="stable")[len(returns) - count :])]


def episodes_for_contexts(
    store: EpisodeStore, task: str, config: ContextConfig, seed: int, selected_by: str | None = None
) -> Episodes:
    """Return the episodes that contexts are drawn from, in the order of collection.

    Raises UserError for a task that the store has no rewards for, or fewer episodes than one context holds.
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


class ContextPlan(NamedTuple):
    """The trajectories of a batch of contexts: small, and the same on every host."""

    tasks: np.ndarray  # name of the task whose rewards are read (batch,)
    episodes: Int64[np.ndarray, "batch trajectories"]  # indices in the store, in the order of the context
    targets: Float64[np.ndarray, "batch trajectories"]  # the first return-to-go of each; NaN: all returns-to-go are 0
    completes: Bool[np.ndarray, "batch trajectories"]  # whether the return of each trajectory reaches its target
    starts: Int64[np.ndarray, "batch trajectories_plus_1"]  # time of the first step of each, and of the padding


@dataclasses.dataclass(frozen=True)
class ContextSampler:
    """Draws batches of contexts from a store.

    Each context holds `config.trajectories` distinct trajectories (2305.16554, section 3), sorted ascending by return.
    Every return-to-go starts from the best trajectory's return, R_t = R_0 - sum of rewards so far. The completion token
    is 1 on the last step of a trajectory that reaches the target.

    `selected_by` is the task whose returns `config.best_fraction` uses, by default `task`.

    Raises UserError for a task without rewards, or too few episodes.
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
        best = np.broadcast_to(returns.max(1, keepdims=True), returns.shape)
        targets = {"none": np.full_like(returns, np.nan), "own": returns, "best": best}[self.config.target]
        starts = np.zeros((len(episodes), self.config.trajectories + 1), np.int64)
        np.cumsum(self.store.lengths[episodes], axis=1, out=starts[:, 1:])
        return ContextPlan(np.array(tasks), episodes, targets, returns >= targets, starts)

    def read(self, plan: ContextPlan, rows: slice, times: Int[np.ndarray, " time"]) -> Context:
        """Return the given contexts of a plan at the given times, in this order. Times beyond a context are padding.

        Only the observations and actions of these steps and the actions before them are read. Returns-to-go also need
        the earlier rewards of each episode. A step has the same numbers, whatever else is read with it.

        Raises ValueError for a time below 0.
        """
        if len(times) and times.min() < 0:
            raise ValueError(f"times: expected no time below 0, got {times.min()}")
        plan = ContextPlan(*(column[rows] for column in plan))
        out = _blank(len(plan.episodes), len(times), self.store.observation_size, self.store.action_size)
        out.position[:] = times
        places = np.argsort(times, kind="stable")
        cuts = np.searchsorted(times[places], plan.starts)  # trajectory k of a context has places[cuts[k]:cuts[k + 1]]
        parts = np.argwhere(np.diff(cuts, axis=1) > 0).tolist()  # (context, trajectory)

        def read(context: int, trajectory: int) -> None:
            own = places[cuts[context, trajectory] : cuts[context, trajectory + 1]]
            timesteps = times[own] - plan.starts[context, trajectory]
            self._read_trajectory(plan, out, (context, trajectory), own, timesteps)

        with ThreadPoolExecutor(available_cores()) as pool:  # NumPy lets other threads run while it copies and computes
            list(pool.map(lambda part: read(*part), parts))
        return out

    @cached_property
    def _returns(self) -> dict[str, Float64[np.ndarray, " episodes"]]:
        return {task: self.store.returns(task).astype(np.float64) for task in self.tasks}

    @cached_property
    def _weights(self) -> dict[str, Float64[np.ndarray, " episodes"] | None]:
        """Return the probability of each eligible episode for every task. None: uniform."""
        if self.config.sampling != "return_stratified":
            return dict.fromkeys(self.tasks)
        weights: dict[str, np.ndarray | None] = {}
        for task in self.tasks:
            returns = self._returns[task][self.eligible]
            edges = np.linspace(returns.min(), returns.max(), RETURN_RANGES + 1)[1:-1]
            ranges = np.digitize(returns, edges)
            rarity = 1 / np.bincount(ranges, minlength=RETURN_RANGES)[ranges]
            weights[task] = rarity / rarity.sum()
        return weights

    def _draw(self, random: np.random.Generator) -> tuple[str, Episodes]:
        """Return the task of one context and its episodes, in order."""
        task = self.tasks[random.integers(len(self.tasks))] if self.config.other_tasks else self.task
        count = self.config.trajectories
        if self.config.sampling == "history_window":
            first = random.integers(len(self.eligible) - count + 1)
            chosen = random.permutation(self.eligible[first : first + count])
        else:
            chosen = random.choice(self.eligible, count, replace=False, p=self._weights[task])
        if self.config.order == "history":
            chosen = np.sort(chosen)
        elif self.config.order != "random":
            ascending = chosen[np.argsort(self._returns[task][chosen], kind="stable")]
            chosen = ascending if self.config.order == "ascending" else ascending[::-1]
        return task, chosen

    def _read_trajectory(
        self,
        plan: ContextPlan,
        out: Context,
        part: tuple[int, int],
        places: Int[np.ndarray, " steps"],
        timesteps: Int[np.ndarray, " steps"],
    ) -> None:
        """Write steps of a trajectory, ascending, to their places on the time axis. `part` is (context, trajectory)."""
        (context, trajectory), store, normalisation = part, self.store, self.normalisation
        at, row = (context, _as_slice(places)), int(store.offsets[plan.episodes[part]])
        # A row of the store holds a state and the outcome of the step before: a step's own outcome is one row later.
        state, outcome = _as_slice(row + timesteps), _as_slice(row + 1 + timesteps)
        observation, action = store.arrays["observation"], store.arrays["action"]
        reward, previous = store.arrays[reward_key(plan.tasks[context])], out.previous
        out.observation[at] = normalisation.observation(observation[state])
        out.action[at], previous.action[at] = action[outcome], action[state]
        out.reward[at], previous.reward[at] = (normalisation.reward(reward[rows]) for rows in (outcome, state))
        out.timestep[at], out.trajectory[at], out.weight[at] = timesteps, trajectory, 1
        target = plan.targets[part]
        if not np.isnan(target):
            earned = np.zeros(int(timesteps[-1]) + 1)  # before each step
            np.cumsum(reward[row + 1 : row + len(earned)], out=earned[1:])
            out.return_to_go[at] = normalisation.return_to_go(target - earned[timesteps])
            is_last = timesteps == store.lengths[plan.episodes[part]] - 1
            out.completion[context, places[is_last]] = plan.completes[part]
        if timesteps[0] > 0:
            return
        # The outcome before the first step is the last one of the trajectory before, or zero.
        first = context, places[timesteps == 0]
        if trajectory == 0:
            previous.action[first], previous.reward[first] = 0, 0
        else:
            end = int(store.offsets[plan.episodes[context, trajectory - 1] + 1])
            last = slice(end - 1, end)
            previous.action[first], previous.reward[first] = action[last], normalisation.reward(reward[last])
            previous.completion[first] = plan.completes[context, trajectory - 1]


def _as_slice(indices: Int[np.ndarray, " indices"]) -> slice | np.ndarray:
    """Return ascending, evenly spaced indices as a slice, which reads faster, and other indices unchanged."""
    stride = int(indices[1] - indices[0]) if len(indices) > 1 else 1
    is_even = stride > 0 and (indices[1:] - indices[:-1] == stride).all()  # np.diff is several times as slow
    return slice(int(indices[0]), int(indices[-1]) + 1, stride) if is_even else indices


def _blank(batch: int, time: int, observation_size: int, action_size: int) -> Context:
    """Return a context of padding."""
    sizes = {"observation": (observation_size,), "action": (action_size,)}
    whole = ("timestep", "trajectory", "position")

    def zeros(name: str) -> np.ndarray:
        return np.zeros((batch, time, *sizes.get(name, ())), np.int32 if name in whole else np.float32)

    previous = Outcome(*map(zeros, Outcome._fields))
    return Context(**{name: zeros(name) for name in Context._fields if name != "previous"}, previous=previous)
