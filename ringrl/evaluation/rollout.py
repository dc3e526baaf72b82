"""Rollouts: n episodes, one after another, in one growing context.

A batch of environments runs in lockstep. On an accelerator the batch is split into two groups that take turns: the
actions of one group are computed on the accelerator while the other group is simulated on the host.
"""

import dataclasses
import time
from collections import defaultdict, deque
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

Seeds = Int64[np.ndarray, "streams episodes"]


@dataclasses.dataclass(frozen=True)
class EpisodeBatch:
    """One episode in each of B streams, step by step. A stream that has failed contains NaN from then on.

    The arrays are as long as the longest of the episodes. After the end of a shorter one, rewards are 0.
    """

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
    The completion token is 1 on the last step of an episode whose return reached the target. When the episode of a
    stream ends, its next episode begins at once. No stream waits for another.

    An observation or reward that is not finite ends its stream: that episode and all later episodes of the stream have
    no return. From then on the actor receives zeros for the stream. The other streams are unaffected.

    Args:
      groups: groups that take turns step by step. The episodes do not depend on the grouping.
      normalisation: statistics of the policy's training data.
      seeds: seed of the start of each episode; streams in the order of the groups.
      target_return: in units of the task's return. None: return-to-go and completion are zero.
      trajectories: trajectories per training context. Trajectory indices of the episodes are clipped below this number.
      prompt: context (1, T, ...) in the memory of all environments before the first step.
      most_steps: the environments' limit, if episodes end early. None: every episode is as long as the data's, or else
        UserError.
      on_step: called with the number of environments after every simulated step of a group.
      on_episode: called with each episode when all streams have finished it.
    """
    episodes = _Episodes(seeds, most_steps or normalisation.episode_length, on_episode)
    ends = np.cumsum([0, *(group.environments.num_envs for group in groups)]).tolist()
    players = []
    for group, part in zip(groups, pairwise(ends), strict=True):
        (action_size,) = group.environments.single_action_space.shape or (0,)
        live = LiveContext(group.environments.num_envs, action_size, normalisation, target_return, trajectories, prompt)
        players.append(_Player(group, live, np.arange(*part), episodes, most_steps is None, on_step))
    for _ in zip_longest(*(player.play() for player in players)):
        pass  # resumes the players in turn
    return np.stack(episodes.returns, axis=1)


class _Episodes:
    """The episodes of all streams that are being played. Reports each when all streams have finished it."""

    def __init__(self, seeds: Seeds, most_steps: int, on_episode: Callable[[EpisodeBatch], None]) -> None:
        self.seeds, self.most_steps = seeds, most_steps
        self.returns: list[np.ndarray] = []  # of each episode
        self._on_episode, self._began = on_episode, time.perf_counter()
        self._rows = [defaultdict[str, list[np.ndarray]](list) for _ in seeds]  # of the current episode of each stream
        self._ended = [deque[tuple[np.ndarray, np.ndarray, bool]]() for _ in seeds]  # rewards, physics, terminated

    def keep(self, streams: np.ndarray, name: str, values: np.ndarray) -> None:
        """Append a row to "reward" or "physics" of the current episode of each stream."""
        for stream, value in zip(streams, values, strict=True):
            self._rows[stream][name].append(value)

    def end(self, streams: np.ndarray, terminated: np.ndarray) -> None:
        """Note that the current episodes of some streams have ended, and report those that all have finished."""
        for stream, is_terminated in zip(streams, terminated, strict=True):
            rows = self._rows[stream]
            self._ended[stream].append((np.stack(rows["reward"]), np.stack(rows["physics"]), is_terminated))
            rows.clear()
        while all(self._ended):
            self._report()

    def _report(self) -> None:
        """Report the oldest episode."""
        rewards, physics, terminated = zip(*(ended.popleft() for ended in self._ended), strict=True)
        now, length = time.perf_counter(), np.array([len(x) for x in rewards])
        episode = EpisodeBatch(_columns(rewards), _columns(physics), length, np.array(terminated), now - self._began)
        self.returns.append(episode.returns)
        self._began = now
        self._on_episode(episode)


def _columns(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays (time, ...) of streams next to each other, (longest time, streams, ...), padded with zeros."""
    found = np.zeros((max(map(len, parts)), len(parts), *parts[0].shape[1:]), parts[0].dtype)
    for stream, part in enumerate(parts):
        found[: len(part), stream] = part
    return found


