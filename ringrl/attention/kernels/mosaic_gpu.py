"""Attention kernels for Hopper GPUs (contract.py).

Forward:

    producer     Q0 Q1 | K0  V0  K1  V1  K2  V2  ...     each copy waits until its slot is free
    consumer 0         | QK0  softmax  PV0 QK1  softmax  PV1 QK2  ...            o, maximum and sum in registers
    consumer 1         |      QK0      softmax  PV0 QK1  softmax  PV1 ...        the other half of the cell's queries
                       |      ^ tensor cores of one consumer work while the other takes exponentials

The two consumers alternate on the tensor cores (`turn`), so that products of one hide the softmax of the other.
A cell of 2 x 64 queries that visits V keys with head_dim D takes 4 * 128 * V * D operations and reads 4 * V * D bytes.

Backward, one kernel for dq and one for dk and dv:

    dq:       producer   Q dO Q dO | K0 V0   K1 V1   K2 V2 ...
              consumers            | S=QK  dP=dOV  P=exp(S-lse)  dS=P(dP-delta)  dQ+=dS K |  next visit ...
    dk, dv:   producer   K V K V   | Q0 dO0  Q1 dO1  Q2 dO2 ...    all heads that share this key head
              consumers            | S'=KQ' dP'=VdO'  P'  dV+=P'dO  dS'  dK+=dS'Q         |  next visit ...
                                     ^ both products are issued at once; P is computed while dP is running

Each kernel accumulates its sums in registers. Without atomic additions, gradients are the same in every run. The cost
is that S and dP are computed twice: seven products instead of five, three for dq and four for dk and dv.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from ringrl.attention.contract import LOG2_E, Cotangents, Gradients, Inputs, Partial, varying_like
from ringrl.attention.kernels import hopper
from ringrl.attention.kernels.hopper import CONSUMERS, Buffer, Feed, Ref, Visits, Warpgroup, WorkCell, WorkDivision
from ringrl.attention.kernels.tuning import hopper_blocks
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Options, Side, tile_side


class _Operands(NamedTuple):
    """Arrays in device memory, in tiles of `own` or `visited` tokens; heads counted over the batch."""

    q: Ref  # (heads, tiles, tokens, D)
    by_query: Any  # in tiles as q: the start of the forward pass (or None), the cotangents of the backward pass
    kv: Ref  # (2 * kv_heads, tiles, tokens, D): keys and values of each head in turn
    queries: Side  # (B, tiles, tokens)
    keys: Side


def _cut(
    inputs: Inputs, by_query: Any, query_tile: int, key_tile: int, *, own_queries: bool
) -> tuple[_Operands, Side, Side]:
    """Return all arrays in tiles, and both sides in cells (owned) or tiles (visited)."""
    per_query_cell, per_key_cell = (CONSUMERS, 1) if own_queries else (1, CONSUMERS)
    queries = tile_side(inputs.queries, per_query_cell * query_tile, PADDING_QUERY)
    keys = tile_side(inputs.keys, per_key_cell * key_tile, PADDING_KEY)
    query_tiles, key_tiles = (
        jax.tree.map(lambda x, size=size: x.reshape(x.shape[0], -1, size), side)
        for side, size in ((queries, query_tile), (keys, key_tile))
    )

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, inputs.queries.positions.shape[1], *x.shape[2:])  # (N * groups, S, ...)
        return hopper.tile_array(x, query_tile, per_query_cell)

    kv = hopper.tile_array(inputs.kv.reshape(-1, *inputs.kv.shape[2:]), key_tile, per_key_cell)
    return _Operands(cut(inputs.q), jax.tree.map(cut, by_query), kv, query_tiles, key_tiles), queries, keys


class _Program(NamedTuple):
    """A running kernel: its settings and its references."""

    work: WorkDivision
    options: Options
    unit: Warpgroup
    operands: _Operands
    visits: Visits
    outputs: tuple[Ref, ...]
    scratch: Any  # buffers in shared memory

    def fold(self, cell: WorkCell, visit: Callable[[bool, jax.Array, Any], Any], carry: Any) -> Any:
        """Fold carry = visit(is_full, i, carry) over the visits of a cell, full tiles first."""
        carry = lax.fori_loop(0, cell.full, partial(visit, True), carry)
        return lax.fori_loop(cell.full, cell.total, partial(visit, False), carry)

    def visited_side(self, side: Side, cell: WorkCell, i: jax.Array) -> Side:
        """Load the integers of the tile of visit i."""
        tile, _ = self.work.visited(self.visits, cell, i)
        return self.unit.side(side, cell.batch, tile, 0)


class _State(NamedTuple):
    """The online softmax of one consumer over the visited keys, with the maximum in units of log 2."""

    o: jax.Array  # (own, D)
    maximum: jax.Array  # (own,)
    total: jax.Array


def _produce(work: WorkDivision, groups: int, operands: _Operands, visits: Visits, *slots: Buffer) -> None:
    """Run the producer warpgroup."""
    of_q, of_k, of_v = slots

    def keys_or_values(which: int) -> Callable[..., tuple[Ref, ...]]:
        return lambda head, tile, _: (operands.kv.at[2 * lax.div(head, jnp.int32(groups)) + which, tile],)

    owned = Feed(of_q, lambda head, tile: (operands.q.at[head, tile],))
    hopper.produce(work, visits, owned, Feed(of_k, keys_or_values(0)), Feed(of_v, keys_or_values(1)))


def _fold(options: Options, state: _State, products: jax.Array, mask: jax.Array | None) -> tuple[_State, jax.Array]:
    """Rescale the online softmax for one tile of products. Return the state and the tile's weights."""
    s, factor, _ = hopper.logits(options, products)
    if mask is not None:
        s = jnp.where(mask, s, -jnp.inf)
    maximum = jnp.maximum(state.maximum, s.max(1) * factor)
    # Without a mask every row has a visible key.
    shift = maximum if mask is None else jnp.where(maximum == -jnp.inf, 0.0, maximum)
    alpha = jnp.exp2(state.maximum - shift)
    p = jnp.exp2(s * factor - hopper.across(shift, s.shape, 0))
    o = state.o * hopper.across(alpha, state.o.shape, 0)
    return _State(o, maximum, state.total * alpha + p.sum(1)), p


