"""Common parts of the TPU kernels: tiles, the list of visited tile pairs, and the arithmetic of one tile.

Keys are on sublanes and queries on lanes:

               rows: queries of the heads that share a key head
             +-------------------------------+
       keys  |  logits (block_k, rows)       |   key positions are a column, query positions a row
             +-------------------------------+
             maximum, sum, log-sum-exp, delta    one row each: compact in memory, cheap to broadcast over a tile
             transposed output (head_dim, rows)  fills its registers for any head_dim

The visible pairs of tiles are listed outside of the kernels, from minima and maxima of positions and segment ids. The
grid of a kernel is as long as its list: a skipped pair costs no step, no copy and no arithmetic.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from ringrl.attention.contract import LOG2_E, Inputs, pad_axis, precision_of
from ringrl.attention.kernels.tuning import tpu_blocks
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Options, Rule, Side, classify_pairs, may_see, tile_side
from ringrl.attention.strategy import device_of

LANES = 128
TILE_BITS = 13  # bits of a tile index in the list of pairs
MAX_PAIRS = 2**17  # entries of the list, 32 bits each: half of the scalar memory on every TPU generation
Interpret = bool | pltpu.InterpretParams


def unsupported(dtype: jnp.dtype, head_dim: int, options: Options) -> str | None:
    """Return one sentence about an argument that the TPU kernels do not support, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"q: {jnp.dtype(dtype).name} is not supported on TPUs: use bfloat16 or float32"
    if head_dim % 8 or head_dim > 256:
        return f"q: head_dim {head_dim} is not a multiple of 8 up to 256"
    return None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The division of arrays into tiles. `groups` heads that share a key head form a tile; a key head has `shares`."""

    batch: int
    kv_heads: int
    shares: int
    groups: int
    queries: int
    keys: int
    head_dim: int
    block_q: int
    block_k: int

    @property
    def rows(self) -> int:
        """Number of queries over all heads of a tile."""
        return self.groups * self.block_q

    @property
    def query_tiles(self) -> int:
        return pl.cdiv(self.queries, self.block_q)

    @property
    def key_tiles(self) -> int:
        return pl.cdiv(self.keys, self.block_k)

    @property
    def pairs(self) -> int:
        """Length of the list if every tile sees every other."""
        return self.query_tiles * self.key_tiles

    def cut_queries(self, x: Float[Array, "heads rows head_dim"]) -> jax.Array:
        """Reshape to (batch, kv_heads, shares, groups, padded queries, head_dim)."""
        x = x.reshape(self.batch, self.kv_heads, self.shares, self.groups, self.queries, -1)
        return pad_axis(x, 4, self.block_q)

    def join_queries(self, x: jax.Array) -> jax.Array:
        """Invert `cut_queries`."""
        return x[:, :, :, :, : self.queries].reshape(self.batch * self.kv_heads, -1, self.head_dim)

    def cut_rows(self, x: Float32[Array, "heads rows"], fill: float = 0.0) -> jax.Array:
        """Reshape to (batch, kv_heads, shares, query_tiles, 1, rows)."""
        x = x.reshape(self.batch, self.kv_heads, self.shares, self.groups, self.queries)
        x = pad_axis(x, 4, self.block_q, fill)
        x = x.reshape(*x.shape[:4], self.query_tiles, self.block_q)
        return jnp.moveaxis(x, 3, 4).reshape(*x.shape[:3], self.query_tiles, 1, self.rows)

    def join_rows(self, x: jax.Array) -> jax.Array:
        """Invert `cut_rows`."""
        x = jnp.moveaxis(x.reshape(*x.shape[:4], self.groups, self.block_q), 4, 3)
        x = x.reshape(*x.shape[:4], self.query_tiles * self.block_q)[..., : self.queries]
        return x.reshape(self.batch * self.kv_heads, -1)

    def cut_keys(self, kv: Float[Array, "heads 2 keys head_dim"]) -> jax.Array:
        """Reshape to (batch, kv_heads, 2, padded keys, head_dim)."""
        return pad_axis(kv, 2, self.block_k).reshape(self.batch, self.kv_heads, 2, -1, self.head_dim)

    def join_keys(self, kv: jax.Array) -> jax.Array:
        """Invert `cut_keys`."""
        return kv[:, :, :, : self.keys].reshape(self.batch * self.kv_heads, 2, self.keys, self.head_dim)


def tiling_of(inputs: Inputs, options: Options) -> Tiling:
    """Return tiles with the most heads that fit. ValueError if the list of pairs is too short for a pass."""
    q, head_dim = inputs.q, inputs.q.shape[-1]
    (batch, queries), keys = inputs.queries.positions.shape, inputs.kv.shape[2]
    kv_heads, heads = inputs.kv_heads, inputs.groups
    blocks = tpu_blocks(head_dim, q.dtype, device_of(q).device_kind)
    block_k = _fit(options.block_k or blocks.keys, keys)
    for groups in sorted((n for n in range(1, heads + 1) if heads % n == 0), reverse=True):
        block_q = _fit(options.block_q or blocks.rows // groups // LANES * LANES, queries)
        if not block_q or groups * block_q > max(blocks.rows, block_q):
            continue
        tiling = Tiling(batch, kv_heads, heads // groups, groups, queries, keys, head_dim, block_q, block_k)
        if batch * tiling.pairs <= MAX_PAIRS and max(tiling.query_tiles, tiling.key_tiles) <= 2**TILE_BITS:
            return tiling
    raise ValueError(
        f"q, k: {batch} x {queries} queries and {keys} keys per device exceed the {MAX_PAIRS} pairs of tiles of the TPU"
        " kernel: use a smaller batch or more devices along the sequence"
    )


def too_many(inputs: Inputs, options: Options) -> str | None:
    """Return the error of `tiling_of` as one sentence, or None."""
    try:
        tiling_of(inputs, options)
    except ValueError as error:
        return str(error)
    return None


def _fit(block: int, length: int) -> int:
    """Return a block size no longer than the sequence, in whole registers."""
    return min(block, pl.cdiv(length, LANES) * LANES)


class TilePair(NamedTuple):
    """One entry of the list: tiles of the outer and the inner side, with their role and visibility."""

    outer: jax.Array
    inner: jax.Array
    is_first: jax.Array  # first pair of its outer tile
    is_last: jax.Array
    is_partial: jax.Array
    is_full: jax.Array  # every query sees every key, no mask needed

    @classmethod
    def at(cls, pairs: Any, context: jax.Array, step: jax.Array, tiling: Tiling) -> "TilePair":
        """Return the entry of this step, from a reference to the list of `pack_pairs`."""
        return cls.unpack(pairs[context * tiling.pairs + step])

    @classmethod
    def unpack(cls, code: jax.Array) -> "TilePair":
        """Unpack an entry: TILE_BITS for each tile, 4 bits for role and visibility."""
        kind, inner = code & 3, (code >> 4) & (2**TILE_BITS - 1)
        return cls(code >> (TILE_BITS + 4), inner, (code & 8) != 0, (code & 4) != 0, kind == 1, kind == 2)


def pack_pairs(
    some: Bool[Array, "batch outer inner"], every: Bool[Array, "batch outer inner"]
) -> tuple[Int32[Array, " batch_pairs"], Int32[Array, ""]]:
    """Return the lists of all contexts, one after the other and padded, and the length of the longest list.

    An outer tile without visible tiles has one entry, which writes its initial value.
    """
    contexts, outer, inner = some.shape
    length = outer * inner
    outer_index, inner_index = jnp.arange(outer)[:, None], jnp.arange(inner)
    visited = some | (~some.any(2, keepdims=True) & (inner_index == 0))
    seen = jnp.cumsum(visited, axis=2)  # entries of this outer tile so far
    count = jnp.cumsum(seen[..., -1], axis=1)  # entries up to the end of this outer tile
    kind = some.astype(jnp.int32) + (some & every)
    code = (
        (outer_index << (TILE_BITS + 4))
        + (inner_index << 4)
        + ((seen == 1) << 3)
        + ((seen == seen[..., -1:]) << 2)
        + kind
    )
    idle = ((outer - 1) << (TILE_BITS + 4)) + (jnp.where(visited[:, -1], inner_index, 0).max(1) << 4)
    # A scatter instead of a sort: the compiler takes seconds for a sort of this length.
    place = jnp.arange(contexts)[:, None, None] * length + (count - seen[..., -1])[..., None] + seen - 1
    place = jnp.where(visited, place, contexts * length)
    pairs = jnp.repeat(idle, length).at[place.reshape(-1)].set(code.reshape(-1), mode="drop")
    return pairs.astype(jnp.int32), count[:, -1].max().astype(jnp.int32)


class Sides(NamedTuple):
    """Positions, segment ids and global prefixes (if any) per tile, and the list of pairs of tiles to visit."""

    queries: Int32[Array, "batch query_tiles arrays rows"]
    keys: Int32[Array, "batch key_tiles 2 block_k"]
    pairs: Int32[Array, " batch_pairs"]
    steps: Int32[Array, ""]


def cut_sides(rule: Rule, queries: Side, keys: Side, tiling: Tiling, *, by_key: bool = False) -> Sides:
    """Divide both sides into tiles and list the pairs, in order of query tiles or (`by_key`) of key tiles."""
    query_tiles = tile_side(queries, tiling.block_q, PADDING_QUERY)
    key_tiles = tile_side(keys, tiling.block_k, PADDING_KEY)
    kinds = jax.vmap(partial(classify_pairs, rule))(query_tiles, key_tiles)
    some, every = (jnp.swapaxes(x, 1, 2) if by_key else x for x in kinds)
    pairs, steps = pack_pairs(some, every)
    rows, columns = (jnp.moveaxis(side.stacked(), 0, 2) for side in (query_tiles, key_tiles))
    return Sides(jnp.tile(rows, tiling.groups), columns, pairs, steps)


class Specs(NamedTuple):
    """Block specifications of the arrays of Tiling and cut_sides."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    values: pl.BlockSpec
    keys_and_values: pl.BlockSpec
    rows: pl.BlockSpec
    query_side: pl.BlockSpec
    key_side: pl.BlockSpec


