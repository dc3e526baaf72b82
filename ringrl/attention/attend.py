"""Attention with its own gradient, over keys that lie wherever a plan says: the only custom_vjp of the library.

Nothing is ever differentiated through a merge of partial results, a send or a kernel: the forward pass keeps the global
output and log-sum-exp, and the backward pass computes every part of the gradient from them.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ringrl.attention.kernels import xla
from ringrl.attention.mask import Side
from ringrl.attention.merge import Partial
from ringrl.attention.options import Options


class Plan(Protocol):
    """How queries meet all of their keys, as hashable static data."""

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, queries: Side, keys: Side, options: Options) -> Partial:
        """Attention of this device's queries over the keys of all devices."""

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        queries: Side,
        keys: Side,
        options: Options,
        lse: jax.Array,
        delta: jax.Array,
        do: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dq, dk, dv) in float32: of this device's queries, and of its keys from the queries of all devices."""


class Local:
    """All keys are on this device."""

    forward = staticmethod(xla.forward)
    backward = staticmethod(xla.backward)


LOCAL = Local()


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Side, keys: Side, options: Options, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Output (B, S, H, D) in q's dtype and log-sum-exp (B, S, H) float32, both differentiable."""
    return _forward(q, k, v, queries, keys, options, plan)[0]


def _split(x: jax.Array, kv_heads: int) -> jax.Array:
    """(B, S, H[, D]) -> (B, Hkv, G, S[, D]): what kernels read, so that it is rearranged once and not on every hop."""
    x = x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def _join(x: jax.Array) -> jax.Array:
    """The inverse."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _forward(q, k, v, queries, keys, options, plan):  # type: ignore[no-untyped-def]
    k_heads, v_heads = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    o, lse = (_join(x) for x in plan.forward(_split(q, k.shape[2]), k_heads, v_heads, queries, keys, options))
    # Named here and not where they leave: the residuals themselves must be what a remat policy saves.
    o, lse = checkpoint_name(o.astype(q.dtype), "ring_attention"), checkpoint_name(lse, "ring_attention")
    return (o, lse), (q, k, v, queries, keys, o, lse)


def _backward(options, plan, residuals, cotangents):  # type: ignore[no-untyped-def]
    q, k, v, queries, keys, o, lse = residuals
    do, dlse = cotangents
    # d lse / d logits = p, so the cotangent of the log-sum-exp joins delta with the opposite sign. Rows that see
    # nothing have p = 0 throughout; whatever flows into their constant lse = -inf must not become nan.
    dlse = jnp.where(jnp.isneginf(lse), 0.0, dlse)
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1) - dlse
    q_heads, lse, delta, do = (_split(x, k.shape[2]) for x in (q, lse, delta, do))
    k_heads, v_heads = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    dq, dk, dv = plan.backward(q_heads, k_heads, v_heads, queries, keys, options, lse, delta, do)
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (queries, keys))
    dk, dv = (jnp.swapaxes(x, 1, 2).astype(k.dtype) for x in (dk, dv))
    return _join(dq).astype(q.dtype), dk, dv, *none


attend.defvjp(_forward, _backward)