def _consume(program: _Program) -> None:
    """Run a consumer warpgroup on its tile of the queries of every cell."""
    work, options, unit, operands, visits, outputs, (of_q, of_k, of_v, barrier) = program
    me = lax.axis_index("warpgroup")
    q = of_q.arrays[0].at[me]

    def turn() -> None:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def cell(cell: WorkCell, fills: jax.Array) -> jax.Array:
        tile = CONSUMERS * cell.number + me
        queries = unit.side(operands.queries, cell.batch, tile, 1)

        def visit(is_full: bool, i: jax.Array, state: _State) -> _State:
            slot = of_k.slot(fills + i)
            plgpu.barrier_wait(of_k.ready.at[slot])
            products = unit.product(q, of_k.arrays[0].at[slot], meanwhile=turn)
            plgpu.barrier_arrive(of_k.free.at[slot])
            mask = None
            if not is_full:
                keys = program.visited_side(operands.keys, cell, i)
                mask = hopper.tile_mask(options.rule, queries, keys, products.shape)
            state, p = _fold(options, state, products, mask)
            # The softmax ends before the turn passes to the other consumer.
            state, p = lax.optimization_barrier((state, p.astype(of_v.arrays[0].dtype)))
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(of_v.ready.at[slot])
            plgpu.barrier_wait(barrier)
            o = unit.accumulate(state.o, p, of_v.arrays[0].at[slot])
            plgpu.barrier_arrive(of_v.free.at[slot])
            return state._replace(o=o)

        state = _begin(unit, operands.by_query, cell.head, tile, q.shape)
        plgpu.barrier_wait(of_q.ready.at[me])
        pl.when(me == 1)(turn)  # offsets the consumers by half a visit
        state = program.fold(cell, visit, state)
        plgpu.barrier_arrive(of_q.free.at[me])
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
    return _State(o * hopper.across(total, o.shape, 0), lse * LOG2_E, total)


def _finish(state: _State, outputs: tuple[Ref, Ref], head: jax.Array, tile: jax.Array) -> None:
    """Normalise and write directly from registers."""
    o, lse = outputs
    sees_nothing = state.total == 0
    total = jnp.where(sees_nothing, 1.0, state.total)
    o[head, tile] = state.o * hopper.across(1 / total, state.o.shape, 0)
    lse[head, tile] = jnp.where(sees_nothing, -jnp.inf, state.maximum / LOG2_E + jnp.log(total))


