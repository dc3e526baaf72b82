"""Contexts for training: n trajectories of a store, ordered, relabelled to a target, as one long sequence.

The batch of a step is a pure function of (seed, step), so a resumed run and every host see the same batches. A batch is
drawn first (which trajectories, in which order, with which target return), which is cheap and done on every host.
Then any part of it can be read.
"""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from ringrl.config import ContextConfig
from ringrl.context import Context, Outcome
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.store.format import reward_key
from ringrl.data.store.reader import EpisodeStore
from ringrl.errors import UserError
from ringrl.processes import available_cores

Episodes = Int[np.ndarray, " episodes"]

RETURN_RANGES = 10  # of `return_stratified`
SUBSET = 1  # the random stream of `eligible_episodes` under a seed
NONE: Episodes = np.empty(0, np.int64)


def eligible_episodes(
    store: EpisodeStore,
    task: str,
    seed: int,
    max_transitions: int | None = None,
    best_fraction: float = 1.0,
    excluded: Episodes = NONE,
) -> Episodes:
    """Return the best fraction, by the returns of a task, of episodes of at most `max_transitions` steps together.

    Whole episodes are taken in seed-shuffled order, so a smaller cap gives a subset of a larger one. The result is in
    the order of collection. UserError for a cap below the longest episode, or a task without rewards.
    """
    longest = int(store.lengths.max())
    if max_transitions is not None and max_transitions < longest:
        raise UserError(
            f"context.max_transitions: {max_transitions} is less than one episode of {store.path} ({longest} steps); "
            "raise it"
        )
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SUBSET,))).permutation(store.num_episodes)
    order = order[~np.isin(order, excluded)]
    if max_transitions is not None:
        order = order[: np.searchsorted(np.cumsum(store.lengths[order]), max_transitions, side="right")]
    episodes = np.sort(order)
    returns = store.returns(task)[episodes]
    count = max(1, round(best_fraction * len(episodes)))
    return episodes[np.sort(np.argsort(returns, kind="stable")[len(returns) - count :])]


def eligible_by_task(
    store: EpisodeStore, task: str, config: ContextConfig, seed: int, excluded: Episodes = NONE
) -> dict[str, Episodes]:
    """Return the `eligible_episodes` of each task of a run, with the same errors."""
    limits = seed, config.max_transitions, config.best_fraction, excluded
    return {name: eligible_episodes(store, name, *limits) for name in (task, *config.other_tasks)}


def episodes_for_contexts(
    store: EpisodeStore, task: str, config: ContextConfig, seed: int, excluded: Episodes = NONE
) -> dict[str, Episodes]:
    """Return `eligible_by_task`. UserError if a context needs more episodes than a task has, or longer segments."""
    found = eligible_by_task(store, task, config, seed, excluded)
    for episodes in found.values():
        count, longest = len(episodes), int(store.lengths[episodes].max())
        if config.trajectories > count:
            raise UserError(
                f"context.trajectories: {config.trajectories} are more than the {count} eligible episodes of "
                f"{store.path}; lower it, or raise context.best_fraction or context.max_transitions where they are set"
            )
        if config.sampling == "history_window" and config.window > count:
            raise UserError(
                f"context.history_stride: {config.trajectories} episodes at a stride of {config.history_stride} span "
                f"{config.window} episodes, and {store.path} has {count}; lower the stride or context.trajectories"
            )
        if (config.segment_steps or 0) > longest:
            raise UserError(
                f"context.segment_steps: {config.segment_steps} is longer than the longest eligible episode of "
                f"{store.path} ({longest} steps); lower it"
            )
    return found


class ContextDraw(NamedTuple):
    """The trajectories of a batch of contexts: small, and the same on every host."""

    tasks: np.ndarray  # names of tasks: of each context (batch,) or trajectory (batch, trajectories)
    episodes: Int64[np.ndarray, "batch trajectories"]  # indices in the store, in the order of the context
    targets: Float64[np.ndarray, "batch trajectories"]  # return-to-go at the start of each episode; nan if all are zero
    completes: Bool[np.ndarray, "batch trajectories"]  # whether the return of each episode reaches its target
    starts: Int64[np.ndarray, "batch trajectories_plus_1"]  # time of the first step of each, and of the padding
    first_timesteps: Int64[np.ndarray, "batch trajectories"]  # of each trajectory, within its episode


