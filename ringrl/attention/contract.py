"""Arguments and results of kernels, arrays by key head, and the merging of results over parts of the keys.

The first axis is batch * kv_heads. `rows` are the queries of all query heads that share a key head, one group after the
other: groups * queries rows. Keys and values are one array, in the order that kernels read and that the ring sends, so
nothing is rearranged between hops.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ringrl.attention.mask import Side

LOG2_E = 1.4426950408889634  # kernels take powers of two
AxisName = str | tuple[str, ...]
Tree = TypeVar("Tree")


class Inputs(NamedTuple):
    """Queries, keys and values, with the positions and segment ids (batch, tokens) of both sides.

    Only the kernel "autodiff" reads `slopes`, one for each row, and `soft_cap`, which replaces the one of the options.
    """

    q: Float[Array, "heads rows head_dim"]
    kv: Float[Array, "heads 2 keys head_dim"]
    queries: Side
    keys: Side
    slopes: Float32[Array, "heads rows"] | None = None
    soft_cap: Float32[Array, ""] | None = None

    @property
    def kv_heads(self) -> int:
        """Number of key heads of one context."""
        return self.q.shape[0] // self.queries.positions.shape[0]

    @property
    def groups(self) -> int:
        """Number of query heads that share a key head."""
        return self.q.shape[1] // self.queries.positions.shape[1]


class Terms(NamedTuple):
    """Arrays of a call that only the kernel "autodiff" reads: ALiBi slopes, and a soft cap that has a gradient."""

    slopes: Float32[Array, " heads"] | None = None
    soft_cap: Float[Array, ""] | None = None


NO_TERMS = Terms()


class Partial(NamedTuple):
    """Attention over some of the keys: normalised output and log-sum-exp, float32; 0 and -inf without visible keys."""

    o: Float32[Array, "*heads rows head_dim"]
    lse: Float32[Array, "*heads rows"]


class Cotangents(NamedTuple):
    """Inputs of the backward pass per query.

    `lse` is the log-sum-exp over the keys of *all* devices, and `delta` = rowsum(o * do) - dlse. Gradients over parts
    of the keys therefore add up to the gradients over all keys.
    """

    do: Float[Array, "heads rows head_dim"]
    lse: Float32[Array, "heads rows"]
    delta: Float32[Array, "heads rows"]


class Gradients(NamedTuple):
    """Gradients of q and of keys and values, float32."""

    dq: Float32[Array, "heads rows head_dim"]
    dkv: Float32[Array, "heads 2 keys head_dim"]


def precision_of(x: jax.Array) -> lax.Precision:
    """Return the precision of matrix products: full for float32, where GPUs default to TF32 and TPUs to bfloat16."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """Rearrange (B, S, H[, D]) -> (B * Hkv, groups * S[, D])."""
    batch, tokens, heads, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, tokens, kv_heads, heads // kv_heads, *rest), 1, 3)
    return x.reshape(batch * kv_heads, -1, *rest)


def by_token(x: jax.Array, batch: int, tokens: int) -> jax.Array:
    """Invert `by_head`."""
    heads, rows, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, heads // batch, rows // tokens, tokens, *rest), 3, 1)
    return x.reshape(batch, tokens, -1, *rest)


def pad_axis(x: jax.Array, axis: int, multiple: int, fill: float = 0.0) -> jax.Array:
    """Pad the end of an axis to a multiple of a length."""
    amount = [(0, 0)] * x.ndim
    amount[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, amount, constant_values=fill)


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
    maximum = lax.pmax(lax.stop_gradient(part.lse), axis_name)  # it cancels in the result
    weight = jnp.exp(part.lse - jnp.where(jnp.isneginf(maximum), 0.0, maximum))
    summed = lax.psum(jnp.concatenate([part.o * weight[..., None], weight[..., None]], axis=-1), axis_name)
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
