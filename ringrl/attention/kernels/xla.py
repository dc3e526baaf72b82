"""Tiled attention in plain XLA: the path of every CPU user, and the check on the others.

Memory is O(S): a scan over tiles of queries holds one (block_q, block_k) tile of logits at a time. Operations per
visible tile pair, per head: 4 * block_q * block_k * D forward, 10 * block_q * block_k * D backward. Tiles that the
mask rule excludes are skipped, so causal costs half of full.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from ringrl.attention.kernels.tuning import blocks_for
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Side, classify, pad_side, visible
from ringrl.attention.merge import Partial, nothing_seen
from ringrl.attention.options import Options
from ringrl.attention.varying import varying_like

LOG2_E = 1.4426950408889634


class Gradients(NamedTuple):
    """Gradients of one block, float32, in the shapes of q, k and v."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array


class Tile(NamedTuple):
    """Tokens of one tile, (N, ..., block, D) and so on, and where they stand; N contexts or heads at once."""

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
    """(N, i, c) x (N, c, j) -> (N, i, j): always this way round, or the compiler transposes tiles to its liking."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


class Visits(NamedTuple):
    """Which tiles of keys each tile of queries visits: indices, those to visit first; their number; what is full."""

    order: Int32[Array, "query_tiles key_tiles"]
    number: Int32[Array, " query_tiles"]
    is_full: Bool[Array, "query_tiles key_tiles"]  # by key tile: every query sees every key, no mask is needed


def _visits(options: Options, queries: Side, keys: Side) -> Visits:
    """From the extremes of positions and segments alone, for sides (tiles, N, block)."""
    of_row = jax.vmap(partial(classify, options.rule), in_axes=(None, 0))
    kinds = jax.vmap(of_row, in_axes=(0, None))(queries, keys)
    order = jnp.argsort(~kinds.any_visible, axis=1, stable=True)
    return Visits(order.astype(jnp.int32), kinds.any_visible.sum(1, dtype=jnp.int32), kinds.all_visible)


def _visit(options: Options, queries: Tile, keys: Tile, is_full: jax.Array, compute):  # type: ignore[no-untyped-def]
    """`compute(None)` for a full tile, `compute(mask)` for a partial one."""

    def partly():  # type: ignore[no-untyped-def]
        mask = visible(options.rule, queries.side, keys.side)
        groups = queries.arrays[0].shape[1] // mask.shape[1]
        return compute(jnp.tile(mask, (1, groups, 1)))

    return lax.cond(is_full, lambda: compute(None), partly)


def _forward_tile(options: Options, scaling: Scaling, queries: Tile, carry, keys: Tile, is_full: jax.Array):  # type: ignore[no-untyped-def]
    """Online softmax: fold one tile of keys into (accumulator, running maximum, running sum)."""
    (q,), (k_transposed, v) = queries.arrays, keys.arrays
    o, maximum, total = carry

    def compute(mask: jax.Array | None):  # type: ignore[no-untyped-def]
        s, _ = _logits(options, _product(q, k_transposed), scaling)
        if mask is not None:
            s = jnp.where(mask, s, -jnp.inf)
        new_maximum = jnp.maximum(maximum, s.max(-1))
        shift = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)  # rows that have seen nothing yet
        p = lax.optimization_barrier(jnp.exp2(s - shift[..., None]))  # computed once, for the sum and the product
        alpha = jnp.exp2(maximum - shift)
        return o * alpha[..., None] + _product(p.astype(v.dtype), v), new_maximum, total * alpha + p.sum(-1)

    return _visit(options, queries, keys, is_full, compute)


def _backward_tile(options: Options, scaling: Scaling, queries: Tile, carry, keys: Tile, is_full: jax.Array):  # type: ignore[no-untyped-def]
    """Add one tile pair's share to (dq, dk, dv), from the global log-sum-exp and delta.

    Tiles are (keys, queries) here, and what a product needs the other way round is transposed beforehand: a CPU
    multiplies a transposed left operand at half speed.
    """
    (q, q_transposed, do, do_transposed, lse, delta), (k, v) = queries.arrays, keys.arrays
    dq, dk, dv = carry

    def compute(mask: jax.Array | None):  # type: ignore[no-untyped-def]
        s, cap_slope = _logits(options, _product(k, q_transposed), scaling)
        p = jnp.exp2(s - lse[:, None])
        if mask is not None:
            p = jnp.where(jnp.swapaxes(mask, 1, 2), p, 0.0)
        ds = p * (_product(v, do_transposed) - delta[:, None])
        if cap_slope is not None:
            ds *= cap_slope
        ds = ds.astype(q.dtype)
        ds_transposed = lax.optimization_barrier(jnp.swapaxes(ds, 1, 2))
        return (
            dq + _product(ds_transposed, k),
            dk + _product(ds, q),
            dv + _product(p.astype(q.dtype), do),
        )

    return _visit(options, queries, keys, is_full, compute)


def _tiles(x: jax.Array, axis: int, block: int) -> jax.Array:
    """(N, ..., S, ...) -> (tiles, N, ..., block, ...), the axis padded with zeros to whole blocks."""
    amount = [(0, 0)] * x.ndim
    amount[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, amount)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _query_tiles(x: jax.Array, block: int) -> jax.Array:
    """(N, G, S[, D]) -> (tiles, N, G * block[, D]): the queries that share a key head are rows of one tile."""
    x = _tiles(x, 2, block)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _join_queries(x: jax.Array, groups: int, length: int) -> jax.Array:
    """The inverse."""
    x = jnp.moveaxis(x.reshape(*x.shape[:2], groups, -1, *x.shape[3:]), 0, 2)  # (N, G, tiles, block[, D])
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


def _join_keys(x: jax.Array, length: int) -> jax.Array:
    """(tiles, N, block, D) -> (N, S, D) without the padding."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :length]


