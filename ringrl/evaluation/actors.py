"""What acts in a batch of environments and may remember: a trained policy with its key-value cache, or chance.

Each timestep's tokens enter the cache in one call; the cache doubles when it is full, so that few programs are compiled
and short contexts stay cheap.
"""

from typing import Protocol

import jax
import numpy as np
from jaxtyping import Float32

from ringrl.context import Array, Context
from ringrl.evaluation.programs import Programs
from ringrl.model import KVCache

SMALLEST_CACHE = 512  # tokens


class Actor(Protocol):
    """Something that acts in a batch of environments and may remember."""

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """Forget everything but the prompt (1, T, ...), with which all contexts begin; at most `num_steps` will follow.

        The first of them stands at position T.
        """

    def act(self, current: Context) -> Float32[Array, "environments action"]:
        """The action at a new timestep; of `current` (B, 1, ...) the action, reward and completion are unknown.

        It may be a jax.Array that is still being computed.
        """

    def observe(self, finished: Context) -> None:
        """The same timestep with its action, reward and completion."""


class RandomActor:
    """Uniform actions: those of stream i are drawn from seed + i stride, however many streams there are beside it."""

    def __init__(self, action_size: int, seed: int, stride: int = 1) -> None:
        self._action_size, self._seed, self._stride = action_size, seed, stride

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """Draw from the beginning again."""
        self._randoms = [np.random.default_rng(self._seed + index * self._stride) for index in range(num_environments)]

    def act(self, current: Context) -> Float32[np.ndarray, "environments action"]:
        """Uniform in [-1, 1]."""
        return np.stack([random.uniform(-1, 1, self._action_size) for random in self._randoms]).astype(np.float32)

    def observe(self, finished: Context) -> None:
        """Nothing to remember."""


class PolicyActor:
    """A trained policy with a key-value cache of its own."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """An empty cache behind the prompt, which is computed once for all environments."""
        self._most_tokens = num_steps * self._programs.policy.tokens_per_step
        self._tokens = 0
        self._previous: Context | None = None
        self._prefix = None if prompt is None else self._programs.prefill(prompt)
        self._memory = self._programs.reset(num_environments, min(SMALLEST_CACHE, self._most_tokens))
        self._prepared = 0  # the capacity whose successor is compiled, or being compiled

    def act(self, current: Context) -> Float32[jax.Array, "environments action"]:
        """Append this step's tokens and read the action."""
        self._tokens += self._programs.policy.tokens_per_step
        self._make_room(current)
        action, self._memory = self._programs.act(self._previous, current, self._prefix, self._memory)
        return action

    def observe(self, finished: Context) -> None:
        """Keep the step; its tokens enter the cache with the next one's."""
        self._previous = finished

    def _make_room(self, current: Context) -> None:
        """Grow the cache where it is full, and prepare for its next growth from its second step on."""
        if not isinstance(self._memory, KVCache):
            return
        if self._tokens > self._memory.capacity:
            self._memory = self._programs.grow(self._memory, self._following())
        capacity = self._memory.capacity
        if self._previous is not None and self._prepared < capacity < self._most_tokens:
            self._programs.compile_wider(current, self._prefix, self._memory, self._following())
            self._prepared = capacity

    def _following(self) -> int:
        """The capacity after this one."""
        return min(2 * self._memory.capacity, self._most_tokens)
