"""The key-value cache of a transformer: what a policy remembers of its context.

On a mesh the tokens of a cache lie striped over the axis "seq" (see `ringrl.attention.decode`), so every device holds
an equal part of every context, however long it grows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ringrl.attention import Prefix, append_to_cache, decode_attention, grow_cache, to_layout
from ringrl.model.parallel import ONE_DEVICE, SPLIT, Parallel

AXES = ("batch", "time", "heads", None)


class KVCache(NamedTuple):
    """Keys (already rotated) and values of each layer, (B, capacity, Hkv, D), and the tokens they hold."""

    keys: tuple[Float[Array, "batch capacity kv_heads head_dim"], ...]
    values: tuple[Float[Array, "batch capacity kv_heads head_dim"], ...]
    length: Int32[Array, ""]

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.keys[0].shape[1]

    def prefix(self, layer: int) -> Prefix:
        """A layer's tokens, as those that all contexts of a batch begin with; of a cache of one context."""
        return Prefix(self.keys[layer], self.values[layer], self.length)


def empty_cache(
    layers: int, shape: tuple[int, int, int, int], dtype: jnp.dtype, parallel: Parallel = ONE_DEVICE
) -> KVCache:
    """A cache of `shape` (batch, capacity, kv_heads, head_dim) per layer that holds nothing yet.

    The capacity is rounded up to a multiple of the devices that share it.
    """
    batch, capacity, *rest = shape
    whole = (batch, round_up(capacity, parallel), *rest)
    place = lambda *axes: None if parallel.mesh is None else parallel.sharding(*axes)  # noqa: E731
    blank = lambda: tuple(jnp.zeros(whole, dtype, device=place(*AXES)) for _ in range(layers))  # noqa: E731
    return KVCache(blank(), blank(), jnp.zeros((), jnp.int32, device=place()))


def grow(cache: KVCache, capacity: int, parallel: Parallel = ONE_DEVICE) -> KVCache:
    """The same cache with room for `capacity` tokens, rounded up as in `empty_cache`."""
    widen = partial(grow_cache, capacity=round_up(capacity, parallel), **where(parallel))
    return KVCache(tuple(map(widen, cache.keys)), tuple(map(widen, cache.values)), cache.length)


def append(
    keys: jax.Array,
    values: jax.Array,
    new_keys: jax.Array,
    new_values: jax.Array,
    length: jax.Array,
    parallel: Parallel,
) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values behind the first `length`."""
    axes = where(parallel)
    return append_to_cache(keys, new_keys, length, **axes), append_to_cache(values, new_values, length, **axes)


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array, prefix: Prefix | None, parallel: Parallel
) -> jax.Array:
    """Attention of the newest tokens to a layer's cache of `length` tokens, and to the prefix before it."""
    return decode_attention(q, keys, values, length=length, prefix=prefix, **where(parallel))


def as_prefix(
    x: Float[Array, "1 tokens kv_heads head_dim"], dtype: jnp.dtype, parallel: Parallel
) -> Float[Array, "1 capacity kv_heads head_dim"]:
    """Keys or values of one whole context, in the order of time, as they lie in a cache."""
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, round_up(x.shape[1], parallel) - x.shape[1]), (0, 0), (0, 0)))
    return parallel.constrain(to_layout(x, "striped", parallel.ring_size), None, *AXES[1:])


def round_up(capacity: int, parallel: Parallel) -> int:
    """The next capacity that divides among the devices which share a context."""
    return -(-capacity // parallel.ring_size) * parallel.ring_size


def where(parallel: Parallel) -> dict[str, Any]:
    """On which axes of the mesh the functions of `ringrl.attention` find a cache."""
    if parallel.mesh is None:
        return {}
    return {"mesh": parallel.mesh, "axis_name": "seq", "batch_axes": SPLIT["batch"], "head_axes": SPLIT["heads"]}
