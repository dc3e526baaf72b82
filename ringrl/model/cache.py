"""Key-value cache of a transformer.

On a mesh, the tokens of a cache are striped over the axis "seq" (see `ringrl.attention.decode`). Every device therefore
holds an equal part of every context at any length.

The first axis joins heads and contexts, heads first. The keys that a query reads are then contiguous in memory, and so
are the contexts that share a prefix.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ringrl.attention import Prefix, append_to_cache, decode_attention, grow_cache, to_layout
from ringrl.model.parallel import ONE_DEVICE, Parallel

AXES = (None, "time", None, None)
Stored = Float[Array, "kv_heads*batch capacity 1 head_dim"]
Length = Int32[Array, ""]


class KVCache(NamedTuple):
    """Rotated keys and values of each layer, and the number of tokens stored."""

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    length: Length

    @property
    def capacity(self) -> int:
        """Largest number of tokens that the cache can store."""
        return self.keys[0].shape[1]

    def prefix(self, layer: int) -> Prefix:
        """Return a layer of this cache of one context as the shared prefix of a batch of contexts."""
        return Prefix(self.keys[layer], self.values[layer], self.length)


def empty_cache(layers: int, shape: tuple[int, int, int, int], dtype: jnp.dtype, parallel: Parallel) -> KVCache:
    """Return an empty cache of `shape` (batch, capacity, kv_heads, head_dim) per layer (see `round_up`)."""
    batch, capacity, kv_heads, head_dim = shape
    whole = (kv_heads * batch, round_up(capacity, parallel), 1, head_dim)
    place = parallel.sharding(*AXES)
    keys, values = (tuple(jnp.zeros(whole, dtype, device=place) for _ in range(layers)) for _ in range(2))
    return KVCache(keys, values, jnp.zeros((), jnp.int32, device=parallel.sharding()))


def grow(cache: KVCache, capacity: int, parallel: Parallel = ONE_DEVICE) -> KVCache:
    """Return the cache with a larger capacity in tokens, rounded up as in `empty_cache`."""
    widen = partial(grow_cache, capacity=round_up(capacity, parallel), mesh=parallel.mesh)
    return KVCache(tuple(map(widen, cache.keys)), tuple(map(widen, cache.values)), cache.length)


def append(
    cache: Stored, new: Float[Array, "batch new_tokens kv_heads head_dim"], length: Length, parallel: Parallel
) -> Stored:
    """Write new keys (or values) of a layer after its first `length` tokens."""
    return append_to_cache(cache, _heads_first(new, new.shape[2]), length, mesh=parallel.mesh)


def attend(
    q: Float[Array, "batch new_tokens heads head_dim"],
    keys: Stored,
    values: Stored,
    length: Length,
    prefix: Prefix | None,
    parallel: Parallel,
    **mask: Any,
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """Attend from new tokens to a layer's cache of `length` tokens and its prefix. `mask`: of `decode_attention`."""
    batch, new, heads, head_dim = q.shape
    kv_heads = keys.shape[0] // batch
    q = _heads_first(q, kv_heads)
    if "global_prefix" in mask:
        mask["global_prefix"] = jnp.tile(jnp.broadcast_to(mask["global_prefix"], (batch, new)), (kv_heads, 1))
    o = decode_attention(q, keys, values, length=length, prefix=prefix, mesh=parallel.mesh, **mask)
    return jnp.moveaxis(o.reshape(kv_heads, batch, new, -1, head_dim), 0, 2).reshape(batch, new, heads, head_dim)


def as_prefix(x: Float[Array, "1 tokens kv_heads head_dim"], parallel: Parallel) -> Stored:
    """Return keys or values of one context, given in time order, in the layout of a cache."""
    x = _heads_first(x, x.shape[2])
    x = jnp.pad(x, ((0, 0), (0, round_up(x.shape[1], parallel) - x.shape[1]), (0, 0), (0, 0)))
    return parallel.constrain(to_layout(x, "striped", parallel.ring_size), *AXES)


def round_up(capacity: int, parallel: Parallel) -> int:
    """Return the smallest capacity that the ring size divides."""
    return -(-capacity // parallel.ring_size) * parallel.ring_size


def _heads_first(
    x: Float[Array, "batch tokens heads head_dim"], kv_heads: int
) -> Float[Array, "kv_heads*batch tokens groups head_dim"]:
    batch, tokens, heads, head_dim = x.shape
    x = jnp.moveaxis(x.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim), 2, 0)
    return x.reshape(kv_heads * batch, tokens, heads // kv_heads, head_dim)
