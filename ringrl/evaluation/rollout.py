"""Rollouts: n episodes, one after another, in one growing context.

A batch of environments runs in lockstep. On an accelerator the batch is split into two groups that take turns: the
actions of one group are computed on the accelerator while the other group is simulated on the host.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np
from jaxtyping import Float32, Float64, Int64

from ringrl.context import Context, Outcome
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.errors import UserError
from ringrl.evaluation.actors import Actor

Seeds = Int64[np.ndarray, "streams episodes"]


@dataclasses.dataclass(frozen=True)
class EpisodeBatch:
    """One episode in each of B streams, step by step. A stream that has failed contains NaN from then on."""

    observation: Float32[np.ndarray, "time_plus_1 streams observation"]  # action t is chosen in row t
    action: Float32[np.ndarray, "time streams action"]
    reward: Float64[np.ndarray, "time streams"]
    physics: Float64[np.ndarray, "time_plus_1 streams physics"]  # no columns if the environment reports no physics
    seconds: float  # wall time, including the time spent waiting for the policy

    @property
    def returns(self) -> Float64[np.ndarray, " streams"]:
        """Return the undiscounted returns, NaN for streams that have failed."""
        return np.add.accumulate(self.reward, axis=0)[-1]

    @property
    def steps(self) -> Int64[np.ndarray, " streams"]:
        """Return the number of steps before each stream failed, or all steps."""
        return np.isfinite(self.reward).sum(axis=0)


ARRAYS = ("observation", "action", "reward", "physics")


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
    recorded: Sequence[EpisodeBatch] = (),
    on_step: Callable[[int], None] = lambda streams: None,
    on_episode: Callable[[EpisodeBatch], None] = lambda episode: None,
) -> Float64[np.ndarray, "streams episodes"]:
    """Roll out in-context episodes and return their returns, NaN for episodes that failed.

    The return-to-go of every episode starts at `target_return` (chain of hindsight) and falls by the rewards earned.
    The completion token is 1 on the last step of an episode whose return reached the target.

    An observation or reward that is not finite ends its stream: that episode and all later episodes of the stream have
    no return. From then on the actor receives zeros for the stream. The other streams are unaffected.

    Args:
      groups: groups that take turns step by step. The episodes do not depend on the grouping.
      normalisation: statistics of the policy's training data.
      seeds: seed of the start of each episode; streams in the order of the groups.
      target_return: in units of the task's return. None: return-to-go and completion are zero.
      trajectories: trajectories per training context. Trajectory indices of the episodes are clipped below this number.
      prompt: context (1, T, ...) in the memory of all environments before the first step.
      recorded: first episodes of an interrupted rollout. They are replayed to the actor and not simulated again.
      on_step: called with the number of environments after every simulated step of a group.
      on_episode: called with each finished episode, recorded episodes included.

    Raises:
      UserError: the episodes have another length than the data's, or the recorded episodes start in other states.
    """
    builder = ContextBuilder(normalisation, target_return, trajectories, prompt)
    ends = np.cumsum([0, *(group.environments.num_envs for group in groups)]).tolist()
    players = [
        _Player(group, builder, slice(*part), seeds[slice(*part)], on_step)
        for group, part in zip(groups, pairwise(ends), strict=True)
    ]
    episodes = seeds.shape[1]
    acts = len(recorded) < episodes  # otherwise no actor needs its memory
    for player in players if acts else ():
        player.start(episodes)
    returns = []
    for index in range(episodes):
        episode = recorded[index] if index < len(recorded) else None
        if episode is not None and not acts:
            for player in players:
                player.reset(index, episode)
        else:
            began = time.perf_counter()
            for _ in zip(*(player.play(index, episode) for player in players), strict=True):
                pass  # zip resumes the players in turn
            if episode is None:
                arrays = {name: np.concatenate([player.arrays[name] for player in players], axis=1) for name in ARRAYS}
                episode = EpisodeBatch(**arrays, seconds=time.perf_counter() - began)
        returns.append(episode.returns)
        on_episode(episode)
    return np.stack(returns, axis=1)


class _Player:
    """Plays the episodes of one group, whose `streams` are a part of all streams."""

    arrays: dict[str, np.ndarray]  # of the last episode (see `EpisodeBatch`)

    def __init__(
        self, group: Group, builder: "ContextBuilder", streams: slice, seeds: Seeds, on_step: Callable[[int], None]
    ) -> None:
        self._actor, self._environments = group
        self._builder, self._streams, self._seeds, self._on_step = builder, streams, seeds, on_step
        self._size = self._environments.num_envs
        self._failed = np.zeros(self._size, bool)
        self._length = builder.normalisation.episode_length

    def start(self, episodes: int) -> None:
        """Clear the actor's memory except for the prompt."""
        self._actor.start(self._size, episodes * self._length, self._builder.prompt)
        (action_size,) = self._environments.single_action_space.shape or (0,)
        self._previous = self._builder.first_outcome(self._size, action_size)

    def reset(self, index: int, recorded: EpisodeBatch | None) -> tuple[np.ndarray, np.ndarray]:
        """Start the next episode of each environment and return observations (B, O) and physics (B, P).

        Raises:
          UserError: the recorded episode starts in another state.
        """
        observation, info = self._environments.reset(seed=self._seeds[:, index].tolist())
        self._failed = self._failed | ~np.isfinite(observation).all(axis=1)
        observation, physics = self._with_failures(observation, info)
        if recorded is not None:
            expected = recorded.observation[0, self._streams]
            same = (observation == expected).all(axis=1) | np.isnan(expected).any(axis=1) | self._failed
            if not same.all():
                raise UserError(
                    f"episode {index + 1}: the recorded episode starts in another state; "
                    "remove the journal of this evaluation"
                )
        return observation, physics

    def play(self, index: int, recorded: EpisodeBatch | None) -> Iterator[None]:
        """Play one episode. Yields after each action is requested and before its value is needed."""
        builder, streams = self._builder, self._streams
        observation, physics = self.reset(index, recorded)
        played: dict[str, list[np.ndarray]] = {"observation": [observation], "action": [], "reward": []}
        played["physics"] = [physics]
        earned = np.zeros(self._size)
        for timestep in range(self._length):
            step = builder.step(index, timestep, observation, earned, self._previous, first=index * self._length)
            pending = self._actor.act(step)
            yield
            if recorded is None:
                action, reward, observation, physics = self._simulate(np.asarray(pending), timestep)
            else:
                action, reward = recorded.action[timestep, streams], recorded.reward[timestep, streams]
                observation, physics = (x[timestep + 1, streams] for x in (recorded.observation, recorded.physics))
                self._failed = np.isnan(reward)
            for name, value in zip(ARRAYS, (observation, action, reward, physics), strict=True):
                played[name].append(value)
            action, reward = (np.nan_to_num(x, nan=0.0) for x in (action, reward))
            earned = earned + reward
            self._previous = builder.outcome(action, reward, earned, is_last=timestep == self._length - 1)
            self._actor.observe(step._replace(**self._previous._asdict()))
        self.arrays = {name: np.stack(values) for name, values in played.items()}

    def _simulate(self, action: np.ndarray, timestep: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return action, reward, next observation and physics of a step, NaN in streams that have failed."""
        action = np.where(self._failed[:, None], np.float32(0), action)
        observation, reward, _, truncated, info = self._environments.step(action)
        if truncated.any() != (timestep == self._length - 1):
            ends = "end" if truncated.any() else "do not end"
            raise UserError(
                f"environment: episodes {ends} after {timestep + 1} steps, episodes of the data end after "
                f"{self._length}; train on data of whole episodes"
            )
        action = np.where(self._failed[:, None], np.float32(np.nan), action)
        self._failed = self._failed | ~(np.isfinite(observation).all(axis=1) & np.isfinite(reward))
        observation, physics = self._with_failures(observation, info)
        self._on_step(self._size)
        return action, np.where(self._failed, np.nan, reward), observation, physics

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
        episode: int,
        timestep: int,
        observation: np.ndarray,
        earned: np.ndarray,
        previous: Outcome,
        *,
        first: int,
    ) -> Context:
        """Return one timestep (B, 1, ...) whose action, reward and completion are still zero.

        Args:
          episode: index of the live episode.
          timestep: within the episode.
          observation: (B, observation); NaN becomes zero.
          earned: (B,) rewards of this episode so far.
          previous: outcome of the step before.
          first: steps of all earlier live episodes.
        """
        steps, trajectories = 0, 0
        if self.prompt is not None:
            steps, trajectories = (int(x[0, -1]) + 1 for x in (self.prompt.position, self.prompt.trajectory))
        start = steps + first
        index = trajectories + episode
        index = index if self.trajectories is None else min(index, self.trajectories - 1)
        constant = partial(np.full, (len(observation), 1))
        left = np.zeros_like(earned) if self.target_return is None else self.target_return - earned
        unknown = jax.tree.map(np.zeros_like, previous)
        return Context(
            observation=np.nan_to_num(self.normalisation.observation(observation), nan=0.0)[:, None],
            return_to_go=self.normalisation.return_to_go(left)[:, None],
            timestep=constant(timestep, dtype=np.int32),
            trajectory=constant(index, dtype=np.int32),
            position=constant(start + timestep, dtype=np.int32),
            start=constant(start, dtype=np.int32),
            weight=constant(1, dtype=np.float32),
            previous=previous,
            **unknown._asdict(),
        )

    def outcome(self, action: np.ndarray, reward: np.ndarray, earned: np.ndarray, is_last: bool) -> Outcome:
        """Return the outcome of a step: action (B, action), reward (B,), rewards of the episode up to it (B,)."""
        reached = np.zeros(len(earned), bool)
        if is_last and self.target_return is not None:
            reached = earned >= self.target_return
        scaled = self.normalisation.reward(reward[:, None].astype(np.float32))
        return Outcome(action[:, None], scaled, reached[:, None].astype(np.float32))
