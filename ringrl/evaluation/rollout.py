"""Rolling policies out: n episodes, one after another, in one growing context.

A batch of environments runs in lockstep. On an accelerator the batch is best cut into two groups that take turns:
while one's actions are computed there, the other's environments are simulated here.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from jaxtyping import Float64, Int64

from ringrl.context import Context
from ringrl.data.normalisation import Normalisation
from ringrl.errors import UserError
from ringrl.evaluation.actors import Actor
from ringrl.evaluation.episode import Episode
from ringrl.evaluation.told import Told

Playing = Generator[None, None, Episode]
Seeds = Int64[np.ndarray, "streams episodes"]


class Group(NamedTuple):
    """Environments that step in lockstep and truncate together, and what acts in them."""

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
    recorded: Sequence[Episode] = (),
    on_step: Callable[[int], None] = lambda streams: None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> Float64[np.ndarray, "streams episodes"]:
    """Returns of in-context episodes in all environments of all groups; NaN where one failed.

    Every episode asks for the same `target_return` (chain of hindsight): its return-to-go starts there and falls by
    the rewards earned. The completion token is 1 on an episode's last step if its return reached the target.

    An observation or reward that is not finite ends its stream: that episode and those after it have no return. The
    actor is told zeros there from then on, and the other streams go on.

    Args:
      groups: they take turns step by step; the episodes are the same however the environments are grouped.
      normalisation: the statistics the policy was trained with.
      seeds: what the start of each episode is drawn with, of the streams of all groups in order.
      target_return: in units of the task's return; None asks for nothing: return-to-go and completion are zero.
      trajectories: clip the trajectory index below this (the number the policy was trained with).
      prompt: a context (1, T, ...) that all environments remember before their first step.
      recorded: the first episodes, of a rollout that was interrupted. They are not simulated again: the actor is told
        of them.
      on_step: called with the number of environments after every simulated step of a group.
      on_episode: called with each episode as it ends, recorded ones included.

    Raises:
      UserError: episodes of another length than the data's, or recorded ones that do not start where these do.
    """
    told = Told(normalisation, target_return, trajectories, prompt)
    episodes = seeds.shape[1]
    players = _players(groups, told, seeds, on_step)
    acts = len(recorded) < episodes  # otherwise nobody acts any more, and nothing needs to be remembered
    for player in players if acts else ():
        player.start(episodes)
    finished = []
    for index in range(episodes):
        episode = _play(players, index, recorded[index] if index < len(recorded) else None, acts)
        finished.append(episode.returns)
        on_episode(episode)
    return np.stack(finished, axis=1)


def _players(groups: Sequence[Group], told: Told, seeds: Seeds, on_step: Callable[[int], None]) -> "list[_Player]":
    ends = np.cumsum([0, *(group.environments.num_envs for group in groups)]).tolist()
    return [
        _Player(group, told, slice(*part), seeds[slice(*part)], on_step)
        for group, part in zip(groups, pairwise(ends), strict=True)
    ]


def _play(players: "Sequence[_Player]", index: int, recorded: Episode | None, acts: bool) -> Episode:
    """The next episode of all players. A recorded one is told to their actors, if these act later."""
    if recorded is not None and not acts:
        for player in players:
            player.reset(index, recorded)
        return recorded
    begin = time.perf_counter()
    parts = in_turn([player.play(index, recorded) for player in players])
    return recorded or Episode.join(parts, time.perf_counter() - begin)


def in_turn(parts: Sequence[Playing]) -> list[Episode]:
    """What each part returns; each goes on until it waits for its actor, then the next one's turn has come."""
    returned: dict[int, Episode] = {}
    waiting = deque(enumerate(parts))
    while waiting:
        index, part = waiting.popleft()
        try:
            next(part)
        except StopIteration as stop:
            returned[index] = stop.value
        else:
            waiting.append((index, part))
    return [returned[index] for index in range(len(parts))]


