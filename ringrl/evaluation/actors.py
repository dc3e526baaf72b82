"""What acts in a batch of environments and may remember: a trained policy with its key-value cache, or chance.

Each timestep's tokens enter the cache in one call; the cache doubles when it is full, so that few programs are compiled
and short contexts stay cheap.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32

from ringrl.context import Array, Context
from ringrl.model import KVCache, Policy, grow
from ringrl.model.parallel import ONE_DEVICE, Parallel

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
    """A trained policy with its key-value cache.

    One program serves each capacity of the cache. The next one is compiled while its predecessor is still at work.

    Args:
      policy: whose parameters are used as they are now.
      cache_dtype: of keys and values that are kept; None: the dtype that the policy computes in.
      parallel: the mesh that the policy was made for.
    """

    def __init__(self, policy: Policy, cache_dtype: jnp.dtype | None = None, parallel: Parallel = ONE_DEVICE) -> None:
        self._graph, self._params = nnx.split(policy)
        self._policy, self._parallel, self._dtype = policy, parallel, cache_dtype
        self._act = jax.jit(self._pure_act, donate_argnums=4)
        self._prefill = jax.jit(lambda params, context: nnx.merge(self._graph, params).prefill(context, cache_dtype))
        self._grow = jax.jit(partial(grow, parallel=parallel), static_argnames="capacity")
        self._programs: dict[tuple[Hashable, ...], Future[Callable[..., Any]]] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="ringrl-compile")

    def _pure_act(
        self, params: Any, previous: Context | None, current: Context, prefix: Any, memory: Any
    ) -> tuple[jax.Array, Any]:
        return nnx.merge(self._graph, params).act(previous, current, memory, prefix)

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        """An empty cache behind the prompt, which is computed once for all environments."""
        self._most_tokens = num_steps * self._policy.tokens_per_step
        self._tokens = 0
        self._previous: Context | None = None
        self._prefix = None if prompt is None else self._prefill(self._params, prompt)
        self._memory = self._policy.reset(num_environments, min(SMALLEST_CACHE, self._most_tokens), self._dtype)

    def act(self, current: Context) -> Float32[jax.Array, "environments action"]:
        """Append this step's tokens and read the action."""
        self._tokens += self._policy.tokens_per_step
        if isinstance(self._memory, KVCache) and self._tokens > self._memory.capacity:
            self._memory = self._grow(self._memory, capacity=self._following(self._memory.capacity))
        arguments = self._previous, current, self._prefix, self._memory
        program = self._program(*arguments)
        self._compile_ahead(*arguments)
        action, self._memory = program.result()(self._params, *arguments)
        return action

    def observe(self, finished: Context) -> None:
        """Keep the step; its tokens enter the cache with the next one's."""
        self._previous = finished

    def _following(self, capacity: int) -> int:
        """The capacity after this one."""
        return min(2 * capacity, self._most_tokens)

    def _compile_ahead(self, previous: Context | None, current: Context, prefix: Any, memory: Any) -> None:
        """Have ready what the next steps need: after the first step, and after the cache has grown."""
        if previous is None:
            self._program(current, current, prefix, memory)
        elif isinstance(memory, KVCache) and memory.capacity < self._most_tokens:
            self._program(previous, current, prefix, self._wider(memory))

    def _wider(self, memory: KVCache) -> KVCache:
        """What the cache will be once it has grown, without its numbers."""
        grown = jax.eval_shape(partial(self._grow, capacity=self._following(memory.capacity)), memory)
        return jax.tree.map(lambda x, now: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=now.sharding), grown, memory)

    def _program(
        self, previous: Context | None, current: Context, prefix: Any, memory: Any
    ) -> Future[Callable[..., Any]]:
        """Of arguments of these shapes."""
        shapes = jax.tree.map(jnp.shape, (prefix, memory))
        key = previous is None, current.observation.shape, *jax.tree.leaves(shapes)
        if key not in self._programs:
            like = jax.tree.map(_abstract, (self._params, previous, current, prefix, memory))
            self._programs[key] = self._compiler.submit(lambda: self._act.lower(*like).compile())
        return self._programs[key]


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
