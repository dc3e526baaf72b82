"""Merging attention over parts of the keys, and the types of arrays that vary between devices."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ringrl.attention.contract import Partial

AxisName = str | tuple[str, ...]
Tree = TypeVar("Tree")


def varying_like(reference: jax.Array, tree: Tree) -> Tree:
    """Return the arrays, typed as varying over the mesh axes of `reference`.

    A zero of the reference's type is added, which works in every version of JAX; the compiler removes it. Outside
    shard_map nothing is added.
    """
    if getattr(jax.typeof(reference), "vma", None) == frozenset():
        return tree
    zero = jnp.where(reference.ravel()[0] == 0, 0, 0)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def nothing_seen(q: Float[Array, "*heads rows head_dim"]) -> Partial:
    """Return the result without keys: 0 and -inf."""
    return varying_like(q, Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)))


def merge(a: Partial, b: Partial) -> Partial:
    """Return the result over the keys of both parts."""
    lse = jnp.logaddexp(a.lse, b.lse)
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    ours, theirs = (part.o * jnp.exp(part.lse - finite)[..., None] for part in (a, b))
    return Partial(ours + theirs, lse)


def merge_over(part: Partial, axis_name: AxisName) -> Partial:
    """Return the result over the keys of all devices of a mesh axis, inside shard_map: one pmax, one psum."""
    maximum = jax.lax.pmax(jax.lax.stop_gradient(part.lse), axis_name)  # it cancels in the result
    weight = jnp.exp(part.lse - jnp.where(jnp.isneginf(maximum), 0.0, maximum))
    summed = jax.lax.psum(jnp.concatenate([part.o * weight[..., None], weight[..., None]], axis=-1), axis_name)
    o, total = summed[..., :-1], summed[..., -1]
    return Partial(
        o / jnp.where(total == 0, 1.0, total)[..., None], jnp.where(total == 0, -jnp.inf, maximum + jnp.log(total))
    )


def with_sinks(
    o: Float[Array, "batch tokens heads head_dim"],
    lse: Float[Array, "batch tokens heads"],
    sinks: Float[Array, " heads"],
) -> tuple[jax.Array, jax.Array]:
    """Return output and log-sum-exp with one extra logit for each head, whose value vector is 0."""
    is_empty = jnp.isneginf(lse)  # a sink of -inf is none
    share = jnp.where(is_empty, 0.0, jax.nn.sigmoid(jnp.where(is_empty, 0.0, lse) - sinks))[..., None]
    total = jnp.where(is_empty, sinks, jnp.logaddexp(jnp.where(is_empty, 0.0, lse), sinks))
    return (o.astype(jnp.float32) * share).astype(o.dtype), total