def specs_of(tiling: Tiling, sides: Sides, *, by_key: bool = False) -> Specs:
    """Return the block specifications for the grid of a list in order of query tiles or (`by_key`) of key tiles."""
    t = tiling

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        def at(context, head, outer, inner, pairs):  # type: ignore[no-untyped-def]
            step, share = (outer, inner) if by_key else (inner, outer)
            pair = TilePair.at(pairs, context, step, t)
            query, key = (pair.inner, pair.outer) if by_key else (pair.outer, pair.inner)
            return index(context, head, share, query, key)

        return pl.BlockSpec(shape, at)

    # b, h, s, q, k: context, key head, share of its query heads, tile of queries, tile of keys.
    return Specs(
        spec((None, None, None, t.groups, t.block_q, t.head_dim), lambda b, h, s, q, k: (b, h, s, 0, q, 0)),
        spec((None, None, None, t.block_k, t.head_dim), lambda b, h, s, q, k: (b, h, 0, k, 0)),
        spec((None, None, None, t.block_k, t.head_dim), lambda b, h, s, q, k: (b, h, 1, k, 0)),
        spec((None, None, 2, t.block_k, t.head_dim), lambda b, h, s, q, k: (b, h, 0, k, 0)),
        spec((None, None, None, None, 1, t.rows), lambda b, h, s, q, k: (b, h, s, q, 0, 0)),
        spec((None, None, sides.queries.shape[2], t.rows), lambda b, h, s, q, k: (b, q, 0, 0)),
        spec((None, None, 2, t.block_k), lambda b, h, s, q, k: (b, k, 0, 0)),
    )


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Return the matrix product over the contracted axes, in float32."""
    axes = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision_of(a), preferred_element_type=jnp.float32)


def logits(options: Options, k: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return scaled and capped logits (keys, rows) in units of log 2, and the derivative of the cap or None."""
    s = product(k, q, (1, 1))
    cap = options.logits_soft_cap
    if cap is None:
        return s * (options.scale * LOG2_E), None
    t = jnp.tanh(s * (options.scale / cap))
    return t * (cap * LOG2_E), 1 - t * t