def _side_tiles(side: Side, block: int, padding: int) -> Side:
    length = side.positions.shape[1]
    padded = pad_side(side, length + -length % block, padding)
    return Side(_tiles(padded.positions, 1, block), _tiles(padded.segment_ids, 1, block))


def _tile(tiles: Tile, index: jax.Array) -> Tile:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tiles)


def _forward_heads(q, k, v, start_o, start_lse, queries, keys, options):  # type: ignore[no-untyped-def]
    """Forward of q (N, G, S, D), k and v (N, S, D): o (N, G, S, D) and lse (N, G, S)."""
    scaling = Scaling.of(options, q.dtype)
    key_arrays = (_tiles(jnp.swapaxes(k, 1, 2), 2, options.block_k), _tiles(v, 1, options.block_k))
    key_tiles = Tile(key_arrays, _side_tiles(keys, options.block_k, PADDING_KEY))

    def query_tile(arguments: tuple[Tile, Visits]) -> tuple[jax.Array, jax.Array]:
        (arrays, side), visits = arguments
        q, o, lse = arrays

        def key_tile(i: jax.Array, carry):  # type: ignore[no-untyped-def]
            index = visits.order[i]
            keys = _tile(key_tiles, index)
            return _forward_tile(options, scaling, Tile((q,), side), carry, keys, visits.is_full[index])

        # What was seen before enters like one more key: its log-sum-exp as the maximum, with a sum of one.
        start = (o, lse * LOG2_E, jnp.where(jnp.isneginf(lse), 0.0, 1.0))
        o, maximum, total = lax.fori_loop(0, visits.number, key_tile, start)
        return o / jnp.where(total == 0, 1.0, total)[..., None], (maximum + jnp.log2(total)) / LOG2_E

    arrays = tuple(_query_tiles(x, options.block_q) for x in (q * scaling.queries, start_o, start_lse))
    tiles = Tile(arrays, _side_tiles(queries, options.block_q, PADDING_QUERY))
    o, lse = lax.map(query_tile, (tiles, _visits(options, tiles.side, key_tiles.side)))
    return tuple(_join_queries(x, *q.shape[1:3]) for x in (o, lse))


