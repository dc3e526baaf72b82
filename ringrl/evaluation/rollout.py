"""Rollouts: n episodes, one after another, in one growing context.

A batch of environments runs in lockstep. On an accelerator the batch is split into two groups that take turns: the
actions of one group are computed on the accelerator while the other group is simulated on the host.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from ringrl.context import Context, Outcome
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.errors import UserError
from ringrl.evaluation.actors import Actor

FIRST_ROWS = 1024  # of the arrays of an episode that is being played
Seeds = Int64[np.ndarray, "streams episodes"]


@dataclasses.dataclass(frozen=True)
class EpisodeBatch:
    """One episode in each of B streams, step by step. A stream that has failed contains NaN from then on.

    The arrays are as long as the longest of the episodes. After the end of a shorter one, rewards are 0.
    """

    observation: Float32[np.ndarray, "time_plus_1 streams observation"]  # action t is chosen in row t
    action: Float32[np.ndarray, "time streams action"]
    reward: Float64[np.ndarray, "time streams"]
    physics: Float64[np.ndarray, "time_plus_1 streams physics"]  # no columns if the environment reports no physics
    length: Int64[np.ndarray, " streams"]  # steps of each episode
    terminated: Bool[np.ndarray, " streams"]  # the others were truncated
    seconds: float  # wall time since the episode before, including the time spent waiting for the policy

    @property
    def returns(self) -> Float64[np.ndarray, " streams"]:
        """Return the undiscounted returns, NaN for streams that have failed."""
        return np.add.accumulate(self.reward, axis=0)[-1]

    @property
    def steps(self) -> Int64[np.ndarray, " streams"]:
        """Return the number of steps before each stream failed, or all steps."""
        return (np.isfinite(self.reward) & (np.arange(len(self.reward))[:, None] < self.length)).sum(axis=0)

    def without_states(self) -> "EpisodeBatch":
        """Return the same episodes without observations, actions and physics, which take most of the memory."""
        large = ("observation", "action", "physics")
        return dataclasses.replace(self, **{name: getattr(self, name)[:0].copy() for name in large})


class Group(NamedTuple):
    """Environments that step in lockstep, and the actor that acts in them."""

    actor: Actor
    environments: gymnasium.vector.VectorEnv


def rollout(
    groups: Sequence[Group],
    normalisation: Normalisation,
    *,
    seeds: Seeds,
    target_return: float | None,
    trajectories: int | None = None,
    prompt: Context | None = None,
    most_steps: int | None = None,
    on_step: Callable[[int], None] = lambda streams: None,
    on_episode: Callable[[EpisodeBatch], None] = lambda episode: None,
) -> Float64[np.ndarray, "streams episodes"]:
    """Roll out in-context episodes and return their returns, NaN for episodes that failed.

    The return-to-go of every episode starts at `target_return` (chain of hindsight) and falls by the rewards earned.
    The completion token is 1 on the last step of an episode whose return reached the target.

    When the episode of a stream ends, its next episode begins at once. No stream waits for another.

    An observation or reward that is not finite ends its stream: that episode and all later episodes of the stream have
    no return. From then on the actor receives zeros for the stream. The other streams are unaffected.

    Args:
      groups: groups that take turns step by step. The episodes do not depend on the grouping.
      normalisation: statistics of the policy's training data.
      seeds: seed of the start of each episode; streams in the order of the groups.
      target_return: in units of the task's return. None: return-to-go and completion are zero.
      trajectories: trajectories per training context. Trajectory indices of the episodes are clipped below this number.
      prompt: context (1, T, ...) in the memory of all environments before the first step.
      most_steps: the environments' limit, if episodes end early. None: every episode is as long as the data's.
      on_step: called with the number of environments after every simulated step of a group.
      on_episode: called with each episode when all streams have finished it.

    Raises:
      UserError: the episodes have another length than the data's.
    """
    builder = ContextBuilder(normalisation, target_return, trajectories, prompt)
    episodes = _Episodes(seeds, most_steps or normalisation.episode_length, on_episode)
    ends = np.cumsum([0, *(group.environments.num_envs for group in groups)]).tolist()
    players = [
        _Player(group, builder, slice(*part), episodes, most_steps is None, on_step)
        for group, part in zip(groups, pairwise(ends), strict=True)
    ]
    for _ in zip_longest(*(player.play() for player in players)):
        pass  # resumes the players in turn
    return np.stack(episodes.returns, axis=1)


class _Episodes:
    """The episodes of all streams that are being played. Reports each when all streams have finished it."""

    def __init__(self, seeds: Seeds, most_steps: int, on_episode: Callable[[EpisodeBatch], None]) -> None:
        self.seeds, self.most_steps = seeds, most_steps
        self.returns: list[np.ndarray] = []  # of each episode
        self._on_episode, self._began = on_episode, time.perf_counter()
        self._played: dict[int, dict[str, np.ndarray]] = {}
        self._index = np.zeros(len(seeds), np.int64)  # of the current episode of each stream

    def keep(self, streams: np.ndarray, index: np.ndarray, row: np.ndarray, **values: np.ndarray) -> None:
        """Keep rows of arrays of episodes that are being played: stream, index of the episode and row, one of each."""
        for number in set(index.tolist()):
            chosen = index == number
            for name, value in values.items():
                array = self._array(number, name, value, int(row[chosen].max()) + 1)
                array[row[chosen], streams[chosen]] = value[chosen]

    def end(self, streams: np.ndarray, length: np.ndarray, terminated: np.ndarray) -> None:
        """Note that the current episodes of some streams have ended, and report those that all have finished."""
        for stream, steps, is_terminated in zip(streams, length, terminated, strict=True):
            played = self._played[int(self._index[stream])]
            played.setdefault("length", np.zeros(len(self.seeds), np.int64))[stream] = steps
            played.setdefault("terminated", np.zeros(len(self.seeds), bool))[stream] = is_terminated
        self._index[streams] += 1
        while len(self.returns) < self._index.min():
            self._report()

    def _report(self) -> None:
        now, arrays = time.perf_counter(), self._played.pop(len(self.returns))
        longest = int(arrays["length"].max())
        for name in ("observation", "action", "reward", "physics"):
            arrays[name] = arrays[name][: longest + (name in ("observation", "physics"))]
        episode = EpisodeBatch(**arrays, seconds=now - self._began)
        self.returns.append(episode.returns)
        self._began = now
        self._on_episode(episode)

    def _array(self, number: int, name: str, like: np.ndarray, rows: int) -> np.ndarray:
        """Return an array of an episode. It grows to at least `rows`, since episodes may end long before the limit."""
        played = self._played.setdefault(number, {})
        array = played.get(name, np.zeros((0, len(self.seeds), *like.shape[1:]), like.dtype))
        if rows > len(array):
            more = np.zeros((max(FIRST_ROWS, len(array)), *array.shape[1:]), array.dtype)
            played[name] = array = np.concatenate([array, more])
        return array


class _Player:
    """Plays the episodes of one group, whose `streams` are a part of all streams."""

    def __init__(
        self,
        group: Group,
        builder: "ContextBuilder",
        streams: slice,
        episodes: _Episodes,
        is_fixed: bool,
        on_step: Callable[[int], None],
    ) -> None:
        self._actor, self._environments = group
        self._builder, self._episodes, self._on_step = builder, episodes, on_step
        self._size, self._streams = self._environments.num_envs, np.arange(streams.start, streams.stop)
        self._failed = np.zeros(self._size, bool)
        self._is_fixed = is_fixed  # whether all episodes are as long as the data's

    def play(self) -> Iterator[None]:
        """Play all episodes. Yields after each action is requested and before its value is needed."""
        builder, total = self._builder, self._episodes.seeds.shape[1]
        self._actor.start(self._size, total * self._episodes.most_steps, builder.prompt)
        (action_size,) = self._environments.single_action_space.shape or (0,)
        previous = builder.first_outcome(self._size, action_size)
        index, timestep, first = (np.zeros(self._size, np.int64) for _ in range(3))
        earned, playing = np.zeros(self._size), np.ones(self._size, bool)
        observation, physics = self._reset(playing, index)
        while playing.any():
            step = builder.step(np.minimum(index, total - 1), timestep, observation, earned, previous, first=first)
            pending = self._actor.act(step)
            yield
            action, reward, observation, physics, terminated, ended = self._simulate(
                np.asarray(pending), timestep, playing
            )
            rows = np.flatnonzero(playing)
            where = self._streams[rows], index[rows]
            self._episodes.keep(*where, timestep[rows], action=action[rows], reward=reward[rows])
            self._episodes.keep(*where, timestep[rows] + 1, observation=observation[rows], physics=physics[rows])
            action, reward = (np.nan_to_num(x, nan=0.0) for x in (action, reward))
            earned = earned + reward
            previous = builder.outcome(action, reward, earned, ended)
            self._actor.observe(step._replace(**previous._asdict()))
            timestep = timestep + playing
            ended &= playing
            if ended.any():
                self._episodes.end(self._streams[ended], timestep[ended], terminated[ended])
                index[ended] += 1
                playing = index < total
                starts = ended & playing
                first[starts] += timestep[starts]
                timestep[starts], earned[starts] = 0, 0.0
                if starts.any():
                    fresh = self._reset(starts, index)
                    observation, physics = (
                        np.where(starts[:, None], new, old)
                        for new, old in zip(fresh, (observation, physics), strict=True)
                    )

    def _reset(self, chosen: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start the next episode of the chosen environments. Returns observations (B, O) and physics (B, P)."""
        seeds: list[int | None] = [None] * self._size
        for row in np.flatnonzero(chosen):
            seeds[row] = int(self._episodes.seeds[self._streams[row], index[row]])
        options = None if chosen.all() else {"reset_mask": chosen}
        observation, info = self._environments.reset(seed=seeds, options=options)  # type: ignore[arg-type]
        self._failed = self._failed | (chosen & ~np.isfinite(observation).all(axis=1))
        observation, physics = self._with_failures(observation, info)
        rows = np.flatnonzero(chosen)
        self._episodes.keep(
            self._streams[rows],
            index[rows],
            np.zeros_like(rows),
            observation=observation[rows],
            physics=physics[rows],
        )
        return observation, physics

    def _simulate(self, action: np.ndarray, timestep: np.ndarray, playing: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return action, reward, next observation, physics, and whether the episodes terminated and ended.

        The values of streams that have failed are NaN.
        """
        action = np.where(self._failed[:, None], np.float32(0), action)
        observation, reward, terminated, truncated, info = self._environments.step(action)
        ended = terminated | truncated
        if self._is_fixed and (ended != (timestep == self._episodes.most_steps - 1))[playing].any():
            ends = "end" if ended.any() else "do not end"
            raise UserError(
                f"environment: episodes {ends} after {timestep[playing].max() + 1} steps, episodes of the data end "
                f"after {self._episodes.most_steps}; train on data of whole episodes"
            )
        action = np.where(self._failed[:, None], np.float32(np.nan), action)
        self._failed = self._failed | (playing & ~(np.isfinite(observation).all(axis=1) & np.isfinite(reward)))
        observation, physics = self._with_failures(observation, info)
        self._on_step(int(playing.sum()))
        return action, np.where(self._failed, np.nan, reward), observation, physics, terminated, ended

    def _with_failures(self, observation: np.ndarray, info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return observation and physics, NaN in streams that have failed."""
        physics = info.get("physics", np.zeros((self._size, 0)))
        failed = self._failed[:, None]
        return np.where(failed, np.float32(np.nan), observation), np.where(failed, np.nan, physics)


@dataclasses.dataclass(frozen=True)
class ContextBuilder:
    """Builds the policy's input at each step of a rollout, in the units and positions of its training contexts."""

    normalisation: Normalisation  # statistics of the policy's training data
    target_return: float | None  # at the start of every episode. None: return-to-go and completion are always zero
    trajectories: int | None = None  # trajectory indices are clipped below this number
    prompt: Context | None = None  # (1, T, ...) before the first step. Positions continue after its last step

    def first_outcome(self, streams: int, action_size: int) -> Outcome:
        """Return the outcome before the first step: the last one of the prompt, or zeros."""
        if self.prompt is None:
            zeros = np.zeros((streams, 1), np.float32)
            return Outcome(np.zeros((streams, 1, action_size), np.float32), zeros, zeros)
        last = Outcome(*(np.asarray(getattr(self.prompt, name))[:, -1:] for name in Outcome._fields))
        return Outcome(*(np.repeat(x, streams, axis=0) for x in last))

    def step(
        self,
        episode: np.ndarray,
        timestep: np.ndarray,
        observation: np.ndarray,
        earned: np.ndarray,
        previous: Outcome,
        *,
        first: np.ndarray,
    ) -> Context:
        """Return one timestep (B, 1, ...) whose action, reward and completion are still zero.

        Args:
          episode: (B,) index of the live episode.
          timestep: (B,) within the episode.
          observation: (B, observation); NaN becomes zero.
          earned: (B,) rewards of this episode so far.
          previous: outcome of the step before.
          first: (B,) steps of all earlier live episodes.
        """
        steps, trajectories = 0, 0
        if self.prompt is not None:
            steps, trajectories = (int(x[0, -1]) + 1 for x in (self.prompt.position, self.prompt.trajectory))
        start = steps + first
        index = trajectories + episode
        index = index if self.trajectories is None else np.minimum(index, self.trajectories - 1)
        left = np.zeros_like(earned) if self.target_return is None else self.target_return - earned
        unknown = jax.tree.map(np.zeros_like, previous)
        return Context(
            observation=np.nan_to_num(self.normalisation.observation(observation), nan=0.0)[:, None],
            return_to_go=self.normalisation.return_to_go(left)[:, None],
            timestep=timestep[:, None].astype(np.int32),
            trajectory=index[:, None].astype(np.int32),
            position=(start + timestep)[:, None].astype(np.int32),
            start=start[:, None].astype(np.int32),
            weight=np.ones((len(observation), 1), np.float32),
            previous=previous,
            **unknown._asdict(),
        )

    def outcome(self, action: np.ndarray, reward: np.ndarray, earned: np.ndarray, is_last: np.ndarray) -> Outcome:
        """Return the outcome of a step: action (B, action), reward (B,), rewards of the episode up to it (B,).

        `is_last` (B,) marks the last step of an episode.
        """
        reached = np.zeros(len(earned), bool)
        if self.target_return is not None:
            reached = is_last & (earned >= self.target_return)
        scaled = self.normalisation.reward(reward[:, None].astype(np.float32))
        return Outcome(action[:, None], scaled, reached[:, None].astype(np.float32))
