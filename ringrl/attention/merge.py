"""Adding up attention over parts of the keys. Used by the forward pass only: never differentiated (see ring.py)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


class Partial(NamedTuple):
    """Attention over some of the keys: normalised output and log-sum-exp, float32; nothing seen is 0 and -inf."""

    o: Float32[Array, "batch queries heads head_dim"]
    lse: Float32[Array, "batch queries heads"]


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both: outputs weighted by exp(lse)."""
    maximum = jnp.maximum(a.lse, b.lse)
    shift = jnp.where(jnp.isneginf(maximum), 0.0, maximum)  # rows that neither part has seen anything of
    weight_a, weight_b = jnp.exp(a.lse - shift), jnp.exp(b.lse - shift)
    total = weight_a + weight_b
    share = (weight_b / jnp.where(total == 0, 1.0, total))[..., None]
    return Partial(a.o + (b.o - a.o) * share, shift + jnp.log(total))


def merge_over(part: Partial, axis_name: str) -> Partial:
    """The same over all devices of a mesh axis, inside shard_map: one pmax, one psum."""
    maximum = jax.lax.pmax(part.lse, axis_name)
    weight = jnp.exp(part.lse - jnp.where(jnp.isneginf(maximum), 0.0, maximum))
    summed = jax.lax.psum(jnp.concatenate([part.o * weight[..., None], weight[..., None]], axis=-1), axis_name)
    o, total = summed[..., :-1], summed[..., -1]
    return Partial(
        o / jnp.where(total == 0, 1.0, total)[..., None], jnp.where(total == 0, -jnp.inf, maximum + jnp.log(total))
    )
