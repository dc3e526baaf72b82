"""Tiled attention in plain XLA, for CPUs and as the fallback and reference of the other kernels.

Memory is O(S): a loop over tiles of keys inside a loop over tiles of queries holds one (block_q, block_k) tile of
logits at a time. Operations per visible tile pair and head: 4 * block_q * block_k * D forward, 10 * block_q * block_k
* D backward. Tiles that the mask hides are skipped, so causal attention costs half of full attention.

The heads that are computed together are the first axis of all arrays; one head at a time has no such axis. Matrix
products are always (rows, contracted) x (contracted, columns). Transposes are computed once in advance: the compiler
would transpose tiles in every visit, and a CPU multiplies a transposed left operand at half speed.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from ringrl.attention.contract import (
    LOG2_E,
    Cotangents,
    Gradients,
    Inputs,
    Partial,
    Tree,
    nothing_seen,
    pad_axis,
    precision_of,
    varying_like,
)
from ringrl.attention.kernels.tuning import XlaBlocks, xla_blocks
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Options, Side, classify_pairs, pad_side, visible


class Scaling(NamedTuple):
    """Where the scale is applied: in float32 once to tiles of vectors, in 16 bits to every tile of logits.

    `queries` multiplies q and `logits` multiplies q k^T, in units of log 2 (or of the soft cap). `cotangents`
    multiplies do and delta, and `gradients` multiplies the gradients of the logits.
    """

    queries: float
    logits: float
    cotangents: float
    gradients: float

    @classmethod
    def of(cls, options: Options, dtype: jnp.dtype) -> "Scaling":
        factor = options.scale * LOG2_E if options.logits_soft_cap is None else options.scale / options.logits_soft_cap
        return cls(factor, 1.0, options.scale, 1.0) if dtype == jnp.float32 else cls(1.0, factor, 1.0, options.scale)


def _logits(options: Options, products: jax.Array, scaling: Scaling) -> tuple[jax.Array, jax.Array | None]:
    """Return scaled and capped logits in units of log 2, and the derivative of the cap (None without a cap)."""
    s = products * scaling.logits
    if options.logits_soft_cap is None:
        return s, None
    t = jnp.tanh(s)
    return t * (options.logits_soft_cap * LOG2_E), 1 - t * t


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=precision_of(a), preferred_element_type=jnp.float32)


def _transpose(x: jax.Array) -> jax.Array:
    """Transpose the last two axes. In 16 bits a barrier keeps XLA from fusing it into a product it cannot compute."""
    x = jnp.swapaxes(x, -1, -2)
    return x if x.dtype == jnp.float32 else lax.optimization_barrier(x)


def _forward_tile(options: Options, scaling: Scaling, q, carry, k_transposed, v, mask):  # type: ignore[no-untyped-def]
    """Fold one tile of keys into the online softmax (accumulator, running maximum, running sum)."""
    o, maximum, total = carry
    s, _ = _logits(options, _product(q, k_transposed), scaling)
    if mask is not None:
        s = jnp.where(mask, s, -jnp.inf)
    new_maximum = jnp.maximum(maximum, s.max(-1))
    shift = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)  # rows without a visible key so far
    p = lax.optimization_barrier(jnp.exp2(s - shift[..., None]))  # one computation for the sum and the product
    alpha = jnp.exp2(maximum - shift)
    return o * alpha[..., None] + _product(p.astype(v.dtype), v), new_maximum, total * alpha + p.sum(-1)


class HeadTiles(NamedTuple):
    """Sides (tiles, ..., block) of some heads, and the key tiles that each query tile visits."""

    queries: Side
    keys: Side
    order: Int32[Array, "query_tiles key_tiles"]  # full tiles first, then partial, then hidden ones
    full: Int32[Array, " query_tiles"]  # number of full tiles
    visible: Int32[Array, " query_tiles"]  # number of full and partial tiles


def _head_tiles(options: Options, blocks: XlaBlocks, queries: Side, keys: Side) -> HeadTiles:
    """List the visits from minima and maxima of positions and segments."""
    queries = jax.tree.map(lambda x: into_tiles(x, -1, blocks.queries), queries)
    keys = jax.tree.map(lambda x: into_tiles(x, -1, blocks.keys), keys)
    some, every = classify_pairs(options.rule, queries, keys)
    order = jnp.argsort(2 - some.astype(jnp.int32) - every.astype(jnp.int32), axis=1, stable=True).astype(jnp.int32)
    return HeadTiles(queries, keys, order, every.sum(1, dtype=jnp.int32), some.sum(1, dtype=jnp.int32))


def _visit_all(options: Options, tiles: HeadTiles, i: jax.Array, visit: Callable, start: Tree) -> Tree:
    """Fold `visit(carry, j, mask)` over the tiles j of keys that tile i of queries visits; mask is None if full."""
    order, full, visible_ones = (_at(x, i) for x in tiles[2:])

    def fully(step: jax.Array, carry: Tree) -> Tree:
        return visit(carry, _at(order, step), None)

    def partly(step: jax.Array, carry: Tree) -> Tree:
        j = _at(order, step)
        queries, keys = (
            jax.tree.map(lambda x, n=n: _at(x, n), side) for side, n in ((tiles.queries, i), (tiles.keys, j))
        )
        return visit(carry, j, visible(options.rule, queries, keys))

    return lax.fori_loop(full, visible_ones, partly, lax.fori_loop(0, full, fully, start))


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def into_tiles(x: jax.Array, axis: int, block: int) -> jax.Array:
    """Reshape (..., S, ...) -> (tiles, ..., block, ...)."""
    axis %= x.ndim
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


class TileSlice(NamedTuple):
    """The location of a tile in an array (N, ..., S, ...): an index of the first axis, block `tile` along `axis`.

    One dynamic slice reads or writes a tile. Indexing in two steps makes XLA copy the whole array in between.
    """

    head: jax.Array
    tile: jax.Array
    block: int
    axis: int = -2
    which: int | None = None  # keys (0) or values (1), for arrays (N, ..., 2, S, D)

    def _slice(self, x: jax.Array) -> tuple[list[jax.Array], list[int]]:
        starts, sizes = [jnp.int32(0)] * x.ndim, list(x.shape)
        starts[0], sizes[0] = jnp.int32(self.head), 1
        starts[self.axis], sizes[self.axis] = jnp.int32(self.tile) * self.block, self.block
        if self.which is not None:
            starts[-3], sizes[-3] = jnp.int32(self.which), 1
        return starts, sizes

    def of(self, x: jax.Array) -> jax.Array:
        """Return the tile (..., block, ...)."""
        tile = lax.dynamic_slice(x, *self._slice(x))
        return tile.reshape(tile.shape[1:] if self.which is None else (*tile.shape[1:-3], *tile.shape[-2:]))

    def put(self, x: jax.Array, tile: jax.Array) -> jax.Array:
        """Return x with the tile replaced."""
        starts, sizes = self._slice(x)
        return lax.dynamic_update_slice(x, tile.reshape(sizes), starts)


def _keys_transposed(inputs: Inputs, head: jax.Array, block: int) -> jax.Array:
    """Return the transposed keys (tiles, ..., D, block)."""
    return _transpose(into_tiles(_at(inputs.kv, head)[..., 0, :, :], -2, block))


def _forward_head(options: Options, blocks: XlaBlocks, head: jax.Array, inputs: Inputs, seen: Partial) -> Partial:
    """Return `seen`, updated with these keys for the queries at one index of the first axis."""
    scaling = Scaling.of(options, inputs.q.dtype)
    k_transposed = _keys_transposed(inputs, head, blocks.keys)
    tiles = _head_tiles(options, blocks, *jax.tree.map(lambda x: _at(x, head), (inputs.queries, inputs.keys)))

    def query_tile(i: jax.Array, seen: Partial) -> Partial:
        place, row = TileSlice(head, i, blocks.queries), TileSlice(head, i, blocks.queries, axis=-1)
        q, o, lse = place.of(inputs.q) * scaling.queries, place.of(seen.o), row.of(seen.lse)

        def visit(carry, j: jax.Array, mask: jax.Array | None):  # type: ignore[no-untyped-def]
            v = TileSlice(head, j, blocks.keys, which=1).of(inputs.kv)
            return _forward_tile(options, scaling, q, carry, _at(k_transposed, j), v, mask)

        # The previous result enters like one key: its log-sum-exp is the maximum, with a sum of one.
        before = (o, lse * LOG2_E, jnp.where(jnp.isneginf(lse), 0.0, 1.0))
        o, maximum, total = _visit_all(options, tiles, i, visit, before)
        o, lse = o / jnp.where(total == 0, 1.0, total)[..., None], (maximum + jnp.log2(total)) / LOG2_E
        return Partial(place.put(seen.o, o), row.put(seen.lse, lse))

    return lax.fori_loop(0, len(tiles.order), query_tile, seen)


def _backward_head(
    options: Options, blocks: XlaBlocks, head: jax.Array, inputs: Inputs, cotangents: Cotangents, sums: Gradients
) -> Gradients:
    """Return `sums` plus the gradients of one index of the first axis."""
    scaling = Scaling.of(options, inputs.q.dtype)
    k_transposed = _keys_transposed(inputs, head, blocks.keys)
    tiles = _head_tiles(options, blocks, *jax.tree.map(lambda x: _at(x, head), (inputs.queries, inputs.keys)))

    def query_tile(i: jax.Array, sums: Gradients) -> Gradients:
        place, row = TileSlice(head, i, blocks.queries), TileSlice(head, i, blocks.queries, axis=-1)
        q, do = place.of(inputs.q), place.of(cotangents.do)
        turned_q, turned_do = _transpose(q * scaling.queries), _transpose(do * scaling.cotangents)
        lse, delta = row.of(cotangents.lse) * LOG2_E, row.of(cotangents.delta) * scaling.cotangents

        def visit(carry, j: jax.Array, mask: jax.Array | None):  # type: ignore[no-untyped-def]
            dq_transposed, dkv = carry
            k, v = (TileSlice(head, j, blocks.keys, which=which).of(inputs.kv) for which in (0, 1))
            both, turned_k = TileSlice(head, j, blocks.keys), _at(k_transposed, j)
            s, cap_slope = _logits(options, _product(k, turned_q), scaling)
            # Rounding of large logits must not give weights above 1.
            p = jnp.exp2(jnp.minimum(s - lse[..., None, :], 0.0))
            if mask is not None:
                p = jnp.where(jnp.swapaxes(mask, -1, -2), p, 0.0)
            ds = p * (_product(v, turned_do) - delta[..., None, :]) * scaling.gradients
            if cap_slope is not None:
                ds *= cap_slope
            ds = ds.astype(q.dtype)
            dk, dv = _product(ds, q), _product(p.astype(do.dtype), do)
            dq_transposed = dq_transposed + _product(turned_k, ds)
            return dq_transposed, both.put(dkv, both.of(dkv) + jnp.stack([dk, dv], axis=-3))

        zero = varying_like(q, jnp.zeros(turned_q.shape, jnp.float32))
        dq_transposed, dkv = _visit_all(options, tiles, i, visit, (zero, sums.dkv))
        return Gradients(place.put(sums.dq, place.of(sums.dq) + jnp.swapaxes(dq_transposed, -1, -2)), dkv)

    return lax.fori_loop(0, len(tiles.order), query_tile, sums)


def _each_head(run: Callable, heads: int, arguments: tuple, results: Tree) -> Tree:
    """Update results = run(index, *arguments, results) for each group of `heads` heads, in place."""

    def group(x: jax.Array) -> jax.Array:
        return x if heads == 1 else x.reshape(-1, heads, *x.shape[1:])

    arguments, grouped = jax.tree.map(group, (arguments, results))
    steps = len(jax.tree.leaves(grouped)[0])
    grouped = lax.fori_loop(0, steps, lambda index, results: run(index, *arguments, results), grouped)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), grouped, results)


def blocks_of(options: Options, inputs: Inputs) -> XlaBlocks:
    """Return tile sizes no longer than the (8-aligned) sequence, so that short sequences need little padding."""
    rows, keys = inputs.q.shape[1], inputs.kv.shape[2]
    blocks = xla_blocks(len(inputs.q), rows // inputs.groups, keys)
    return XlaBlocks(
        min(options.block_q or blocks.queries, -(-rows // 8) * 8),
        min(options.block_k or blocks.keys, -(-keys // 8) * 8),
        blocks.heads,
    )


def prepared(inputs: Inputs, blocks: XlaBlocks) -> Inputs:
    """Pad to whole tiles (a copy only if lengths do not divide) and repeat the sides for the rows of each head."""
    of_rows = jax.tree.map(lambda x: jnp.tile(x, (1, inputs.groups)), inputs.queries)
    queries, keys = jax.tree.map(lambda x: jnp.repeat(x, inputs.kv_heads, axis=0), (of_rows, inputs.keys))
    q, kv = pad_axis(inputs.q, 1, blocks.queries), pad_axis(inputs.kv, 2, blocks.keys)
    return Inputs(q, kv, pad_side(queries, q.shape[1], PADDING_QUERY), pad_side(keys, kv.shape[2], PADDING_KEY))


def forward(inputs: Inputs, options: Options, start: Partial | None = None) -> Partial:
    """Return normalised output and log-sum-exp over these keys, continued from `start`; 0 and -inf without keys."""
    blocks, rows = blocks_of(options, inputs), inputs.q.shape[1]
    seen = nothing_seen(inputs.q) if start is None else start
    seen = Partial(*(pad_axis(x, 1, blocks.queries) for x in seen))
    seen = _each_head(partial(_forward_head, options, blocks), blocks.heads, (prepared(inputs, blocks),), seen)
    return Partial(*(x[:, :rows] for x in seen))


def backward(
    inputs: Inputs, options: Options, cotangents: Cotangents, dq: Float32[Array, "heads rows head_dim"] | None = None
) -> Gradients:
    """Return the gradients of these keys, and of the queries through these keys, added to `dq` if given."""
    blocks, (_, rows, _), length = blocks_of(options, inputs), inputs.q.shape, inputs.kv.shape[2]
    # Rows without visible keys are masked everywhere and need any finite value.
    cotangents = cotangents._replace(lse=jnp.where(jnp.isneginf(cotangents.lse), 0.0, cotangents.lse))
    cotangents = Cotangents(*(pad_axis(x, 1, blocks.queries) for x in cotangents))
    whole = prepared(inputs, blocks)
    sums = varying_like(inputs.q, Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (whole.q, whole.kv))))
    if dq is not None:
        sums = sums._replace(dq=pad_axis(dq, 1, blocks.queries))
    sums = _each_head(partial(_backward_head, options, blocks), blocks.heads, (whole, cotangents), sums)
    return Gradients(sums.dq[:, :rows], sums.dkv[:, :, :length])