class _Player:
    """One group's side of a rollout: what goes on between its actor and its environments.

    Args:
      streams: which of all streams are the group's.
      seeds: one for each of its environments and episodes.
    """

    def __init__(self, group: Group, told: Told, streams: slice, seeds: Seeds, on_step: Callable[[int], None]) -> None:
        self._actor, self._environments = group
        self._told, self._streams, self._seeds, self._on_step = told, streams, seeds, on_step
        self._size = self._environments.num_envs
        self._failed = np.zeros(self._size, bool)
        self._length = told.normalisation.episode_length

    def start(self, episodes: int) -> None:
        """Let the actor forget everything but the prompt."""
        self._actor.start(self._size, episodes * self._length, self._told.clipped_prompt)
        (action_size,) = self._environments.single_action_space.shape or (0,)
        self._before = self._told.before(self._size, action_size)

    def reset(self, index: int, recorded: Episode | None) -> tuple[np.ndarray, np.ndarray]:
        """Start the environments' next episodes: observations (B, O) and physics (B, P).

        Raises:
          UserError: they are not the starts of the recorded episode.
        """
        observation, info = self._environments.reset(seed=self._seeds[:, index].tolist())
        self._failed = self._failed | ~np.isfinite(observation).all(axis=1)
        observation, physics = self._known(observation, info)
        if recorded is not None:
            expected = recorded.observation[0, self._streams]
            alike = (observation == expected).all(axis=1) | np.isnan(expected).any(axis=1) | self._failed
            if not alike.all():
                raise UserError(
                    f"episode {index + 1} starts elsewhere than the recorded one, which cannot be used here"
                )
        return observation, physics

    def play(self, index: int, recorded: Episode | None) -> Playing:
        """One episode; yields whenever an action has been asked for and not yet been waited for."""
        told, known = self._told, None if recorded is None else recorded.streams(self._streams)
        observation, physics = self.reset(index, recorded)
        rows = [(observation, physics)]
        outcomes: list[tuple[np.ndarray, np.ndarray]] = []
        earned = np.zeros(self._size)
        for timestep in range(self._length):
            step = told.step(index, timestep, observation, earned, self._before)
            pending = self._actor.act(step)
            yield
            if known is None:
                action, reward, observation, physics = self._simulate(np.asarray(pending), timestep)
            else:
                action, reward = known.action[timestep], known.reward[timestep]
                observation, physics = known.observation[timestep + 1], known.physics[timestep + 1]
                self._failed = np.isnan(reward)
            rows.append((observation, physics))
            outcomes.append((action, reward))
            action, reward = (np.nan_to_num(x, nan=0.0) for x in (action, reward))
            earned = earned + reward
            self._before = told.outcome(action, reward, earned, is_last=timestep == self._length - 1)
            self._actor.observe(step._replace(**self._before._asdict()))
        observations, states = (np.stack(column) for column in zip(*rows, strict=True))
        actions, rewards = (np.stack(column) for column in zip(*outcomes, strict=True))
        return Episode(observations, actions, rewards, states, seconds=0.0)

    def _simulate(self, action: np.ndarray, timestep: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Action, reward, next observation and physics of a step; NaN in the streams that have failed by it."""
        action = np.where(self._failed[:, None], np.float32(0), action)
        observation, reward, _, truncated, info = self._environments.step(action)
        if truncated.any() != (timestep == self._length - 1):
            ends = "end" if truncated.any() else "go on"
            raise UserError(
                f"environment: episodes {ends} after {timestep + 1} steps, and the data's end after {self._length}; "
                "train on data of whole episodes"
            )
        action = np.where(self._failed[:, None], np.float32(np.nan), action)
        self._failed = self._failed | ~(np.isfinite(observation).all(axis=1) & np.isfinite(reward))
        observation, physics = self._known(observation, info)
        self._on_step(self._size)
        return action, np.where(self._failed, np.nan, reward), observation, physics

    def _known(self, observation: np.ndarray, info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Observation and physics, NaN in the streams that have failed."""
        physics = info.get("physics", np.zeros((self._size, 0)))
        failed = self._failed[:, None]
        return np.where(failed, np.float32(np.nan), observation), np.where(failed, np.nan, physics)
