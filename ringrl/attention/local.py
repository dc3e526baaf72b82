"""Attention over the keys of one device, with its own gradient: the only place that defines one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ringrl.attention.kernels import xla
from ringrl.attention.kernels.xla import Options
from ringrl.attention.mask import Side


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def local_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Side, keys: Side, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Output (B, S, H, D) in q's dtype and log-sum-exp (B, S, H) float32, both differentiable."""
    return _forward(q, k, v, queries, keys, options)[0]


def _forward(q, k, v, queries, keys, options):  # type: ignore[no-untyped-def]
    o, lse = xla.forward(q, k, v, queries, keys, options)
    # Named here and not where they leave: the residuals themselves must be what a remat policy saves.
    o, lse = checkpoint_name(o.astype(q.dtype), "ring_attention"), checkpoint_name(lse, "ring_attention")
    return (o, lse), (q, k, v, queries, keys, o, lse)


def _backward(options, residuals, cotangents):  # type: ignore[no-untyped-def]
    q, k, v, queries, keys, o, lse = residuals
    do, dlse = cotangents
    # d lse / d logits = p, so the cotangent of the log-sum-exp joins delta with the opposite sign. Rows that see
    # nothing have p = 0 throughout; whatever flows into their constant lse = -inf must not become nan.
    dlse = jnp.where(jnp.isneginf(lse), 0.0, dlse)
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1) - dlse
    dq, dk, dv = xla.backward(q, k, v, queries, keys, options, lse, delta, do)
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (queries, keys))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), *none


local_attention.defvjp(_forward, _backward)