def forward(inputs: Inputs, options: Options, start: Partial | None = None, *, interpret: Any = None) -> Partial:
    """Return normalised output and log-sum-exp over these keys, continued from `start`; 0 and -inf without keys.

    `interpret` takes the parameters of JAX's GPU interpret mode.
    """
    q, tokens, head_dim = inputs.q, inputs.queries.positions.shape[1], inputs.q.shape[-1]
    own, visited, stages = hopper_blocks("forward", head_dim, options)
    operands, queries, keys = _cut(inputs, start, own, visited, own_queries=True)
    plan = hopper.visits(options.rule, queries, keys, own_queries=True)
    work, unit = WorkDivision(inputs.kv_heads * inputs.groups), Warpgroup(interpret is not None)
    q_tile, kv_tile = (jax.ShapeDtypeStruct((rows, head_dim), q.dtype) for rows in (own, visited))
    slots = Buffer.of(stages, CONSUMERS, kv_tile)
    scratch = Buffer.of(CONSUMERS, 1, q_tile), slots, slots, plgpu.Barrier(num_arrivals=CONSUMERS)

    def body(operands: _Operands, visits: Visits, outputs: tuple[Ref, Ref], scratch: tuple[Any, ...]) -> None:
        program = _Program(work, options, unit, operands, visits, outputs, scratch)
        hopper.by_warpgroup(
            partial(_produce, work, inputs.groups, operands, visits, *scratch[:3]), partial(_consume, program)
        )

    outputs = [jax.ShapeDtypeStruct(operands.q.shape[: 4 - i], jnp.float32) for i in range(2)]
    o, lse = work.launch(body, operands, plan, outputs, scratch, interpret)
    return varying_like(q, Partial(hopper.untile(o, tokens, q.shape), hopper.untile(lse, tokens, q.shape[:2])))


