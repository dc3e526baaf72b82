"""Backward attention kernels for Hopper GPUs: one kernel for dq and one for dk and dv.

    dq:       producer   Q dO Q dO | K0 V0   K1 V1   K2 V2 ...
              consumers            | S=QK  dP=dOV  P=exp(S-lse)  dS=P(dP-delta)  dQ+=dS K |  next visit ...
    dk, dv:   producer   K V K V   | Q0 dO0  Q1 dO1  Q2 dO2 ...    all heads that share this key head
              consumers            | S'=KQ' dP'=VdO'  P'  dV+=P'dO  dS'  dK+=dS'Q         |  next visit ...
                                     ^ both products are issued at once; P is computed while dP is running

Each kernel accumulates its sums in registers. Without atomic additions, gradients are the same in every run. The cost
is that S and dP are computed twice: seven products of 2 * 128 * V * D operations for a cell of 2 x 64 rows and V
visited rows, instead of five. dq takes 6 * 128 * V * D operations (6.3 million at V = 64, D = 128; 1.2 microseconds at
a multiprocessor's share of 690 TFLOP/s), dk and dv take 8 * 128 * V * D. A visit reads 2 * V * D * 2 bytes (32 KiB;
27 GB/s per multiprocessor in dq).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from ringrl.attention.contract import Cotangents, Gradients, Inputs
from ringrl.attention.kernels.hopper import (
    CONSUMERS,
    LOG2_E,
    Buffer,
    Cell,
    Feed,
    Ref,
    Visits,
    Warpgroup,
    Work,
    across,
    by_query_head,
    by_warpgroup,
    logits,
    produce,
    require_supported,
    tile_array,
    tile_mask,
    tile_side,
    untile,
    visits,
)
from ringrl.attention.kernels.tuning.mosaic_gpu import key_gradient_blocks, query_gradient_blocks
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Side
from ringrl.attention.options import Options
from ringrl.attention.varying import varying_like


class _Operands(NamedTuple):
    """Arrays in device memory, in tiles of `own` or `visited` tokens; heads counted over the batch."""

    q: Ref  # (heads, tiles, tokens, D)
    do: Ref
    lse: Ref  # (heads, tiles, tokens), in units of log 2
    delta: Ref
    kv: Ref  # (2 * kv_heads, tiles, tokens, D): keys and values of each head in turn
    queries: Side  # (B, tiles, tokens)
    keys: Side


class _Scratch(NamedTuple):
    """Buffers in shared memory."""

    owned: Buffer
    visited: Buffer


def _weights(
    options: Options, lse: jax.Array, mask: jax.Array | None, axis: int, products: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Return the softmax weights of a tile from the log-sum-exp along `axis`, and the derivative of the cap."""
    s, factor, slope = logits(options, products)
    # Rounding of large logits must not give weights above 1.
    p = jnp.exp2(jnp.minimum(s * factor - across(lse, s.shape, axis), 0.0))
    return (p if mask is None else jnp.where(mask, p, 0.0)), slope


def _logit_gradients(
    p: jax.Array, slope: jax.Array | None, dp: jax.Array, delta: jax.Array, axis: int, dtype: jnp.dtype
) -> jax.Array:
    """Return the gradient of the logits without their scale."""
    ds = p * (dp - across(delta, dp.shape, axis))
    return (ds if slope is None else ds * slope).astype(dtype)


def _consume_queries(
    work: Work,
    options: Options,
    unit: Warpgroup,
    operands: _Operands,
    visits: Visits,
    outputs: tuple[Ref, ...],
    scratch: _Scratch,
) -> None:
    """Run a consumer of the dq kernel on its tile of queries, over the visited keys."""
    me = lax.axis_index("warpgroup")
    q, do = (x.at[me] for x in scratch.owned.arrays)

    def cell(cell: Cell, fills: jax.Array) -> jax.Array:
        tile = CONSUMERS * cell.number + me
        queries = unit.side(operands.queries, cell.batch, tile, 1)
        lse, delta = (unit.vector(x.at[cell.head, tile], 1) for x in (operands.lse, operands.delta))
        plgpu.barrier_wait(scratch.owned.ready.at[me])

        def visit(is_full: bool, i: jax.Array, dq: jax.Array) -> jax.Array:
            slot = scratch.visited.slot(fills + i)
            k, v = (x.at[slot] for x in scratch.visited.arrays)
            mask = None
            if not is_full:
                keys = unit.side(operands.keys, cell.batch, work.visited(visits, cell, i)[0], 0)
                mask = tile_mask(options.rule, queries, keys, (q.shape[0], k.shape[0]))
            plgpu.barrier_wait(scratch.visited.ready.at[slot])
            (p, slope), dp = unit.two_products(q, k, do, v, partial(_weights, options, lse, mask, 0))
            dq = unit.accumulate(dq, _logit_gradients(p, slope, dp, delta, 0, q.dtype), k)
            plgpu.barrier_arrive(scratch.visited.free.at[slot])
            return dq

        dq = unit.full(q.shape, 0.0, plgpu.Layout.WGMMA)
        dq = lax.fori_loop(0, cell.full, partial(visit, True), dq)
        dq = lax.fori_loop(cell.full, cell.total, partial(visit, False), dq)
        plgpu.barrier_arrive(scratch.owned.free.at[me])
        outputs[0][cell.head, tile] = dq * options.scale
        return fills + cell.total

    work.for_each_cell(visits, cell, jnp.int32(0))


