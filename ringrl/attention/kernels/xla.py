"""Tiled attention in plain XLA: the path of every CPU user, and the check on the others.

Memory is O(S): a loop over tiles of keys, inside one over tiles of queries, holds one (block_q, block_k) tile of logits
at a time. Operations per visible tile pair, per head: 4 * block_q * block_k * D forward, 10 * block_q * block_k * D
backward. Tiles that the mask rule excludes are not visited, so causal costs half of full.

All arrays have the heads that are computed together in front, or no such axis for one head at a time. Matrix products
are always (rows, contracted) x (contracted, columns), and what is needed the other way round is transposed beforehand,
once: left to the compiler, tiles are transposed in every visit, and a CPU multiplies a transposed left operand at half
speed.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from ringrl.attention.contract import Cotangents, Gradients, Inputs, Partial
from ringrl.attention.kernels.tuning import Blocks, blocks_for
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Side, classify, pad_side, visible
from ringrl.attention.merge import nothing_seen
from ringrl.attention.options import Options
from ringrl.attention.varying import varying_like

LOG2_E = 1.4426950408889634
Tree = TypeVar("Tree")


class Tile(NamedTuple):
    """Tokens of one tile, (..., block, D) and so on, and where they stand."""

    arrays: tuple[jax.Array, ...]
    side: Side


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Where the scale goes. In float32 it is multiplied into the queries once, in place of every tile of logits."""

    queries: float
    logits: float

    @classmethod
    def of(cls, options: Options, dtype: jnp.dtype) -> "Scaling":
        factor = options.scale * LOG2_E if options.logits_soft_cap is None else options.scale / options.logits_soft_cap
        return cls(factor, 1.0) if dtype == jnp.float32 else cls(1.0, factor)


def _logits(options: Options, products: jax.Array, scaling: Scaling) -> tuple[jax.Array, jax.Array | None]:
    """Scaled and capped logits in units of log 2, and the derivative of the cap (None without one)."""
    s = products if scaling.logits == 1 else products * scaling.logits
    if options.logits_soft_cap is None:
        return s, None
    t = jnp.tanh(s)
    return t * (options.logits_soft_cap * LOG2_E), 1 - t * t


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _transpose(x: jax.Array) -> jax.Array:
    """Held by a barrier, or the compiler makes it part of the product again."""
    return lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


class Visits(NamedTuple):
    """Which tiles of keys each tile of queries visits: those where all is visible first, then those to be masked."""

    order: Int32[Array, "query_tiles key_tiles"]
    full: Int32[Array, " query_tiles"]
    visible: Int32[Array, " query_tiles"]  # full ones and others


def _visits(options: Options, queries: Side, keys: Side) -> Visits:
    """From the extremes of positions and segments alone, for sides (tiles, ..., block)."""
    of_row = jax.vmap(partial(classify, options.rule), in_axes=(None, 0))
    some, every = jax.vmap(of_row, in_axes=(0, None))(queries, keys)
    order = jnp.argsort(2 - some.astype(jnp.int32) - every, axis=1, stable=True)
    return Visits(order.astype(jnp.int32), every.sum(1, dtype=jnp.int32), some.sum(1, dtype=jnp.int32))


def _visit_all(visits: Visits, key_tiles: Tile, visit: Callable, start):  # type: ignore[no-untyped-def]
    """Fold `visit(carry, keys, index, is_full)` over what one tile of queries visits."""

    def step(is_full: bool, i: jax.Array, carry):  # type: ignore[no-untyped-def]
        index = visits.order[i]
        return visit(carry, _tile(key_tiles, index), index, is_full)

    carry = lax.fori_loop(0, visits.full, partial(step, True), start)
    return lax.fori_loop(visits.full, visits.visible, partial(step, False), carry)


def _forward_tile(options: Options, scaling: Scaling, queries: Tile, carry, keys: Tile, is_full: bool):  # type: ignore[no-untyped-def]
    """Online softmax: fold one tile of keys into (accumulator, running maximum, running sum)."""
    (q,), (k_transposed, v) = queries.arrays, keys.arrays
    o, maximum, total = carry
    s, _ = _logits(options, _product(q, k_transposed), scaling)
    if not is_full:
        s = jnp.where(visible(options.rule, queries.side, keys.side), s, -jnp.inf)
    new_maximum = jnp.maximum(maximum, s.max(-1))
    shift = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)  # rows that have seen nothing yet
    p = lax.optimization_barrier(jnp.exp2(s - shift[..., None]))  # computed once, for the sum and the product
    alpha = jnp.exp2(maximum - shift)
    return o * alpha[..., None] + _product(p.astype(v.dtype), v), new_maximum, total * alpha + p.sum(-1)


