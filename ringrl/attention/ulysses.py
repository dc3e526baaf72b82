"""Ulysses (2309.14509): all-to-all turns a split of the sequence into a split of the heads, and back.

Four all-to-alls a layer (q, k and v in two, the output and its log-sum-exp in two) replace n - 1 hops. It needs as many
heads as devices; with more devices than heads, the product with a ring takes the rest.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ringrl.attention.mask import Side
from ringrl.attention.ring import AxisName

_TOKENS, _HEADS = 1, 2


def check_heads(heads: int, kv_heads: int, size: int) -> None:
    """ValueError where the heads cannot be dealt out to `size` devices."""
    if heads % size:
        raise ValueError(f"q: its {heads} heads do not divide among the {size} devices of a Ulysses axis")
    if kv_heads % size and size % kv_heads:
        raise ValueError(
            f"k: its {kv_heads} heads neither divide among the {size} devices of a Ulysses axis nor divide their number"
        )


def scatter_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, side: Side, axis_name: AxisName, size: int
) -> tuple[jax.Array, jax.Array, jax.Array, Side]:
    """All tokens of some heads, from some tokens of all heads: (B, S/n, H, D) -> (B, S, H/n, D)."""
    check_heads(q.shape[_HEADS], k.shape[_HEADS], size)
    if k.shape[_HEADS] % size:  # fewer key heads than devices: several devices share one
        k, v = (jnp.repeat(x, size // k.shape[_HEADS], axis=_HEADS) for x in (k, v))
    q = lax.all_to_all(q, axis_name, _HEADS, _TOKENS, tiled=True)
    k, v = lax.all_to_all(jnp.stack([k, v]), axis_name, _HEADS + 1, _TOKENS + 1, tiled=True)
    return q, k, v, Side(*lax.all_gather(jnp.stack(side), axis_name, axis=_TOKENS + 1, tiled=True))


def gather_heads(o: jax.Array, lse: jax.Array, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
    """The inverse, for output and log-sum-exp."""
    return (
        lax.all_to_all(o, axis_name, _TOKENS, _HEADS, tiled=True),
        lax.all_to_all(lse, axis_name, _TOKENS, _HEADS, tiled=True),
    )