def _consume_keys(
    work: Work,
    options: Options,
    unit: Warpgroup,
    operands: _Operands,
    visits: Visits,
    outputs: tuple[Ref, ...],
    scratch: _Scratch,
) -> None:
    """Run a consumer of the dk, dv kernel on its tile of keys, over the visited queries; tiles are transposed."""
    me = lax.axis_index("warpgroup")
    k, v = (x.at[me] for x in scratch.owned.arrays)

    def cell(cell: Cell, fills: jax.Array) -> jax.Array:
        tile = CONSUMERS * cell.number + me
        keys = unit.side(operands.keys, cell.batch, tile, 1)
        plgpu.barrier_wait(scratch.owned.ready.at[me])

        def visit(is_full: bool, i: jax.Array, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dk, dv = gradients
            slot = scratch.visited.slot(fills + i)
            q, do, lse, delta = (x.at[slot] for x in scratch.visited.arrays)
            mask = None
            if not is_full:
                queries = unit.side(operands.queries, cell.batch, work.visited(visits, cell, i)[0], 0)
                mask = tile_mask(options.rule, queries, keys, (k.shape[0], q.shape[0]), query_axis=1)
            plgpu.barrier_wait(scratch.visited.ready.at[slot])
            weights = partial(_weights, options, unit.vector(lse, 0), mask, 1)
            (p, slope), dp = unit.two_products(k, q, v, do, weights)
            dv = unit.accumulate(dv, p.astype(q.dtype), do)
            dk = unit.accumulate(dk, _logit_gradients(p, slope, dp, unit.vector(delta, 0), 1, q.dtype), q)
            plgpu.barrier_arrive(scratch.visited.free.at[slot])
            return dk, dv

        zero = unit.full(k.shape, 0.0, plgpu.Layout.WGMMA)
        gradients = lax.fori_loop(0, cell.full, partial(visit, True), (zero, zero))
        dk, dv = lax.fori_loop(cell.full, cell.total, partial(visit, False), gradients)
        plgpu.barrier_arrive(scratch.owned.free.at[me])
        outputs[0][2 * cell.head, tile] = dk * options.scale
        outputs[0][2 * cell.head + 1, tile] = dv
        return fills + cell.total

    work.for_each_cell(visits, cell, jnp.int32(0))


def _cut(
    inputs: Inputs, cotangents: Cotangents, query_tile: int, key_tile: int, *, own_queries: bool
) -> tuple[_Operands, Side, Side]:
    """Return all arrays in tiles, and both sides in cells (owned) or tiles (visited)."""
    per_query_cell, per_key_cell = (CONSUMERS, 1) if own_queries else (1, CONSUMERS)
    queries = tile_side(inputs.queries, per_query_cell * query_tile, PADDING_QUERY)
    keys = tile_side(inputs.keys, per_key_cell * key_tile, PADDING_KEY)
    query_tiles, key_tiles = (
        Side(*(x.reshape(x.shape[0], -1, size) for x in side))
        for side, size in ((queries, query_tile), (keys, key_tile))
    )
    q, do, lse, delta = (
        tile_array(by_query_head(x, inputs), query_tile, per_query_cell) for x in (inputs.q, *cotangents)
    )
    kv = tile_array(inputs.kv.reshape(-1, *inputs.kv.shape[2:]), key_tile, per_key_cell)
    return _Operands(q, do, lse, delta, kv, query_tiles, key_tiles), queries, keys


def _query_gradient(inputs: Inputs, cotangents: Cotangents, options: Options, interpret: Any) -> jax.Array:
    """Return dq, from a kernel that owns queries and visits keys."""
    q, groups = inputs.q, inputs.groups
    own, visited, stages = query_gradient_blocks(q.shape[-1], options)
    operands, queries, keys = _cut(inputs, cotangents, own, visited, own_queries=True)
    plan = visits(options.rule, queries, keys, own_queries=True)
    work = Work(inputs.kv_heads * groups)
    owned_tile, visited_tile = (jax.ShapeDtypeStruct((rows, q.shape[-1]), q.dtype) for rows in (own, visited))
    scratch = _Scratch(
        Buffer.of(CONSUMERS, 1, owned_tile, owned_tile),
        Buffer.of(stages, CONSUMERS, visited_tile, visited_tile),
    )

    def body(operands: _Operands, visits: Visits, outputs: tuple[Ref, ...], scratch: _Scratch) -> None:
        def keys_of(head: jax.Array, tile: jax.Array, _: jax.Array) -> tuple[Ref, ...]:
            k = 2 * lax.div(head, jnp.int32(groups))
            return operands.kv.at[k, tile], operands.kv.at[k + 1, tile]

        owned = Feed(scratch.owned, lambda head, tile: (operands.q.at[head, tile], operands.do.at[head, tile]))
        unit = Warpgroup(interpret is not None)
        by_warpgroup(
            partial(produce, work, visits, owned, Feed(scratch.visited, keys_of)),
            partial(_consume_queries, work, options, unit, operands, visits, outputs, scratch),
        )

    outputs = [jax.ShapeDtypeStruct(operands.q.shape, jnp.float32)]
    (dq,) = work.launch(body, operands, plan, outputs, scratch, interpret)
    return untile(dq, inputs.queries.positions.shape[1], q.shape)


def _key_gradients(inputs: Inputs, cotangents: Cotangents, options: Options, interpret: Any) -> jax.Array:
    """Return dk and dv, from a kernel that owns keys and visits the queries of all heads that share them."""
    q, groups = inputs.q, inputs.groups
    own, visited, stages = key_gradient_blocks(q.shape[-1], options)
    operands, queries, keys = _cut(inputs, cotangents, visited, own, own_queries=False)
    plan = visits(options.rule, queries, keys, own_queries=False)
    work = Work(inputs.kv_heads, groups)
    owned_tile, visited_tile = (jax.ShapeDtypeStruct((rows, q.shape[-1]), q.dtype) for rows in (own, visited))
    row_values = jax.ShapeDtypeStruct((visited,), jnp.float32)
    scratch = _Scratch(
        Buffer.of(CONSUMERS, 1, owned_tile, owned_tile),
        Buffer.of(stages, CONSUMERS, visited_tile, visited_tile, row_values, row_values),
    )

    def body(operands: _Operands, visits: Visits, outputs: tuple[Ref, ...], scratch: _Scratch) -> None:
        def queries_of(kv_head: jax.Array, tile: jax.Array, group: jax.Array) -> tuple[Ref, ...]:
            head = kv_head * groups + group
            return tuple(x.at[head, tile] for x in (operands.q, operands.do, operands.lse, operands.delta))

        def keys_of(kv_head: jax.Array, tile: jax.Array) -> tuple[Ref, ...]:
            return operands.kv.at[2 * kv_head, tile], operands.kv.at[2 * kv_head + 1, tile]

        unit = Warpgroup(interpret is not None)
        by_warpgroup(
            partial(produce, work, visits, Feed(scratch.owned, keys_of), Feed(scratch.visited, queries_of)),
            partial(_consume_keys, work, options, unit, operands, visits, outputs, scratch),
        )

    outputs = [jax.ShapeDtypeStruct(operands.kv.shape, jnp.float32)]
    (dkv,) = work.launch(body, operands, plan, outputs, scratch, interpret)
    return untile(dkv, inputs.kv.shape[2], inputs.kv.shape)


def backward(
    inputs: Inputs,
    options: Options,
    cotangents: Cotangents,
    dq: Float32[Array, "heads rows head_dim"] | None = None,
    *,
    interpret: Any = None,
) -> Gradients:
    """Return the gradients of these keys, and of the queries through these keys, added to `dq` if given.

    `do` is rounded to q's dtype. `interpret` takes the parameters of JAX's GPU interpret mode. ValueError for
    unsupported arguments (`hopper.unsupported`).
    """
    require_supported(inputs, options)
    do, lse, delta = cotangents
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse) * LOG2_E  # masked rows need any finite value
    cotangents = Cotangents(do.astype(inputs.q.dtype), lse, delta)
    dq_part = _query_gradient(inputs, cotangents, options, interpret)
    dkv = _key_gradients(inputs, cotangents, options, interpret)
    return varying_like(inputs.q, Gradients(dq_part if dq is None else dq + dq_part, dkv))
