"""What acts in a batch of environments and may remember: a trained policy with its key-value cache, or chance.

Each timestep's tokens enter the cache in one call; the cache doubles when it is full, so that few programs are compiled
and short contexts stay cheap.
"""

from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32

from ringrl.context import Context
from ringrl.model import KVCache, Policy, grow

SMALLEST_CACHE = 512  # tokens


class Actor(Protocol):
    """Something that acts in a batch of environments and may remember."""

    def start(self, num_environments: int, num_steps: int) -> None:
        """Forget everything; at most `num_steps` timesteps will follow."""

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        """The action at a new timestep; of `current` (B, 1, ...) the action, reward and completion are unknown."""

    def observe(self, finished: Context) -> None:
        """The same timestep with its action, reward and completion."""


class RandomActor:
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


class PolicyActor:
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