def tile_mask(rule: Rule, queries: jax.Array, keys: jax.Array) -> Bool[Array, "block_k rows"]:
    """Apply the mask rule to a tile, given `Side.stacked` of queries (2 or 3, rows) and of keys (2, block_k)."""
    columns = keys.T
    return may_see(rule, Side(*jnp.split(queries, len(queries))), Side(columns[:, :1], columns[:, 1:]))


def visit(pair: TilePair, mask: Callable[[], jax.Array], compute: Callable[[jax.Array | None], None]) -> None:
    """Call `compute(None)` for a full pair, `compute(mask())` for a partial pair, nothing for a hidden pair."""
    pl.when(pair.is_full)(lambda: compute(None))
    pl.when(pair.is_partial)(lambda: compute(mask()))


def shape_like(reference: jax.Array, shape: tuple[int, ...]) -> Any:
    """Return a float32 output shape, typed as varying over the mesh axes of `reference` in any version of JAX."""
    return jax.eval_shape(lambda x: jnp.broadcast_to(x.ravel()[0].astype(jnp.float32), shape), reference)


def cost(tiling: Tiling, products: int, options: Options, *arrays: jax.Array) -> pl.CostEstimate:
    """Estimate the cost for the scheduler, which hides transfers behind kernels; causal attention counts half."""
    t = tiling
    logits = t.batch * t.kv_heads * t.shares * t.groups * t.queries * t.keys // (2 if options.rule.is_causal else 1)
    return pl.CostEstimate(
        flops=2 * products * logits * t.head_dim,
        transcendentals=logits,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
