"""Arguments and results of kernels: arrays by key head.

The first axis is batch * kv_heads. `rows` are the queries of all query heads that share a key head, one group after the
other: groups * queries rows. Keys and values are one array, in the order that kernels read and that the ring sends, so
nothing is rearranged between hops.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ringrl.attention.mask import Side

LOG2_E = 1.4426950408889634  # kernels take powers of two


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
