"""Attention kernels for TPUs (contract.py).

Forward:

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

Backward, one kernel for dq (pairs in order of query tiles) and one for dk and dv (in order of key tiles, for all shares
of the heads). Each pair of tiles adds to sums in scratch, float32:

    p = exp2(logits - lse)                      (block_k, rows)
    ds = p * (v do^T - delta)                   (block_k, rows)
    dq^T += k^T ds,  dk += ds q,  dv += p do    6 * rows * block_k * D operations for dq, 8 for dk and dv

Every output tile is accumulated in one place and in the order of the list, so gradients are bit-identical in every run.
Two products are computed twice; in return only whole tiles are written.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32

from ringrl.attention.contract import LOG2_E, Cotangents, Gradients, Inputs, Partial
from ringrl.attention.kernels import mosaic_tpu_tiles as tiles
from ringrl.attention.mask import Options


def _forward_kernel(  # type: ignore[no-untyped-def]
    pairs, q, k, v, queries, keys, start_o, start_lse, o, lse, accumulator, maximum, total, *, options, tiling
):
    """Process one pair of tiles; arguments are references, `start_*` None without a start."""
    pair = tiles.TilePair.at(pairs, pl.program_id(0), pl.program_id(3), tiling)

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
        s, _ = tiles.logits(options, k[...], q[...].reshape(-1, q.shape[-1]))
        if mask is not None:
            s = jnp.where(mask, s, -jnp.inf)
        new_maximum = jnp.maximum(maximum[...], s.max(0, keepdims=True))
        shift = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)  # rows without a visible key so far
        p = jnp.exp2(s - shift)
        alpha = jnp.exp2(maximum[...] - shift)
        accumulator[...] = accumulator[...] * alpha + tiles.product(v[...], p.astype(v.dtype), (0, 0))
        total[...] = total[...] * alpha + p.sum(0, keepdims=True)
        maximum[...] = new_maximum

    tiles.visit(pair, lambda: tiles.tile_mask(options.rule, queries[...], keys[...]), compute)

    @pl.when(pair.is_last)
    def _finish() -> None:
        divisor = jnp.where(total[...] == 0, 1.0, total[...])
        o[...] = (accumulator[...] / divisor).T.reshape(o.shape)
        lse[...] = (maximum[...] + jnp.log2(total[...])) / LOG2_E


def forward(
    inputs: Inputs, options: Options, start: Partial | None = None, *, interpret: tiles.Interpret = False
) -> Partial:
    """Return normalised output and log-sum-exp over these keys, continued from `start`; 0 and -inf without keys.

    ValueError for more tiles than the list holds (`too_many`).
    """
    q = inputs.q
    tiling = tiles.tiling_of(inputs, options)
    sides = tiles.cut_sides(options.rule, inputs.queries, inputs.keys, tiling)
    specs = tiles.specs_of(tiling, sides)
    kv = tiling.cut_keys(inputs.kv)
    arrays = tiling.cut_queries(q), kv, kv, sides.queries, sides.keys
    started = (None, None) if start is None else (tiling.cut_queries(start.o), tiling.cut_rows(start.lse, -jnp.inf))
    started_specs = (None, None) if start is None else (specs.queries, specs.rows)
    row_shape = (*arrays[0].shape[:3], tiling.query_tiles, 1, tiling.rows)
    shapes = [tiles.shape_like(q, arrays[0].shape), tiles.shape_like(q, row_shape)]
    o, lse = pl.pallas_call(
        partial(_forward_kernel, options=options, tiling=tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiling.batch, tiling.kv_heads, tiling.shares, sides.steps),
            in_specs=[specs.queries, specs.keys, specs.values, specs.query_side, specs.key_side, *started_specs],
            out_specs=[specs.queries, specs.rows],
            scratch_shapes=[pltpu.VMEM((size, tiling.rows), jnp.float32) for size in (tiling.head_dim, 1, 1)],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=tiles.cost(tiling, 2, options, arrays[0], kv, *shapes),
        interpret=interpret,
        name="ring_attention_forward",
    )(sides.pairs, *arrays, *started)
    return Partial(tiling.join_queries(o), tiling.join_rows(lse))


def _tile_gradients(options: Options, mask: jax.Array | None, q, k, v, do, lse, delta) -> tuple[jax.Array, jax.Array]:  # type: ignore[no-untyped-def]
    """Return p and ds (block_k, rows) of a pair of tiles, float32; ds without the scale."""
    s, cap_slope = tiles.logits(options, k, q)
    p = jnp.exp2(jnp.minimum(s - lse, 0.0))  # rounding of large logits must not give weights above 1
    if mask is not None:
        p = jnp.where(mask, p, 0.0)
    ds = p * (tiles.product(v, do, (1, 1)) - delta)
    return p, ds if cap_slope is None else ds * cap_slope


def _rows_of(x) -> jax.Array:  # type: ignore[no-untyped-def]
    """Return the queries of all heads of a tile, (rows, head_dim), from a reference."""
    return x[...].reshape(-1, x.shape[-1])


def _dq_kernel(pairs, q, do, lse, delta, query_side, k, v, key_side, dq, accumulator, *, options, tiling):  # type: ignore[no-untyped-def]
    """Process one pair of tiles; arguments are references."""
    pair = tiles.TilePair.at(pairs, pl.program_id(0), pl.program_id(3), tiling)

    @pl.when(pair.is_first)
    def _start() -> None:
        accumulator[...] = jnp.zeros_like(accumulator)

    def compute(mask: jax.Array | None) -> None:
        keys = k[...]
        _, ds = _tile_gradients(options, mask, _rows_of(q), keys, v[...], _rows_of(do), lse[...], delta[...])
        accumulator[...] += tiles.product(keys, ds.astype(keys.dtype), (0, 0))

    tiles.visit(pair, lambda: tiles.tile_mask(options.rule, query_side[...], key_side[...]), compute)

    @pl.when(pair.is_last)
    def _finish() -> None:
        dq[...] = (accumulator[...] * options.scale).T.reshape(dq.shape)


def _dkv_kernel(pairs, q, do, lse, delta, query_side, k, v, key_side, dkv, dk_sum, dv_sum, *, options, tiling):  # type: ignore[no-untyped-def]
    """Process one pair of tiles for one share of the heads; arguments are references."""
    pair, share = tiles.TilePair.at(pairs, pl.program_id(0), pl.program_id(2), tiling), pl.program_id(3)

    @pl.when(pair.is_first & (share == 0))
    def _start() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def compute(mask: jax.Array | None) -> None:
        queries, cotangents = _rows_of(q), _rows_of(do)
        p, ds = _tile_gradients(options, mask, queries, k[...], v[...], cotangents, lse[...], delta[...])
        dv_sum[...] += tiles.product(p.astype(cotangents.dtype), cotangents, (1, 0))
        dk_sum[...] += tiles.product(ds.astype(queries.dtype), queries, (1, 0))

    tiles.visit(pair, lambda: tiles.tile_mask(options.rule, query_side[...], key_side[...]), compute)

    @pl.when(pair.is_last & (share == tiling.shares - 1))
    def _finish() -> None:
        dkv[0] = dk_sum[...] * options.scale
        dkv[1] = dv_sum[...]


def backward(
    inputs: Inputs,
    options: Options,
    cotangents: Cotangents,
    dq: Float32[Array, "heads rows head_dim"] | None = None,
    *,
    interpret: tiles.Interpret = False,
) -> Gradients:
    """Return the gradients of these keys, and of the queries through these keys, added to `dq` if given.

    `do` is rounded to q's dtype. ValueError as for `forward`.
    """
    do, lse, delta = cotangents
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse) * LOG2_E  # masked rows need any finite value
    cotangents = Cotangents(do.astype(inputs.q.dtype), lse, delta)
    part = _gradients(inputs, options, cotangents, interpret, of_keys=False)
    part = part if dq is None else dq + part
    return Gradients(part, _gradients(inputs, options, cotangents, interpret, of_keys=True))


def _gradients(
    inputs: Inputs, options: Options, cotangents: Cotangents, interpret: tiles.Interpret, *, of_keys: bool
) -> jax.Array:
    """Return dq, or dk and dv, from a kernel that visits the pairs in order of query tiles or of key tiles."""
    tiling = tiles.tiling_of(inputs, options)
    sides = tiles.cut_sides(options.rule, inputs.queries, inputs.keys, tiling, by_key=of_keys)
    specs = tiles.specs_of(tiling, sides, by_key=of_keys)
    queries = *map(tiling.cut_queries, (inputs.q, cotangents.do)), *map(tiling.cut_rows, cotangents[1:]), sides.queries
    kv = tiling.cut_keys(inputs.kv)
    arrays = *queries, kv, kv, sides.keys
    shape = tiles.shape_like(inputs.q, (kv if of_keys else arrays[0]).shape)
    sums = [(tiling.block_k, tiling.head_dim)] * 2 if of_keys else [(tiling.head_dim, tiling.rows)]
    loops = (sides.steps, tiling.shares) if of_keys else (tiling.shares, sides.steps)
    result = pl.pallas_call(
        partial(_dkv_kernel if of_keys else _dq_kernel, options=options, tiling=tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiling.batch, tiling.kv_heads, *loops),
            in_specs=[
                *[specs.queries] * 2,
                *[specs.rows] * 2,
                specs.query_side,
                specs.keys,
                specs.values,
                specs.key_side,
            ],
            out_specs=specs.keys_and_values if of_keys else specs.queries,
            scratch_shapes=[pltpu.VMEM(sizes, jnp.float32) for sizes in sums],
        ),
        out_shape=shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if of_keys else "parallel", "arbitrary")
        ),
        cost_estimate=tiles.cost(tiling, 4 if of_keys else 3, options, *arrays[:-2], shape),
        interpret=interpret,
        name="ring_attention_dkv" if of_keys else "ring_attention_dq",
    )(sides.pairs, *arrays)
    return tiling.join_keys(result) if of_keys else tiling.join_queries(result)