class _Player:
    """Plays the episodes of one group, whose `streams` are a part of all streams."""

    def __init__(
        self,
        group: Group,
        live: "LiveContext",
        streams: np.ndarray,
        episodes: _Episodes,
        is_fixed: bool,
        on_step: Callable[[int], None],
    ) -> None:
        self._actor, self._environments = group
        self._live, self._episodes, self._on_step = live, episodes, on_step
        self._size, self._streams = len(streams), streams
        self._failed = np.zeros(self._size, bool)
        self._is_fixed = is_fixed  # whether all episodes are as long as the data's

    def play(self) -> Iterator[None]:
        """Play all episodes. Yields after each action is requested and before its value is needed."""
        live, total = self._live, self._episodes.seeds.shape[1]
        self._actor.start(self._size, total * self._episodes.most_steps, live.prompt)
        playing = np.ones(self._size, bool)
        observation = self._reset(playing)
        while playing.any():
            pending = self._actor.act(live.step(observation))
            yield
            action, reward, observation, terminated, ended = self._simulate(np.asarray(pending), playing)
            self._actor.observe(live.observe(action, reward, ended))
            ended &= playing
            if ended.any():
                self._episodes.end(self._streams[ended], terminated[ended])
                live.begin_next(ended)
                playing = live.episode < total
                if (starts := ended & playing).any():
                    observation = np.where(starts[:, None], self._reset(starts), observation)

    def _reset(self, chosen: np.ndarray) -> np.ndarray:
        """Start the next episode of the chosen environments (B,) bool. Returns observations (B, O)."""
        seeds: list[int | None] = [None] * self._size
        for row in np.flatnonzero(chosen):
            seeds[row] = int(self._episodes.seeds[self._streams[row], self._live.episode[row]])
        options = None if chosen.all() else {"reset_mask": chosen}
        observation, info = self._environments.reset(seed=seeds, options=options)  # type: ignore[arg-type]
        return self._keep_state(chosen, observation, info)

    def _simulate(self, action: np.ndarray, playing: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return action, reward, next observation, terminated and ended, with zeros as actions of failed streams."""
        action = np.where(self._failed[:, None], np.float32(0), action)
        observation, reward, terminated, truncated, info = self._environments.step(action)
        ended, timestep = terminated | truncated, self._live.timestep
        if self._is_fixed and (ended != (timestep == self._episodes.most_steps - 1))[playing].any():
            ends = "end" if ended.any() else "do not end"
            raise UserError(
                f"environment: episodes {ends} after {timestep[playing].max() + 1} steps, episodes of the data end "
                f"after {self._episodes.most_steps}; train on data of whole episodes"
            )
        self._failed = self._failed | (playing & ~np.isfinite(reward))
        observation = self._keep_state(playing, observation, info)
        self._episodes.keep(self._streams[playing], "reward", np.where(self._failed, np.nan, reward)[playing])
        self._on_step(int(playing.sum()))
        return action, np.where(playing & ~self._failed, reward, 0.0), observation, terminated, ended

    def _keep_state(self, chosen: np.ndarray, observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """Keep the physics of the chosen environments. Returns the observations, NaN in streams that have failed."""
        self._failed = self._failed | (chosen & ~np.isfinite(observation).all(axis=1))
        failed = self._failed[:, None]
        physics = np.where(failed, np.nan, info.get("physics", np.zeros((self._size, 0))))
        self._episodes.keep(self._streams[chosen], "physics", physics[chosen])
        return np.where(failed, np.float32(np.nan), observation)


class LiveContext:
    """The live episodes of a batch of streams, as the policy sees them: in the units and positions of its training."""

    def __init__(
        self,
        streams: int,
        action_size: int,
        normalisation: Normalisation,
        target_return: float | None,
        trajectories: int | None,
        prompt: Context | None,
    ) -> None:
        self.prompt = prompt
        self.episode, self.timestep, self._first = (np.zeros(streams, np.int64) for _ in range(3))
        self._earned = np.zeros(streams)  # rewards of the current episodes
        self._normalisation, self._target, self._trajectories = normalisation, target_return, trajectories
        self._steps = self._shown = 0  # steps and trajectories of the prompt
        zeros = np.zeros((streams, 1), np.float32)
        self._previous = Outcome(np.zeros((streams, 1, action_size), np.float32), zeros, zeros)
        if prompt is not None:
            self._steps, self._shown = (int(x[0, -1]) + 1 for x in (prompt.position, prompt.trajectory))
            last = (np.asarray(getattr(prompt, name))[:, -1:] for name in Outcome._fields)
            self._previous = Outcome(*(np.repeat(x, streams, axis=0) for x in last))

    def step(self, observation: Float32[np.ndarray, "streams observation"]) -> Context:
        """Return one timestep (B, 1, ...) whose action, reward and completion are still zero. NaN becomes zero."""
        start = self._steps + self._first
        index = self._shown + self.episode
        index = index if self._trajectories is None else np.minimum(index, self._trajectories - 1)
        left = np.zeros_like(self._earned) if self._target is None else self._target - self._earned
        self._now = Context(
            observation=np.nan_to_num(self._normalisation.observation(observation), nan=0.0)[:, None],
            return_to_go=self._normalisation.return_to_go(left)[:, None],
            timestep=self.timestep[:, None].astype(np.int32),
            trajectory=index[:, None].astype(np.int32),
            position=(start + self.timestep)[:, None].astype(np.int32),
            start=start[:, None].astype(np.int32),
            weight=np.ones((len(observation), 1), np.float32),
            previous=self._previous,
            **jax.tree.map(np.zeros_like, self._previous)._asdict(),
        )
        return self._now

    def observe(self, action: np.ndarray, reward: np.ndarray, is_last: np.ndarray) -> Context:
        """Return the timestep of `step` with its action, reward and completion. `is_last` (B,) marks the last step."""
        self._earned, self.timestep = self._earned + reward, self.timestep + 1
        reached = np.zeros(len(reward), bool) if self._target is None else is_last & (self._earned >= self._target)
        scaled = self._normalisation.reward(reward[:, None].astype(np.float32))
        self._previous = Outcome(action[:, None], scaled, reached[:, None].astype(np.float32))
        return self._now._replace(**self._previous._asdict())

    def begin_next(self, ended: np.ndarray) -> None:
        """Begin the next episode of the streams (B,) whose episode has ended."""
        self.episode, self._first = self.episode + ended, self._first + np.where(ended, self.timestep, 0)
        self.timestep, self._earned = (np.where(ended, 0, x) for x in (self.timestep, self._earned))