@dataclasses.dataclass(frozen=True)
class ContextSampler:
    """Draws batches of contexts from a store.

    Each context holds `config.trajectories` distinct trajectories (2305.16554, section 3), sorted ascending by return.
    Every return-to-go starts from the best trajectory's return, R_t = R_0 - sum of rewards so far. The completion token
    is 1 on the last step of a trajectory that reaches the target.

    A context belongs to one task and holds eligible episodes of that task. With `config.segment_steps`, its
    trajectories are segments of episodes; a shorter episode is taken whole. `excluded` episodes are never drawn.

    Raises UserError for a task without rewards, or too few or too short episodes.
    """

    store: EpisodeStore
    task: str
    config: ContextConfig
    normalisation: Normalisation
    batch_size: int
    seed: int
    excluded: Episodes = dataclasses.field(default_factory=NONE.copy)

    def __post_init__(self) -> None:
        self.eligible  # noqa: B018  raises UserError if contexts cannot be drawn

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that contexts are drawn for."""
        return (self.task, *self.config.other_tasks)

    @cached_property
    def eligible(self) -> dict[str, Episodes]:
        """Episodes that may be drawn for each task, in the order of collection."""
        return episodes_for_contexts(self.store, self.task, self.config, self.seed, self.excluded)

    @property
    def time(self) -> int:
        """Steps of the longest possible context. Shorter contexts are padded to it."""
        longest = max(int(self.store.lengths[episodes].max()) for episodes in self.eligible.values())
        return self.config.steps(longest)

    def batch(self, step: int) -> Context:
        """Return the batch of an optimiser step in the order of time, every array (batch_size, time, ...)."""
        return self.read(self.draw(step), slice(None), np.arange(self.time))

    def draw(self, step: int) -> ContextDraw:
        """Return the trajectories of the batch of an optimiser step."""
        streams = ([self.seed, 0 if self.config.sampling == "fixed" else step, i] for i in range(self.batch_size))
        tasks, drawn, first = zip(*(self._draw_one(np.random.default_rng(stream)) for stream in streams), strict=True)
        episodes = np.stack(drawn)
        returns = np.stack([self._returns[task][chosen] for task, chosen in zip(tasks, drawn, strict=True)])
        best = np.broadcast_to(returns.max(1, keepdims=True), returns.shape)
        targets = {"none": np.full_like(returns, np.nan), "own": returns, "best": best}[self.config.target]
        starts = np.zeros((len(episodes), self.config.trajectories + 1), np.int64)
        np.cumsum(self._lengths(episodes), axis=1, out=starts[:, 1:])
        return ContextDraw(np.array(tasks), episodes, targets, returns >= targets, starts, np.stack(first))

    def read(self, draw: ContextDraw, rows: slice, times: Int[np.ndarray, " time"]) -> Context:
        """Return the given contexts of a draw at the given ascending times. Times after the last step are padding.

        Every number is the same in whatever rectangle it is read. ValueError for times that do not ascend from 0.
        """
        if len(times) and (times[0] < 0 or (np.diff(times) < 1).any()):
            raise ValueError(f"times: expected ascending times, none below 0, got {times}")
        part = ContextDraw(*(column[rows] for column in draw))
        out = _blank(len(part.episodes), len(times), self.store.observation_size, self.store.action_size)
        out.position[:] = times
        bounds, threads = np.searchsorted(times, part.starts), available_cores()
        found = np.argwhere(np.diff(bounds, axis=1)).tolist()

        def fill_in(chosen: list[list[int]]) -> None:
            for context, trajectory in chosen:
                places = slice(*bounds[context, trajectory : trajectory + 2].tolist())
                self._fill_in(out, part, context, trajectory, places)

        with ThreadPoolExecutor(threads) as pool:  # NumPy lets other threads run while it copies and computes
            list(pool.map(fill_in, (found[i::threads] for i in range(threads))))
        return out

    def _fill_in(self, out: Context, draw: ContextDraw, context: int, trajectory: int, places: slice) -> None:
        """Write the steps of a trajectory to their places on the time axis."""
        config, normalisation, arrays = self.config, self.normalisation, self.store.arrays
        rewards, first, last = self._recorded(draw, context, trajectory)
        start, begin = draw.starts[context, trajectory].item(), draw.first_timesteps[context, trajectory].item()
        at, timestep = (context, places), out.position[context, places] - (start - begin)
        # A row of the store holds a state and the outcome of the step before: a step's own outcome is one row later.
        state, outcome = _rows(first + timestep), _rows(first + timestep + 1)
        normalisation.observation(arrays["observation"][state], out=np.asarray(out.observation)[at])
        out.action[at], out.previous.action[at] = arrays["action"][outcome], arrays["action"][state]
        out.reward[at], out.previous.reward[at] = (normalisation.reward(rewards[rows]) for rows in (outcome, state))
        out.timestep[at], out.trajectory[at], out.start[at], out.weight[at] = timestep, trajectory, start, 1
        out.weight[at][timestep < begin + config.first_steps] = config.first_steps_weight
        if timestep[-1] == last - first - 1:
            out.completion[context, places.stop - 1] = draw.completes[context, trajectory]
        if not math.isnan(target := draw.targets[context, trajectory]):
            earned = np.zeros(timestep[-1] + 1)  # before each step
            np.cumsum(rewards[first + 1 : first + len(earned)], out=earned[1:])
            out.return_to_go[at] = normalisation.return_to_go(target - earned[timestep])
        if timestep[0] == begin:
            # The first step follows the previous trajectory's last outcome. Segments do not follow each other in time.
            previous, place = out.previous, (context, places.start)
            previous.action[place], previous.reward[place] = 0, 0
            if trajectory and config.segment_steps is None:
                rewards, _, last = self._recorded(draw, context, trajectory - 1)
                previous.action[place] = arrays["action"][last]
                previous.reward[place] = normalisation.reward(rewards[last])
                previous.completion[place] = draw.completes[context, trajectory - 1]

    def _recorded(self, draw: ContextDraw, context: int, trajectory: int) -> tuple[np.ndarray, int, int]:
        """Return the store's rewards for a trajectory's task, and the first and last row of its episode."""
        task = draw.tasks[context] if draw.tasks.ndim == 1 else draw.tasks[context, trajectory]
        first, past = self.store.offsets[draw.episodes[context, trajectory] :][:2].tolist()
        return self.store.arrays[reward_key(task)], first, past - 1

    @cached_property
    def _returns(self) -> dict[str, Float64[np.ndarray, " episodes"]]:
        return {task: self.store.returns(task).astype(np.float64) for task in self.tasks}

    @cached_property
    def _weights(self) -> dict[str, Float64[np.ndarray, " episodes"] | None]:
        """Return the probability of each eligible episode, for every task; None if it is uniform."""
        if self.config.sampling != "return_stratified":
            return dict.fromkeys(self.tasks)
        weights: dict[str, np.ndarray | None] = {}
        for task in self.tasks:
            returns = self._returns[task][self.eligible[task]]
            edges = np.linspace(returns.min(), returns.max(), RETURN_RANGES + 1)[1:-1]
            ranges = np.digitize(returns, edges)
            rarity = 1 / np.bincount(ranges, minlength=RETURN_RANGES)[ranges]
            weights[task] = rarity / rarity.sum()
        return weights

    def _lengths(self, episodes: Int64[np.ndarray, "*batch"]) -> Int64[np.ndarray, "*batch"]:
        """Return the steps of the trajectories drawn from episodes."""
        lengths = self.store.lengths[episodes]
        return lengths if self.config.segment_steps is None else np.minimum(lengths, self.config.segment_steps)

    def _draw_one(self, random: np.random.Generator) -> tuple[str, Episodes, Int64[np.ndarray, " trajectories"]]:
        """Return the task of one context, its episodes in order, and the first timestep of each trajectory."""
        task = self.tasks[random.integers(len(self.tasks))] if self.config.other_tasks else self.task
        count, eligible = self.config.trajectories, self.eligible[task]
        if self.config.sampling == "history_window":
            first = random.integers(len(eligible) - self.config.window + 1)
            chosen = random.permutation(eligible[first : first + self.config.window : self.config.history_stride])
        else:
            chosen = random.choice(eligible, count, replace=False, p=self._weights[task])
        if self.config.order == "history":
            chosen = np.sort(chosen)
        elif self.config.order != "random":
            ascending = chosen[np.argsort(self._returns[task][chosen], kind="stable")]
            chosen = ascending if self.config.order == "ascending" else ascending[::-1]
        if self.config.segment_steps is None:
            return task, chosen, np.zeros(count, np.int64)
        anywhere = random.integers(self.store.lengths[chosen] - self._lengths(chosen) + 1)
        return task, chosen, np.where(random.random(count) < self.config.segment_start_share, 0, anywhere)


def _rows(index: Int[np.ndarray, " steps"]) -> slice | Int[np.ndarray, " steps"]:
    """Return ascending rows, as a slice if they are consecutive, which is copied several times as fast."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == len(index) - 1 else index


def _blank(batch: int, time: int, observation_size: int, action_size: int) -> Context:
    """Return a context of padding."""
    sizes = {"observation": (observation_size,), "action": (action_size,)}
    whole = ("timestep", "trajectory", "position", "start")

    def zeros(name: str) -> np.ndarray:
        return np.zeros((batch, time, *sizes.get(name, ())), np.int32 if name in whole else np.float32)

    previous = Outcome(*map(zeros, Outcome._fields))
    return Context(**{name: zeros(name) for name in Context._fields if name != "previous"}, previous=previous)
