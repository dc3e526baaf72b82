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

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """Forget everything but the prompt (1, T, ...), which all share; at most `num_steps` timesteps follow it."""

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        """The action at a new timestep; of `current` (B, 1, ...) the action, reward and completion are unknown."""

    def observe(self, finished: Context) -> None:
        """The same timestep with its action, reward and completion."""


class RandomActor:
    """Uniform actions: those of stream i are drawn from seed + i, however many streams there are beside it."""

    def __init__(self, action_size: int, seed: int) -> None:
        self._action_size, self._seed = action_size, seed

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """Draw from the beginning again."""
        self._randoms = [np.random.default_rng(self._seed + index) for index in range(num_environments)]

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        """Uniform in [-1, 1]."""
        return np.stack([random.uniform(-1, 1, self._action_size) for random in self._randoms]).astype(np.float32)

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

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """A cache of the prompt alone."""
        prompted = 0 if prompt is None else prompt.reward.shape[1]
        self._most_tokens = (prompted + num_steps) * self._policy.tokens_per_step
        self._tokens = 0
        self._previous: Context | None = None
        self._memory = self._policy.reset(num_environments, min(SMALLEST_CACHE, self._most_tokens))
        for time in range(prompted):
            step = jax.tree.map(lambda x, t=time: np.repeat(x[:, t : t + 1], num_environments, axis=0), prompt)
            self.act(step)
            self.observe(step)

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
