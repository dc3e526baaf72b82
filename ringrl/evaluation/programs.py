"""What a policy computes while it acts, compiled ahead of its use."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from ringrl.context import Context
from ringrl.model import KVCache, Policy, grow
from ringrl.model.parallel import ONE_DEVICE, Parallel


class Programs:
    """A policy's compiled programs, for all actors that share it.

    One serves each number of environments and capacity of the cache. The next one is compiled in the background while
    its predecessor is at work.

    Args:
      policy: whose parameters are used as they are now.
      cache_dtype: of keys and values that are kept; None: the dtype that the policy computes in.
      parallel: the mesh that the policy was made for.
    """

    def __init__(self, policy: Policy, cache_dtype: jnp.dtype | None = None, parallel: Parallel = ONE_DEVICE) -> None:
        graph, self._params = nnx.split(policy)
        self.policy, self._dtype = policy, cache_dtype
        self._prefill = jax.jit(lambda params, prompt: nnx.merge(graph, params).prefill(prompt, cache_dtype))
        self._grow = jax.jit(partial(grow, parallel=parallel), static_argnames="capacity")
        self._act = jax.jit(
            lambda params, previous, current, prefix, memory: nnx.merge(graph, params).act(
                previous, current, memory, prefix
            ),
            donate_argnums=4,
        )
        self._compiled: dict[tuple[Hashable, ...], Future[Callable[..., Any]]] = {}
        self._prefilled: tuple[Context, Any] | None = None
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="ringrl-compile")

    def __len__(self) -> int:
        """Programs compiled so far, or being compiled."""
        return len(self._compiled)

    def prefill(self, prompt: Context) -> Any:
        """Memory of a prompt, for all contexts to begin with. The latest prompt's is kept for the next rollout."""
        if self._prefilled is None or self._prefilled[0] is not prompt:
            self._prefilled = prompt, self._prefill(self._params, prompt)
        return self._prefilled[1]

    def reset(self, num_environments: int, capacity: int) -> Any:
        """Memory of nothing."""
        return self.policy.reset(num_environments, capacity, self._dtype)

    def grow(self, memory: KVCache, capacity: int) -> KVCache:
        """Memory of the same with room for more."""
        grown: KVCache = self._grow(memory, capacity=capacity)
        return grown

    def act(self, previous: Context | None, current: Context, prefix: Any, memory: Any) -> tuple[jax.Array, Any]:
        """One more step; `memory` is used up."""
        program = self._program(previous, current, prefix, memory)
        if previous is None:
            self._program(current, current, prefix, memory)  # what the second step needs
        result: tuple[jax.Array, Any] = program.result()(self._params, previous, current, prefix, memory)
        return result

    def compile_wider(self, current: Context, prefix: Any, memory: KVCache, capacity: int) -> None:
        """Begin to compile what a step needs once memory has grown."""
        grown = jax.eval_shape(partial(self._grow, capacity=capacity), memory)
        place = lambda x, now: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=now.sharding)  # noqa: E731
        self._program(current, current, prefix, jax.tree.map(place, grown, memory))

    def _program(
        self, previous: Context | None, current: Context, prefix: Any, memory: Any
    ) -> Future[Callable[..., Any]]:
        """Of arguments of these shapes."""
        shapes = jax.tree.leaves(jax.tree.map(jnp.shape, (prefix, memory)))
        key = previous is None, prefix is None, current.observation.shape, *shapes
        if key not in self._compiled:
            like = jax.tree.map(_abstract, (self._params, previous, current, prefix, memory))
            self._compiled[key] = self._compiler.submit(lambda: self._act.lower(*like).compile())
        return self._compiled[key]


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and, on a mesh, where it lies."""
    sharding = getattr(x, "sharding", None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if isinstance(sharding, NamedSharding) else None)
