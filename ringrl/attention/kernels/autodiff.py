"""Attention that JAX itself differentiates: forward mode, any order, slopes and a learned soft cap.

Masks and skipped tiles are those of the other kernels, but every loop has a fixed length, and the backward pass
recomputes each tile of queries. Memory stays O(S + T); the gradient is slower. The second derivatives of all kernels
come from here (attend.py).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ringrl.attention.contract import Inputs, Partial, nothing_seen, pad_axis, precision_of
from ringrl.attention.kernels import xla
from ringrl.attention.mask import Options, classify, visible


def forward(inputs: Inputs, options: Options, start: Partial | None = None) -> Partial:
    """Return normalised output and log-sum-exp over these keys, continued from `start`; 0 and -inf without keys."""
    blocks, rows = xla.blocks_of(options, inputs), inputs.q.shape[1]
    whole = xla.prepared(inputs, blocks)
    of_keys = (
        xla.into_tiles(whole.kv, 2, blocks.keys),
        jax.tree.map(lambda x: xla.into_tiles(x, 1, blocks.keys), whole.keys),
    )

    @jax.checkpoint
    def query_tile(tile):  # type: ignore[no-untyped-def]
        q, slopes, seen, queries = tile

        def visit(carry, of_keys):  # type: ignore[no-untyped-def]
            kv, keys = of_keys
            is_visible = classify(options.rule, queries, keys).any_visible
            fold = partial(_fold, options, inputs.soft_cap, q, slopes, queries, keys, kv)
            return lax.cond(is_visible, fold, lambda carry: carry, carry), None

        # The previous result is treated as one key whose logit is its log-sum-exp.
        shift, is_empty = lax.stop_gradient(seen.lse), jnp.isneginf(seen.lse)
        total = jnp.where(is_empty, 0.0, jnp.exp(jnp.where(is_empty, 0.0, seen.lse - shift)))
        (weighted, total, shift), _ = lax.scan(visit, (seen.o * total[..., None], total, shift), of_keys)
        is_empty = total == 0
        total = jnp.where(is_empty, 1.0, total)
        return Partial(weighted / total[..., None], jnp.where(is_empty, -jnp.inf, shift + jnp.log(total)))

    seen = nothing_seen(inputs.q) if start is None else start
    of_rows = jax.tree.map(lambda x: pad_axis(x, 1, blocks.queries), (inputs.q, inputs.slopes, seen))
    tiles = jax.tree.map(lambda x: xla.into_tiles(x, 1, blocks.queries), (*of_rows, whole.queries))
    found: Partial = lax.map(query_tile, tiles)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :rows], found)


def _fold(options, soft_cap, q, slopes, queries, keys, kv, carry):  # type: ignore[no-untyped-def]
    """Fold one tile of keys into (sum of weighted values, sum of weights, shift): weights are exp(logit - shift).

    The shift cancels in the results, so that it needs no derivative.
    """
    weighted, total, shift = carry
    product = partial(jnp.matmul, precision=precision_of(q))
    s = product(q, jnp.swapaxes(kv[:, 0], 1, 2)) * options.scale
    cap = options.logits_soft_cap if soft_cap is None else soft_cap
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    if slopes is not None:
        distance = jnp.abs(queries.positions[..., :, None] - keys.positions[..., None, :])
        s -= slopes[..., None] * distance.astype(jnp.float32)
    s = jnp.where(visible(options.rule, queries, keys), s, -jnp.inf)
    highest = lax.stop_gradient(jnp.maximum(shift, s.max(-1)))
    base = jnp.where(jnp.isneginf(highest), 0.0, highest)  # rows without a visible key so far
    p, before = jnp.exp(s - base[..., None]), jnp.exp(shift - base)
    return weighted * before[..., None] + product(p, kv[:, 1]), total * before + p.sum(-1), highest