def _backward_tile(options: Options, scaling: Scaling, queries: Tile, carry, keys: Tile, is_full: bool):  # type: ignore[no-untyped-def]
    """Add one tile pair's share to (dq transposed, dk, dv), from the global log-sum-exp and delta; tiles (keys, queries)."""
    (q, q_transposed, do, do_transposed, lse, delta), (k, k_transposed, v) = queries.arrays, keys.arrays
    dq_transposed, dk, dv = carry
    s, cap_slope = _logits(options, _product(k, q_transposed), scaling)
    p = jnp.exp2(s - lse[..., None, :])
    if not is_full:
        p = jnp.where(jnp.swapaxes(visible(options.rule, queries.side, keys.side), -1, -2), p, 0.0)
    ds = p * (_product(v, do_transposed) - delta[..., None, :])
    if cap_slope is not None:
        ds *= cap_slope
    ds = ds.astype(q.dtype)
    return (
        dq_transposed + _product(k_transposed, ds),
        dk + _product(ds, q),
        dv + _product(p.astype(q.dtype), do),
    )


def _tiles(x: jax.Array, axis: int, block: int) -> jax.Array:
    """(..., S, ...) -> (tiles, ..., block, ...), the axis padded with zeros to whole blocks."""
    axis %= x.ndim
    amount = [(0, 0)] * x.ndim
    amount[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, amount)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _join(x: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse."""
    axis %= x.ndim - 1
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _side_tiles(side: Side, block: int, padding: int) -> Side:
    length = side.positions.shape[-1]
    padded = pad_side(side, length + -length % block, padding)
    return Side(*(_tiles(x, -1, block) for x in padded))


def _tile(tiles: Tile, index: jax.Array) -> Tile:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tiles)


def _forward_heads(options: Options, blocks: Blocks, inputs: Inputs, start: Partial) -> Partial:
    """Forward of some heads, or of one without the axis of heads; sides are those of rows."""
    q, kv, queries, keys = inputs
    scaling = Scaling.of(options, q.dtype)
    k, v = kv[..., 0, :, :], kv[..., 1, :, :]
    k_tiles, v_tiles = (_tiles(x, -2, blocks.keys) for x in (k, v))
    key_tiles = Tile((_transpose(k_tiles), v_tiles), _side_tiles(keys, blocks.keys, PADDING_KEY))

    def query_tile(arguments: tuple[Tile, Visits]) -> Partial:
        ((q, o, lse), side), visits = arguments

        def visit(carry, keys: Tile, _: jax.Array, is_full: bool):  # type: ignore[no-untyped-def]
            return _forward_tile(options, scaling, Tile((q,), side), carry, keys, is_full)

        # What was seen before enters like one more key: its log-sum-exp as the maximum, with a sum of one.
        before = (o, lse * LOG2_E, jnp.where(jnp.isneginf(lse), 0.0, 1.0))
        o, maximum, total = _visit_all(visits, key_tiles, visit, before)
        return Partial(o / jnp.where(total == 0, 1.0, total)[..., None], (maximum + jnp.log2(total)) / LOG2_E)

    arrays = (_tiles(q * scaling.queries, -2, blocks.queries), _tiles(start.o, -2, blocks.queries))
    side = _side_tiles(queries, blocks.queries, PADDING_QUERY)
    tiles = Tile((*arrays, _tiles(start.lse, -1, blocks.queries)), side)
    o, lse = lax.map(query_tile, (tiles, _visits(options, side, key_tiles.side)))
    return Partial(_join(o, -2, q.shape[-2]), _join(lse, -1, q.shape[-2]))


def _backward_heads(
    options: Options, blocks: Blocks, inputs: Inputs, cotangents: Cotangents, before: Gradients
) -> Gradients:
    """Backward in the same shapes."""
    q, kv, queries, keys = inputs
    scaling = Scaling.of(options, q.dtype)
    k, v = kv[..., 0, :, :], kv[..., 1, :, :]
    k_tiles, v_tiles = (_tiles(x, -2, blocks.keys) for x in (k, v))
    key_tiles = Tile((k_tiles, _transpose(k_tiles), v_tiles), _side_tiles(keys, blocks.keys, PADDING_KEY))

    def query_tile(carry, arguments: tuple[Tile, Visits]):  # type: ignore[no-untyped-def]
        ((q, do, dq_before, lse, delta), side), visits = arguments
        queries = Tile((q, _transpose(q), do, _transpose(do), lse, delta), side)

        def visit(carry, keys: Tile, index: jax.Array, is_full: bool):  # type: ignore[no-untyped-def]
            dq, *dkv = carry
            before = (dq, *(lax.dynamic_index_in_dim(x, index, keepdims=False) for x in dkv))
            dq, *parts = _backward_tile(options, scaling, queries, before, keys, is_full)
            return dq, *(
                lax.dynamic_update_index_in_dim(x, part, index, 0) for x, part in zip(dkv, parts, strict=True)
            )

        start = varying_like(q, jnp.zeros_like(queries.arrays[1], jnp.float32))
        dq, *dkv = _visit_all(visits, key_tiles, visit, (start, *carry))
        return tuple(dkv), dq_before + jnp.swapaxes(dq, -1, -2) * options.scale

    arrays = tuple(_tiles(x, -2, blocks.queries) for x in (q * scaling.queries, cotangents.do, before.dq))
    rows = tuple(_tiles(x, -1, blocks.queries) for x in (cotangents.lse, cotangents.delta))
    tiles = Tile(arrays + rows, _side_tiles(queries, blocks.queries, PADDING_QUERY))
    start = varying_like(q, (jnp.zeros(k_tiles.shape, jnp.float32),) * 2)
    (dk, dv), dq = lax.scan(query_tile, start, (tiles, _visits(options, tiles.side, key_tiles.side)))
    dk = dk * (options.scale / scaling.queries)
    dkv = jnp.stack([_join(x, -2, kv.shape[-2]) for x in (dk, dv)], axis=-3)
    return Gradients(_join(dq, -2, q.shape[-2]), dkv)


def _each_head(run: Callable, options: Options, inputs: Inputs, more: tuple, results: Tree) -> Tree:
    """`run` on some heads after others, or on one after another; it replaces their part of `results`, in place."""
    heads = inputs.q.shape[0]
    blocks = blocks_for(heads)
    blocks = Blocks(
        _fit(options.block_q or blocks.queries, inputs.q.shape[1]),
        _fit(options.block_k or blocks.keys, inputs.kv.shape[2]),
        blocks.heads,
    )
    of_rows = jax.tree.map(lambda x: jnp.tile(x, (1, inputs.groups)), inputs.queries)
    sides = jax.tree.map(lambda x: jnp.repeat(x, inputs.kv_heads, axis=0), (of_rows, inputs.keys))
    everything = (inputs._replace(queries=sides[0], keys=sides[1]), *more), results
    if blocks.heads > 1:
        everything = jax.tree.map(lambda x: x.reshape(-1, blocks.heads, *x.shape[1:]), everything)
    arguments, results = everything

    def step(results: Tree, numbered):  # type: ignore[no-untyped-def]
        index, arguments = numbered
        before = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), results)
        after = run(options, blocks, *arguments, before)
        return jax.tree.map(lambda x, part: lax.dynamic_update_index_in_dim(x, part, index, 0), results, after), None

    results, _ = lax.scan(step, results, (jnp.arange(heads // blocks.heads), arguments))
    return jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), results) if blocks.heads > 1 else results


def _fit(block: int, length: int) -> int:
    """A block no longer than the (8-aligned) sequence, so that a short one is not padded to a whole block."""
    return min(block, -(-length // 8) * 8)


def forward(inputs: Inputs, options: Options, start: Partial | None = None) -> Partial:
    """Normalised output and log-sum-exp over these keys and those that `start` has seen; nothing seen is 0 and -inf."""
    return _each_head(_forward_heads, options, inputs, (), nothing_seen(inputs.q) if start is None else start)


def backward(
    inputs: Inputs,
    options: Options,
    cotangents: Cotangents,
    dq: Float32[Array, "heads rows head_dim"] | None = None,
) -> Gradients:
    """Gradients of these keys, and of the queries through these keys; the latter added to `dq`, if given."""
    # Rows that see nothing are masked everywhere: any finite value will do.
    lse = jnp.where(jnp.isneginf(cotangents.lse), 0.0, cotangents.lse) * LOG2_E
    zero = varying_like(inputs.q, Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (inputs.q, inputs.kv))))
    start = zero if dq is None else zero._replace(dq=dq)
    return _each_head(_backward_heads, options, inputs, (cotangents._replace(lse=lse),), start)
