"""What plans (attend.py) and kernels take and give: arrays by key head, all heads of the batch along one axis.

`rows` are the queries of a key head: of each of its groups (query heads that share it) in turn, so groups * queries of
them. The first axis is batch * kv_heads, and keys and values lie in one array: what travels round a ring is what
kernels read, and nothing is rearranged on the way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ringrl.attention.mask import Side


class Inputs(NamedTuple):
    """Queries, and keys with their values; where both stand. `queries` and `keys` are (batch, tokens)."""

    q: Float[Array, "heads rows head_dim"]
    kv: Float[Array, "heads 2 keys head_dim"]
    queries: Side
    keys: Side

    @property
    def kv_heads(self) -> int:
        """Key heads of one context."""
        return self.q.shape[0] // self.queries.positions.shape[0]

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.queries.positions.shape[1]


class Partial(NamedTuple):
    """Attention over some of the keys: normalised output and log-sum-exp, float32; nothing seen is 0 and -inf."""

    o: Float32[Array, "*heads rows head_dim"]
    lse: Float32[Array, "*heads rows"]


class Cotangents(NamedTuple):
    """What the backward pass knows of each query.

    `lse` is the log-sum-exp over the keys of *all* devices and `delta` = rowsum(o * do) - dlse, so that the gradients
    of parts of the keys simply add up to the gradients of all of them.
    """

    do: Float[Array, "heads rows head_dim"]
    lse: Float32[Array, "heads rows"]
    delta: Float32[Array, "heads rows"]


class Gradients(NamedTuple):
    """Of q, and of keys and values, float32."""

    dq: Float32[Array, "heads rows head_dim"]
    dkv: Float32[Array, "heads 2 keys head_dim"]


def precision_of(x: jax.Array) -> lax.Precision:
    """Of matrix products: what comes in float32 stays it, where GPUs would take TF32 and TPUs bfloat16."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """(B, S, H[, D]) -> (B * Hkv, groups * S[, D])."""
    batch, tokens, heads, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, tokens, kv_heads, heads // kv_heads, *rest), 1, 3)
    return x.reshape(batch * kv_heads, -1, *rest)


def by_token(x: jax.Array, batch: int, tokens: int) -> jax.Array:
    """The inverse."""
    heads, rows, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, heads // batch, rows // tokens, tokens, *rest), 3, 1)
    return x.reshape(batch, tokens, -1, *rest)
