"""Forward attention kernel for TPUs (contract.py).

    for each context, key head, share of the heads             (any order, over the cores)
      for each pair (query tile, key tile) of the list         (in order; the next tiles are prefetched)

        q (rows, D)      is kept for all pairs of a query tile
          |              k (block_k, D)      v (block_k, D)    arrive for each pair
          |                 |                   |
          +--> k q^T -------+                   |
                |  scale, cap, mask if partial  |
              logits (block_k, rows)            |
                |  running maximum              |
              exp2 -> p --------> v^T p --------+
                |                   |
              running sum         accumulator (D, rows)        in scratch, float32
                                    |  last pair of the query tile
                                  o (rows, D), lse (1, rows)

    operations per tile     4 * rows * block_k * D, and rows * block_k powers of two
    bytes per tile          2 * block_k * D * itemsize: k and v; q, o and lse once per query tile

`rows` counts the queries of all heads that share the key head. Each key is loaded once for all of them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringrl.attention.contract import Inputs, Partial
from ringrl.attention.kernels.mosaic_tpu_tiles import (
    LOG2_E,
    Interpret,
    Pair,
    Place,
    cost,
    cut_sides,
    logits,
    product,
    shape_like,
    specs_of,
    tile_mask,
    tiling_of,
    visit,
)
from ringrl.attention.options import Options


def _kernel(pairs, q, k, v, queries, keys, start_o, start_lse, o, lse, accumulator, maximum, total, *, options, tiling):  # type: ignore[no-untyped-def]
    """Process one pair of tiles; arguments are references, `start_*` None without a start."""
    pair = Pair.at(pairs, pl.program_id(0), pl.program_id(3), tiling)

    @pl.when(pair.is_first)
    def _start() -> None:
        if start_o is None:
            accumulator[...] = jnp.zeros_like(accumulator)
            maximum[...] = jnp.full_like(maximum, -jnp.inf)
            total[...] = jnp.zeros_like(total)
        else:  # the previous result enters like one key: its log-sum-exp is the maximum, with a sum of one
            accumulator[...] = start_o[...].reshape(-1, start_o.shape[-1]).T
            maximum[...] = start_lse[...] * LOG2_E
            total[...] = jnp.where(start_lse[...] == -jnp.inf, 0.0, 1.0)

    def compute(mask: jax.Array | None) -> None:
        s, _ = logits(options, k[...], q[...].reshape(-1, q.shape[-1]))
        if mask is not None:
            s = jnp.where(mask, s, -jnp.inf)
        new_maximum = jnp.maximum(maximum[...], s.max(0, keepdims=True))
        shift = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)  # rows without a visible key so far
        p = jnp.exp2(s - shift)
        alpha = jnp.exp2(maximum[...] - shift)
        accumulator[...] = accumulator[...] * alpha + product(v[...], p.astype(v.dtype), (0, 0))
        total[...] = total[...] * alpha + p.sum(0, keepdims=True)
        maximum[...] = new_maximum

    visit(pair, lambda: tile_mask(options.rule, queries[...], keys[...]), compute)

    @pl.when(pair.is_last)
    def _finish() -> None:
        divisor = jnp.where(total[...] == 0, 1.0, total[...])
        o[...] = (accumulator[...] / divisor).T.reshape(o.shape)
        lse[...] = (maximum[...] + jnp.log2(total[...])) / LOG2_E


def forward(inputs: Inputs, options: Options, start: Partial | None = None, *, interpret: Interpret = False) -> Partial:
    """Return normalised output and log-sum-exp over these keys, continued from `start`; 0 and -inf without keys.

    ValueError for unsupported arguments (`unsupported`) and for more tiles than the list holds (`too_many`).
    """
    q = inputs.q
    tiling = tiling_of("forward", inputs, options)
    sides = cut_sides(options.rule, inputs.queries, inputs.keys, tiling)

    def place(context, head, share, step, pairs) -> Place:  # type: ignore[no-untyped-def]
        pair = Pair.at(pairs, context, step, tiling)
        return Place(context, head, share, pair.outer, pair.inner)

    specs = specs_of(tiling, place)
    kv = tiling.cut_keys(inputs.kv)
    arrays = tiling.cut_queries(q), kv, kv, sides.queries, sides.keys
    started = (None, None) if start is None else (tiling.cut_queries(start.o), tiling.cut_rows(start.lse, -jnp.inf))
    started_specs = (None, None) if start is None else (specs.queries, specs.rows)
    shapes = [
        shape_like(q, arrays[0].shape),
        shape_like(q, (*arrays[0].shape[:3], tiling.query_tiles, 1, tiling.rows)),
    ]
    o, lse = pl.pallas_call(
        partial(_kernel, options=options, tiling=tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiling.batch, tiling.kv_heads, tiling.shares, sides.steps),
            in_specs=[specs.queries, specs.keys, specs.values, specs.query_side, specs.key_side, *started_specs],
            out_specs=[specs.queries, specs.rows],
            scratch_shapes=[
                pltpu.VMEM((tiling.head_dim, tiling.rows), jnp.float32),
                pltpu.VMEM((1, tiling.rows), jnp.float32),
                pltpu.VMEM((1, tiling.rows), jnp.float32),
            ],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=cost(tiling, 2, options, arrays[0], kv, *shapes),
        interpret=interpret,
        name="ring_attention_forward",
    )(sides.pairs, *arrays, *started)
    return Partial(tiling.join_queries(o), tiling.join_rows(lse))
