"""Attention over one block of keys on Hopper GPUs, forward: the contract of contract.py on tensor cores.

    producer     Q0 Q1 | K0  V0  K1  V1  K2  V2  ...     copies into slots, each waits for the slot to be free
    consumer 0         | QK0  softmax  PV0 QK1  softmax  PV1 QK2  ...            o, maximum and sum in registers
    consumer 1         |      QK0      softmax  PV0 QK1  softmax  PV1 ...        the other half of the cell's queries
                       |      ^ tensor cores of one consumer work while the other takes exponentials

The two consumers pass the tensor cores to and fro (`turn`), so that products of one hide the softmax of the other.
What bounds it, for a cell of 2 x 64 queries that visits 128 keys with head_dim D: 4 * 128 * 128 * D operations
(8.4 million at D = 128; 1.6 microseconds of a multiprocessor's share of 690 TFLOP/s), and 2 * 128 * D * 2 bytes
(64 KiB at D = 128; 41 GB/s per multiprocessor, 5.4 TB/s in all, most of it from the L2 cache).
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
    """In device memory: heads counted over the batch, sequences cut into tiles."""

    q: Ref  # (heads, tiles, own, D)
    kv: Ref  # (2 * kv_heads, tiles, visited, D): keys and values of each head in turn
    queries: Side  # (B, tiles, own)
    keys: Side  # (B, tiles, visited)
    start: Partial | None  # (heads, tiles, own, D) and (heads, tiles, own)


class _Scratch(NamedTuple):
    """In shared memory."""

    q: Buffer
    k: Buffer
    v: Buffer
    turn: Ref


class _State(NamedTuple):
    """The online softmax of one consumer: maximum in units of log 2, over what was visited so far."""

    o: jax.Array  # (own, D)
    maximum: jax.Array  # (own,)
    total: jax.Array


def _produce(work: Work, groups: int, operands: _Operands, visits: Visits, scratch: _Scratch) -> None:
    """The producer warpgroup."""

    def keys_or_values(which: int) -> Callable[..., tuple[Ref, ...]]:
        return lambda head, tile, _: (operands.kv.at[2 * lax.div(head, jnp.int32(groups)) + which, tile],)

    owned = Feed(scratch.q, lambda head, tile: (operands.q.at[head, tile],))
    produce(work, visits, owned, Feed(scratch.k, keys_or_values(0)), Feed(scratch.v, keys_or_values(1)))


def _fold(options: Options, state: _State, products: jax.Array, mask: jax.Array | None) -> tuple[_State, jax.Array]:
    """Online softmax: rescale the state for one tile of products; and the tile's weights."""
    s, factor, _ = logits(options, products)
    if mask is not None:
        s = jnp.where(mask, s, -jnp.inf)
    maximum = jnp.maximum(state.maximum, s.max(1) * factor)
    # Only where a mask is can a row have seen nothing so far.
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
    """A consumer warpgroup: its tile of the queries of every cell."""
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
        # All of the softmax comes before the turn is passed on: the other consumer's begins there.
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
        pl.when(me == 1)(turn)  # from here on the consumers are half a visit apart
        state = lax.fori_loop(0, cell.full, partial(visit, cell, None, fills), state)
        state = lax.fori_loop(cell.full, cell.total, partial(visit, cell, queries, fills), state)
        plgpu.barrier_arrive(scratch.q.free.at[me])
        # Not left to the next cell: its first tiles come only when both consumers are done with these queries.
        pl.when(me == 0)(turn)
        _finish(state, outputs, cell.head, tile)
        return fills + cell.total

    work.for_each_cell(visits, cell, jnp.int32(0))


def _begin(unit: Warpgroup, start: Partial | None, head: jax.Array, tile: jax.Array, shape: tuple[int, ...]) -> _State:
    """What was seen before enters like one more key: its log-sum-exp as the maximum, with a sum of one."""
    if start is None:
        rows = plgpu.Layout.WGMMA.reduce(1)
        o, maximum = unit.full(shape, 0.0, plgpu.Layout.WGMMA), unit.full(shape[:1], -jnp.inf, rows)
        return _State(o, maximum, unit.full(shape[:1], 0.0, rows))
    o, lse = unit.load(start.o.at[head, tile], plgpu.Layout.WGMMA), unit.vector(start.lse.at[head, tile], 1)
    total = jnp.where(lse == -jnp.inf, 0.0, 1.0)
    # The product also drops o's type over mesh axes, which a loop inside shard_map would refuse (jax 0.10).
    return _State(o * across(total, o.shape, 0), lse * LOG2_E, total)


def _finish(state: _State, outputs: tuple[Ref, Ref], head: jax.Array, tile: jax.Array) -> None:
    """Normalise and write straight from registers."""
    o, lse = outputs
    sees_nothing = state.total == 0
    total = jnp.where(sees_nothing, 1.0, state.total)
    o[head, tile] = state.o * across(1 / total, state.o.shape, 0)
    lse[head, tile] = jnp.where(sees_nothing, -jnp.inf, state.maximum / LOG2_E + jnp.log(total))


def forward(inputs: Inputs, options: Options, start: Partial | None = None, *, interpret: Any = None) -> Partial:
    """Normalised output and log-sum-exp over these keys and those that `start` has seen; nothing seen is 0 and -inf.

    ValueError where `hopper.unsupported` has a reason. `interpret` takes the parameters of JAX's GPU interpret mode.
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