def _weights(
    options: Options, lse: jax.Array, mask: jax.Array | None, axis: int, products: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Return the softmax weights of a tile from the log-sum-exp along `axis`, and the derivative of the cap."""
    s, factor, slope = hopper.logits(options, products)
    # Rounding of large logits must not give weights above 1.
    p = jnp.exp2(jnp.minimum(s * factor - hopper.across(lse, s.shape, axis), 0.0))
    return (p if mask is None else jnp.where(mask, p, 0.0)), slope


def _logit_gradients(
    p: jax.Array, slope: jax.Array | None, dp: jax.Array, delta: jax.Array, axis: int, dtype: jnp.dtype
) -> jax.Array:
    """Return the gradient of the logits without their scale."""
    ds = p * (dp - hopper.across(delta, dp.shape, axis))
    return (ds if slope is None else ds * slope).astype(dtype)


def _consume_queries(program: _Program) -> None:
    """Run a consumer of the dq kernel on its tile of queries, over the visited keys."""
    work, options, unit, operands, visits, outputs, (owned, visited) = program
    me = lax.axis_index("warpgroup")
    q, do = (x.at[me] for x in owned.arrays)

    def cell(cell: WorkCell, fills: jax.Array) -> jax.Array:
        tile = CONSUMERS * cell.number + me
        queries = unit.side(operands.queries, cell.batch, tile, 1)
        lse, delta = (unit.vector(x.at[cell.head, tile], 1) for x in operands.by_query[1:])
        plgpu.barrier_wait(owned.ready.at[me])

        def visit(is_full: bool, i: jax.Array, dq: jax.Array) -> jax.Array:
            slot = visited.slot(fills + i)
            k, v = (x.at[slot] for x in visited.arrays)
            mask = None
            if not is_full:
                keys = program.visited_side(operands.keys, cell, i)
                mask = hopper.tile_mask(options.rule, queries, keys, (q.shape[0], k.shape[0]))
            plgpu.barrier_wait(visited.ready.at[slot])
            (p, slope), dp = unit.two_products(q, k, do, v, partial(_weights, options, lse, mask, 0))
            dq = unit.accumulate(dq, _logit_gradients(p, slope, dp, delta, 0, q.dtype), k)
            plgpu.barrier_arrive(visited.free.at[slot])
            return dq

        dq = program.fold(cell, visit, unit.full(q.shape, 0.0, plgpu.Layout.WGMMA))
        plgpu.barrier_arrive(owned.free.at[me])
        outputs[0][cell.head, tile] = dq * options.scale
        return fills + cell.total

    work.for_each_cell(visits, cell, jnp.int32(0))


def _consume_keys(program: _Program) -> None:
    """Run a consumer of the dk, dv kernel on its tile of keys, over the visited queries; tiles are transposed."""
    work, options, unit, operands, visits, outputs, (owned, visited) = program
    me = lax.axis_index("warpgroup")
    k, v = (x.at[me] for x in owned.arrays)

    def cell(cell: WorkCell, fills: jax.Array) -> jax.Array:
        tile = CONSUMERS * cell.number + me
        keys = unit.side(operands.keys, cell.batch, tile, 1)
        plgpu.barrier_wait(owned.ready.at[me])

        def visit(is_full: bool, i: jax.Array, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dk, dv = gradients
            slot = visited.slot(fills + i)
            q, do, lse, delta = (x.at[slot] for x in visited.arrays)
            mask = None
            if not is_full:
                queries = program.visited_side(operands.queries, cell, i)
                mask = hopper.tile_mask(options.rule, queries, keys, (k.shape[0], q.shape[0]), query_axis=1)
            plgpu.barrier_wait(visited.ready.at[slot])
            weights = partial(_weights, options, unit.vector(lse, 0), mask, 1)
            (p, slope), dp = unit.two_products(k, q, v, do, weights)
            dv = unit.accumulate(dv, p.astype(q.dtype), do)
            dk = unit.accumulate(dk, _logit_gradients(p, slope, dp, unit.vector(delta, 0), 1, q.dtype), q)
            plgpu.barrier_arrive(visited.free.at[slot])
            return dk, dv

        zero = unit.full(k.shape, 0.0, plgpu.Layout.WGMMA)
        dk, dv = program.fold(cell, visit, (zero, zero))
        plgpu.barrier_arrive(owned.free.at[me])
        outputs[0][2 * cell.head, tile] = dk * options.scale
        outputs[0][2 * cell.head + 1, tile] = dv
        return fills + cell.total

    work.for_each_cell(visits, cell, jnp.int32(0))


def _gradients(inputs: Inputs, cotangents: Cotangents, options: Options, interpret: Any, *, of_keys: bool) -> jax.Array:
    """Return dq from a kernel that owns queries and visits keys, or dk and dv from one that owns keys."""
    q, groups = inputs.q, inputs.groups
    own, visited, stages = hopper_blocks("dkv" if of_keys else "dq", q.shape[-1], options)
    blocks = (visited, own) if of_keys else (own, visited)
    operands, queries, keys = _cut(inputs, cotangents, *blocks, own_queries=not of_keys)
    plan = hopper.visits(options.rule, queries, keys, own_queries=not of_keys)
    work = WorkDivision(inputs.kv_heads, groups) if of_keys else WorkDivision(inputs.kv_heads * groups)
    owned_tile, visited_tile = (jax.ShapeDtypeStruct((rows, q.shape[-1]), q.dtype) for rows in (own, visited))
    row_values = [jax.ShapeDtypeStruct((visited,), jnp.float32)] * (2 if of_keys else 0)
    owned_slots = Buffer.of(CONSUMERS, 1, owned_tile, owned_tile)
    scratch = owned_slots, Buffer.of(stages, CONSUMERS, visited_tile, visited_tile, *row_values)

    def body(operands: _Operands, visits: Visits, outputs: tuple[Ref, ...], scratch: tuple[Buffer, Buffer]) -> None:
        (do, lse, delta), (owned_slots, visited_slots) = operands.by_query, scratch

        def keys_of(kv_head: jax.Array, tile: jax.Array) -> tuple[Ref, ...]:
            k = 2 * kv_head
            return operands.kv.at[k, tile], operands.kv.at[k + 1, tile]

        def queries_of(kv_head: jax.Array, tile: jax.Array, group: jax.Array) -> tuple[Ref, ...]:
            head = kv_head * groups + group
            return tuple(x.at[head, tile] for x in (operands.q, do, lse, delta))

        if of_keys:
            feeds = Feed(owned_slots, keys_of), Feed(visited_slots, queries_of)
        else:
            feeds = (
                Feed(owned_slots, lambda head, tile: (operands.q.at[head, tile], do.at[head, tile])),
                Feed(visited_slots, lambda head, tile, _: keys_of(lax.div(head, jnp.int32(groups)), tile)),
            )
        consume, unit = _consume_keys if of_keys else _consume_queries, Warpgroup(interpret is not None)
        program = _Program(work, options, unit, operands, visits, outputs, scratch)
        hopper.by_warpgroup(partial(hopper.produce, work, visits, *feeds), partial(consume, program))

    like, length = (inputs.kv, inputs.kv.shape[2]) if of_keys else (q, inputs.queries.positions.shape[1])
    outputs = [jax.ShapeDtypeStruct((operands.kv if of_keys else operands.q).shape, jnp.float32)]
    (found,) = work.launch(body, operands, plan, outputs, scratch, interpret)
    return hopper.untile(found, length, like.shape)


def backward(
    inputs: Inputs,
    options: Options,
    cotangents: Cotangents,
    dq: Float32[Array, "heads rows head_dim"] | None = None,
    *,
    interpret: Any = None,
) -> Gradients:
    """Return the gradients of these keys, and of the queries through these keys, added to `dq` if given.

    `do` is rounded to q's dtype. `interpret` as for `forward`.
    """
    do, lse, delta = cotangents
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse) * LOG2_E  # masked rows need any finite value
    cotangents = Cotangents(do.astype(inputs.q.dtype), lse, delta)
    dq_part, dkv = (_gradients(inputs, cotangents, options, interpret, of_keys=of_keys) for of_keys in (False, True))
    return varying_like(inputs.q, Gradients(dq_part if dq is None else dq + dq_part, dkv))
