"""Ulysses (2309.14509): an all-to-all turns shards of the sequence into shards of the heads, and back.

Four all-to-alls per layer (two for q, k and v, two for output and log-sum-exp) replace n - 1 hops. Ulysses needs at
least as many heads as devices; "ulysses_ring" combines fewer heads with a ring.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ringrl.attention.contract import AxisName
from ringrl.attention.mask import Side

_TOKENS, _HEADS = 1, 2


def scatter_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Side, keys: Side, axis_name: AxisName, size: int
) -> tuple[jax.Array, jax.Array, jax.Array, Side, Side]:
    """Exchange some tokens of all heads for all tokens of some heads: (B, S/n, H, D) -> (B, S, H/n, D).

    Raise ValueError if the heads cannot be divided over `size` devices.
    """
    heads, kv_heads = q.shape[_HEADS], k.shape[_HEADS]
    if heads % size:
        raise ValueError(f"q: {heads} heads do not divide over the {size} devices of a Ulysses axis")
    if kv_heads % size and size % kv_heads:
        raise ValueError(f"k: {kv_heads} heads are neither a multiple nor a divisor of the {size} devices (Ulysses)")
    if kv_heads % size:  # fewer key heads than devices: several devices share one
        k, v = (jnp.repeat(x, size // kv_heads, axis=_HEADS) for x in (k, v))
    q = lax.all_to_all(q, axis_name, _HEADS, _TOKENS, tiled=True)
    k, v = lax.all_to_all(jnp.stack([k, v]), axis_name, _HEADS + 1, _TOKENS + 1, tiled=True)
    queries, keys = (
        Side(*lax.all_gather(side.stacked(), axis_name, axis=_TOKENS + 1, tiled=True)) for side in (queries, keys)
    )
    return q, k, v, queries, keys


def gather_heads(o: jax.Array, lse: jax.Array, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
    """Invert `scatter_heads` for output and log-sum-exp."""
    return (
        lax.all_to_all(o, axis_name, _TOKENS, _HEADS, tiled=True),
        lax.all_to_all(lse, axis_name, _TOKENS, _HEADS, tiled=True),
    )


def heads_of_device(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Return the elements (H/n,) of an array (H,) for the heads that `scatter_heads` gives this device."""
    amount = x.shape[0] // lax.axis_size(axis_name)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * amount, amount)
