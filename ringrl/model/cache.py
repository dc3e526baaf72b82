"""The key-value cache of a transformer: what a policy remembers of its context."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ringrl.attention import grow_cache


class KVCache(NamedTuple):
    """Keys (already rotated) and values of each layer, (B, capacity, Hkv, D), and the tokens they hold."""

    keys: tuple[Float[Array, "batch capacity kv_heads head_dim"], ...]
    values: tuple[Float[Array, "batch capacity kv_heads head_dim"], ...]
    length: Int32[Array, ""]

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.keys[0].shape[1]


def empty_cache(layers: int, shape: tuple[int, int, int, int], dtype: jnp.dtype) -> KVCache:
    """A cache of `shape` (batch, capacity, kv_heads, head_dim) per layer that holds nothing yet."""
    blank = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(layers))  # noqa: E731
    return KVCache(blank(), blank(), jnp.zeros((), jnp.int32))


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The same cache with room for `capacity` tokens."""
    widen = partial(grow_cache, capacity=capacity)
    return KVCache(tuple(map(widen, cache.keys)), tuple(map(widen, cache.values)), cache.length)
