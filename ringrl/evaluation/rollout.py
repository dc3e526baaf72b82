"""Rolling policies out in dm_control: n episodes, one after another, in one growing context.

A batch of environments runs in lockstep. Each timestep's tokens enter the key-value cache in one call; the cache
doubles when it is full, so that few programs are compiled and short contexts stay cheap.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import gymnasium
import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32, Float64

from ringrl.context import Context, Outcome
from ringrl.data.normalisation import Normalisation
from ringrl.errors import UserError
from ringrl.model import KVCache, Policy, grow

SMALLEST_CACHE = 512  # tokens


class Agent(Protocol):
    """Something that acts in a batch of environments and may remember."""

    def start(self, num_environments: int, num_steps: int) -> None:
        """Forget everything; at most `num_steps` timesteps will follow."""

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        """The action at a new timestep; of `current` (B, 1, ...) the action, reward and completion are unknown."""

    def observe(self, finished: Context) -> None:
        """The same timestep with its action, reward and completion."""


class RandomAgent:
    """Uniform actions, from a seed."""

    def __init__(self, action_size: int, seed: int) -> None:
        self._action_size, self._random = action_size, np.random.default_rng(seed)

    def start(self, num_environments: int, num_steps: int) -> None:
        """Nothing to forget."""

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        """Uniform in [-1, 1]."""
        return self._random.uniform(-1, 1, (len(current.reward), self._action_size)).astype(np.float32)

    def observe(self, finished: Context) -> None:
        """Nothing to remember."""


class PolicyAgent:
    """A trained policy with its key-value cache."""

    def __init__(self, policy: Policy) -> None:
        self._graph, self._params = nnx.split(policy)
        self._policy = policy
        self._act = jax.jit(self._pure_act, donate_argnums=3)
        self._grow = jax.jit(grow, static_argnums=1)

    def _pure_act(self, params: Any, previous: Context | None, current: Context, memory: Any) -> tuple[jax.Array, Any]:
        return nnx.merge(self._graph, params).act(previous, current, memory)

    def start(self, num_environments: int, num_steps: int) -> None:
        """An empty cache."""
        self._most_tokens = num_steps * self._policy.tokens_per_step
        self._tokens = 0
        self._previous: Context | None = None
        self._memory = self._policy.reset(num_environments, min(SMALLEST_CACHE, self._most_tokens))

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        """Append this step's tokens and read the action."""
        self._tokens += self._policy.tokens_per_step
        if isinstance(self._memory, KVCache) and self._tokens > self._memory.capacity:
            self._memory = self._grow(self._memory, min(2 * self._memory.capacity, self._most_tokens))
        action, self._memory = self._act(self._params, self._previous, current, self._memory)
        return np.asarray(action)

    def observe(self, finished: Context) -> None:
        """Keep the step; its tokens enter the cache with the next one's."""
        self._previous = finished


def rollout(
    agent: Agent,
    environments: gymnasium.vector.VectorEnv,
    normalisation: Normalisation,
    *,
    episodes: int,
    target_return: float,
    trajectories: int | None = None,
    seed: int | None = None,
    on_episode: Callable[[np.ndarray], None] = lambda returns: None,
) -> Float64[np.ndarray, "environments episodes"]:
    """Returns of `episodes` in-context episodes in each environment.

    Every episode asks for the same `target_return` (chain of hindsight): its return-to-go starts there and falls by
    the rewards earned. The completion token is 1 on an episode's last step if its return reached the target.

    Args:
      agent: forgets at the start, then sees every step of every episode.
      environments: B environments in lockstep that truncate together; one shared episode length.
      normalisation: the statistics the policy was trained with.
      episodes: episodes per context.
      target_return: in units of the task's return.
      trajectories: clip the trajectory index below this (the number the policy was trained with).
      seed: environment i starts from seed + i; None goes on with the environments' own streams.
      on_episode: called with the returns (B,) of each episode as it ends.

    Raises:
      UserError: an observation or reward that is not finite.
    """
    length = normalisation.episode_length
    agent.start(environments.num_envs, episodes * length)
    returns = np.zeros((environments.num_envs, episodes))
    before = _nothing(environments)
    for episode in range(episodes):
        observation, _ = environments.reset(seed=seed if episode == 0 else None)
        index = episode if trajectories is None else min(episode, trajectories - 1)
        for timestep in range(length):
            step = _step(
                observation=normalisation.observation(observation),
                return_to_go=normalisation.return_to_go(target_return - returns[:, episode]),
                timestep=timestep,
                trajectory=index,
                position=episode * length + timestep,
                previous=before,
            )
            action = agent.act(step)
            observation, reward, _, truncated, _ = environments.step(action)
            if not (np.isfinite(observation).all() and np.isfinite(reward).all()):
                raise UserError(f"environment: observation or reward not finite (episode {episode}, step {timestep})")
            returns[:, episode] += reward
            if truncated.any() != (timestep == length - 1):
                raise UserError(f"environment: episodes end after {timestep + 1} steps, the data's after {length}")
            reached = (timestep == length - 1) & (returns[:, episode] >= target_return)
            before = Outcome(action[:, None], reward[:, None].astype(np.float32), reached[:, None].astype(np.float32))
            agent.observe(step._replace(**before._asdict()))
        on_episode(returns[:, episode])
    return returns


def _nothing(environments: gymnasium.vector.VectorEnv) -> Outcome:
    """What came before the first step."""
    size = environments.num_envs, 1
    action = np.zeros((*size, *(environments.single_action_space.shape or ())), np.float32)
    return Outcome(action, np.zeros(size, np.float32), np.zeros(size, np.float32))


def _step(
    observation: np.ndarray,
    return_to_go: np.ndarray,
    timestep: int,
    trajectory: int,
    position: int,
    previous: Outcome,
) -> Context:
    """One timestep (B, 1, ...) as far as it is known before acting."""
    constant = partial(np.full, (len(observation), 1))
    unknown = jax.tree.map(np.zeros_like, previous)
    return Context(
        observation=observation[:, None],
        return_to_go=return_to_go[:, None],
        timestep=constant(timestep, dtype=np.int32),
        trajectory=constant(trajectory, dtype=np.int32),
        position=constant(position, dtype=np.int32),
        weight=constant(1, dtype=np.float32),
        previous=previous,
        **unknown._asdict(),
    )
