"""Forward attention kernel for Hopper GPUs (contract.py).

    producer     Q0 Q1 | K0  V0  K1  V1  K2  V2  ...     each copy waits until its slot is free
    consumer 0         | QK0  softmax  PV0 QK1  softmax  PV1 QK2  ...            o, maximum and sum in registers
    consumer 1         |      QK0      softmax  PV0 QK1  softmax  PV1 ...        the other half of the cell's queries
                       |      ^ tensor cores of one consumer work while the other takes exponentials

The two consumers alternate on the tensor cores (`turn`), so that products of one hide the softmax of the other.
Bounds for a cell of 2 x 64 queries that visits 128 keys with head_dim D: 4 * 128 * 128 * D operations (8.4 million at
D = 128; 1.6 microseconds of a multiprocessor's share of 690 TFLOP/s), and 2 * 128 * D * 2 bytes (64 KiB at D = 128;
41 GB/s per multiprocessor, 5.4 TB/s in total, most of it from the L2 cache).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringrl.attention.contract import Inputs, Partial
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
from ringrl.attention.kernels.tuning.mosaic_gpu import forward_blocks
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Side
from ringrl.attention.options import Options
from ringrl.attention.varying import varying_like


class _Operands(NamedTuple):
    """Arrays in device memory: heads counted over the batch, sequences in tiles."""

    q: Ref  # (heads, tiles, own, D)
    kv: Ref  # (2 * kv_heads, tiles, visited, D): keys and values of each head in turn
    queries: Side  # (B, tiles, own)
    keys: Side  # (B, tiles, visited)
    start: Partial | None  # (heads, tiles, own, D) and (heads, tiles, own)


class _Scratch(NamedTuple):
    """Buffers in shared memory."""

    q: Buffer
    k: Buffer
    v: Buffer
    turn: Ref


class _State(NamedTuple):
    """The online softmax of one consumer over the visited keys, with the maximum in units of log 2."""

    o: jax.Array  # (own, D)
    maximum: jax.Array  # (own,)
    total: jax.Array


def _produce(work: Work, groups: int, operands: _Operands, visits: Visits, scratch: _Scratch) -> None:
    """Run the producer warpgroup."""

    def keys_or_values(which: int) -> Callable[..., tuple[Ref, ...]]:
        return lambda head, tile, _: (operands.kv.at[2 * lax.div(head, jnp.int32(groups)) + which, tile],)

    owned = Feed(scratch.q, lambda head, tile: (operands.q.at[head, tile],))
    produce(work, visits, owned, Feed(scratch.k, keys_or_values(0)), Feed(scratch.v, keys_or_values(1)))


def _fold(options: Options, state: _State, products: jax.Array, mask: jax.Array | None) -> tuple[_State, jax.Array]:
    """Rescale the online softmax for one tile of products. Return the state and the tile's weights."""
    s, factor, _ = logits(options, products)
    if mask is not None:
        s = jnp.where(mask, s, -jnp.inf)
    maximum = jnp.maximum(state.maximum, s.max(1) * factor)
    # Without a mask every row has a visible key.
    shift = maximum if mask is None else jnp.where(maximum == -jnp.inf, 0.0, maximum)
    alpha = jnp.exp2(state.maximum - shift)
    p = jnp.exp2(s * factor - across(shift, s.shape, 0))
    o = state.o * across(alpha, state.o.shape, 0)
    return _State(o, maximum, state.total * alpha + p.sum(1)), p