def _backward_heads(q, k, v, lse, delta, do, queries, keys, options):  # type: ignore[no-untyped-def]
    """Backward in the same shapes."""
    scaling = Scaling.of(options, q.dtype)
    key_arrays = (_tiles(k, 1, options.block_k), _tiles(v, 1, options.block_k))
    key_tiles = Tile(key_arrays, _side_tiles(keys, options.block_k, PADDING_KEY))

    def query_tile(carry, arguments: tuple[Tile, Visits]):  # type: ignore[no-untyped-def]
        (arrays, side), visits = arguments
        q, do, lse, delta = arrays
        transposed = lax.optimization_barrier((jnp.swapaxes(q, 1, 2), jnp.swapaxes(do, 1, 2)))
        tile = Tile((q, transposed[0], do, transposed[1], lse, delta), side)

        def key_tile(i: jax.Array, carry):  # type: ignore[no-untyped-def]
            dq, dk, dv = carry
            index = visits.order[i]
            dk_tile, dv_tile = (lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (dk, dv))
            tiles = (dq, dk_tile, dv_tile)
            dq, *dkv = _backward_tile(options, scaling, tile, tiles, _tile(key_tiles, index), visits.is_full[index])
            return dq, *(
                lax.dynamic_update_index_in_dim(x, part, index, 0) for x, part in zip((dk, dv), dkv, strict=True)
            )

        start = varying_like(q, jnp.zeros(q.shape, jnp.float32))
        dq, dk, dv = lax.fori_loop(0, visits.number, key_tile, (start, *carry))
        return (dk, dv), dq

    arrays = tuple(_query_tiles(x, options.block_q) for x in (q * scaling.queries, do, lse, delta))
    tiles = Tile(arrays, _side_tiles(queries, options.block_q, PADDING_QUERY))
    start = jnp.zeros((2, *key_tiles.arrays[0].shape), jnp.float32)
    visits = _visits(options, tiles.side, key_tiles.side)
    (dk, dv), dq = lax.scan(query_tile, tuple(varying_like(q, start)), (tiles, visits))
    dq, dk = dq * options.scale, dk * (options.scale / scaling.queries)
    return Gradients(_join_queries(dq, *q.shape[1:3]), _join_keys(dk, k.shape[1]), _join_keys(dv, k.shape[1]))


def _each_head(options: Options, run: Callable, arrays, queries: Side, keys: Side):  # type: ignore[no-untyped-def]
    """run(arrays, queries, keys, options) on (N, ...) arrays, some heads after others, for arrays (B, Hkv, ...)."""
    batch, kv_heads = arrays[0].shape[:2]
    blocks = blocks_for(batch * kv_heads)
    options = dataclasses.replace(
        options,
        block_q=_fit(options.block_q or blocks.queries, queries),
        block_k=_fit(options.block_k or blocks.keys, keys),
    )

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, blocks.heads, *x.shape[2:])

    sides = jax.tree.map(lambda x: split(jnp.repeat(x[:, None], kv_heads, axis=1)), (queries, keys))
    results = lax.map(lambda x: run(*x, options), (jax.tree.map(split, arrays), *sides))
    return jax.tree.map(lambda x: x.reshape(batch, kv_heads, *x.shape[2:]), results)


def _fit(block: int, side: Side) -> int:
    """A block no longer than the (8-aligned) sequence, so that a short one is not padded to a whole block."""
    return min(block, -(-side.positions.shape[1] // 8) * 8)


def forward(
    q: Float[Array, "batch kv_heads groups queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    queries: Side,
    keys: Side,
    options: Options,
    start: Partial | None = None,
) -> Partial:
    """Normalised output and log-sum-exp over these keys and those that `start` has seen; nothing seen is 0 and -inf."""
    start = nothing_seen(q) if start is None else start

    def run(arrays, queries, keys, options):  # type: ignore[no-untyped-def]
        return _forward_heads(*arrays, queries, keys, options)

    return Partial(*_each_head(options, run, (q, k, v, *start), queries, keys))


def backward(
    q: Float[Array, "batch kv_heads groups queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    queries: Side,
    keys: Side,
    options: Options,
    lse: Float32[Array, "batch kv_heads groups queries"],
    delta: Float32[Array, "batch kv_heads groups queries"],
    do: Float[Array, "batch kv_heads groups queries head_dim"],
) -> Gradients:
    """Gradients of this block of keys, from the global `lse` and `delta` of its queries."""
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse) * LOG2_E  # such rows are masked everywhere: any finite value will do

    def run(arrays, queries, keys, options):  # type: ignore[no-untyped-def]
        return _backward_heads(*arrays, queries, keys, options)

    return Gradients(*_each_head(options, run, (q, k, v, lse, delta, do), queries, keys))