def _consume(
    work: Work,
    options: Options,
    unit: Warpgroup,
    operands: _Operands,
    visits: Visits,
    outputs: tuple[Ref, Ref],
    scratch: _Scratch,
) -> None:
    """Run a consumer warpgroup on its tile of the queries of every cell."""
    me = lax.axis_index("warpgroup")
    q = scratch.q.arrays[0].at[me]

    def turn() -> None:
        plgpu.barrier_arrive(scratch.turn)
        plgpu.barrier_wait(scratch.turn)

    def visit(
        cell: Cell, queries: Side | None, fills: jax.Array, i: jax.Array, carry: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        slot = scratch.k.slot(fills + i)
        plgpu.barrier_wait(scratch.k.ready.at[slot])
        products = unit.product(q, scratch.k.arrays[0].at[slot], meanwhile=turn)
        plgpu.barrier_arrive(scratch.k.free.at[slot])
        mask = None
        if queries is not None:
            tile, _ = work.visited(visits, cell, i)
            mask = tile_mask(options.rule, queries, unit.side(operands.keys, cell.batch, tile, 0), products.shape)
        state, p = _fold(options, _State(*carry), products, mask)
        # The softmax ends before the turn passes to the other consumer.
        state, p = lax.optimization_barrier((state, p.astype(scratch.v.arrays[0].dtype)))
        plgpu.barrier_arrive(scratch.turn)
        plgpu.barrier_wait(scratch.v.ready.at[slot])
        plgpu.barrier_wait(scratch.turn)
        o = unit.accumulate(state.o, p, scratch.v.arrays[0].at[slot])
        plgpu.barrier_arrive(scratch.v.free.at[slot])
        return _State(o, state.maximum, state.total)

    def cell(cell: Cell, fills: jax.Array) -> jax.Array:
        tile = CONSUMERS * cell.number + me
        queries = unit.side(operands.queries, cell.batch, tile, 1)
        state = _begin(unit, operands.start, cell.head, tile, q.shape)
        plgpu.barrier_wait(scratch.q.ready.at[me])
        pl.when(me == 1)(turn)  # offsets the consumers by half a visit
        state = lax.fori_loop(0, cell.full, partial(visit, cell, None, fills), state)
        state = lax.fori_loop(cell.full, cell.total, partial(visit, cell, queries, fills), state)
        plgpu.barrier_arrive(scratch.q.free.at[me])
        # The offset ends with the cell: the next tiles arrive only after both consumers release these queries.
        pl.when(me == 0)(turn)
        _finish(state, outputs, cell.head, tile)
        return fills + cell.total

    work.for_each_cell(visits, cell, jnp.int32(0))


def _begin(unit: Warpgroup, start: Partial | None, head: jax.Array, tile: jax.Array, shape: tuple[int, ...]) -> _State:
    """Start the state. A previous result enters like one key: its log-sum-exp is the maximum, with a sum of one."""
    if start is None:
        rows = plgpu.Layout.WGMMA.reduce(1)
        o, maximum = unit.full(shape, 0.0, plgpu.Layout.WGMMA), unit.full(shape[:1], -jnp.inf, rows)
        return _State(o, maximum, unit.full(shape[:1], 0.0, rows))
    o, lse = unit.load(start.o.at[head, tile], plgpu.Layout.WGMMA), unit.vector(start.lse.at[head, tile], 1)
    total = jnp.where(lse == -jnp.inf, 0.0, 1.0)
    # The product also drops o's type over mesh axes, which a loop inside shard_map rejects (jax 0.10).
    return _State(o * across(total, o.shape, 0), lse * LOG2_E, total)


def _finish(state: _State, outputs: tuple[Ref, Ref], head: jax.Array, tile: jax.Array) -> None:
    """Normalise and write directly from registers."""
    o, lse = outputs
    sees_nothing = state.total == 0
    total = jnp.where(sees_nothing, 1.0, state.total)
    o[head, tile] = state.o * across(1 / total, state.o.shape, 0)
    lse[head, tile] = jnp.where(sees_nothing, -jnp.inf, state.maximum / LOG2_E + jnp.log(total))


def forward(inputs: Inputs, options: Options, start: Partial | None = None, *, interpret: Any = None) -> Partial:
    """Return normalised output and log-sum-exp over these keys, continued from `start`; 0 and -inf without keys.

    `interpret` takes the parameters of JAX's GPU interpret mode. ValueError for unsupported arguments
    (`hopper.unsupported`).
    """
    require_supported(inputs, options)
    q, (batch, tokens), head_dim = inputs.q, inputs.queries.positions.shape, inputs.q.shape[-1]
    own, visited, stages = forward_blocks(head_dim, options)
    query_cells = tile_side(inputs.queries, CONSUMERS * own, PADDING_QUERY)
    key_tiles = tile_side(inputs.keys, visited, PADDING_KEY)
    query_tiles = Side(*(x.reshape(batch, -1, own) for x in query_cells))

    def cut(x: jax.Array) -> jax.Array:
        return tile_array(by_query_head(x, inputs), own, CONSUMERS)

    kv = tile_array(inputs.kv.reshape(-1, *inputs.kv.shape[2:]), visited)
    operands = _Operands(cut(q), kv, query_tiles, key_tiles, None if start is None else jax.tree.map(cut, start))
    plan = visits(options.rule, query_cells, key_tiles, own_queries=True)
    work, unit = Work(inputs.kv_heads * inputs.groups), Warpgroup(interpret is not None)
    q_tile, kv_tile = (jax.ShapeDtypeStruct((rows, head_dim), q.dtype) for rows in (own, visited))
    slots = Buffer.of(stages, CONSUMERS, kv_tile)
    scratch = _Scratch(Buffer.of(CONSUMERS, 1, q_tile), slots, slots, plgpu.Barrier(num_arrivals=CONSUMERS))

    def body(operands: _Operands, visits: Visits, outputs: tuple[Ref, Ref], scratch: _Scratch) -> None:
        consume = partial(_consume, work, options, unit, operands, visits, outputs, scratch)
        by_warpgroup(partial(_produce, work, inputs.groups, operands, visits, scratch), consume)

    outputs = [jax.ShapeDtypeStruct(operands.q.shape[: 4 - i], jnp.float32) for i in range(2)]
    o, lse = work.launch(body, operands, plan, outputs, scratch, interpret)
    return varying_like(q, Partial(untile(o, tokens, q.shape), untile(lse, tokens, q.shape[:2])))
