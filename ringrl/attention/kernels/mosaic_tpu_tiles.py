"""What the TPU kernels share: tiles, the list of tile pairs to visit, and the arithmetic of one tile.

Everywhere keys lie down (on sublanes) and queries across (on lanes):

               rows: queries of the heads that share a key head
             +-------------------------------+
       keys  |  logits (block_k, rows)       |   key positions are a column, query positions a row
             +-------------------------------+
             maximum, sum, log-sum-exp, delta    one row each: compact in memory, cheap to spread over a tile
             transposed output (head_dim, rows)  fills its registers whatever head_dim is

Which pairs of tiles see each other is decided outside, from the extremes of positions and segment ids. The kernels get
a list of those pairs alone and their grid is as long as the list: a skipped pair costs no step, no copy, no arithmetic.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from ringrl.attention.contract import Inputs, precision_of
from ringrl.attention.device import device_of
from ringrl.attention.kernels.tuning.mosaic_tpu import Work, blocks_for
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Rule, Side, classify, may_see, pad_side
from ringrl.attention.options import Options

LOG2_E = 1.4426950408889634
LANES = 128
TILE_BITS = 13  # of a tile's index in the list of pairs
MAX_PAIRS = 2**17  # entries of the list, 32 bits each: half of the scalar memory of every generation
Interpret = bool | pltpu.InterpretParams


def unsupported(dtype: jnp.dtype, head_dim: int, options: Options) -> str | None:
    """One sentence on what the TPU kernels do not take, or None if they take it."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"q: {jnp.dtype(dtype).name} has no matrix product on TPUs: use bfloat16 or float32"
    if head_dim % 8 or head_dim > 256:
        return f"q: head_dim {head_dim} is not a multiple of 8 up to 256"
    for name in ("block_q", "block_k"):
        block = getattr(options, name)
        if block is not None and (block <= 0 or block % LANES):
            return f"{name}: {block} is not a multiple of {LANES}, the width of a TPU's registers"
    return None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How arrays are cut. Of the heads that share a key head `groups` are rows of one tile; there are `shares` such."""

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
        """Queries of all heads of a tile."""
        return self.groups * self.block_q

    @property
    def query_tiles(self) -> int:
        return pl.cdiv(self.queries, self.block_q)

    @property
    def key_tiles(self) -> int:
        return pl.cdiv(self.keys, self.block_k)

    @property
    def pairs(self) -> int:
        """The length of the list if every tile sees every other."""
        return self.query_tiles * self.key_tiles

    def cut_queries(self, x: Float[Array, "heads rows head_dim"]) -> jax.Array:
        """To (batch, kv_heads, shares, groups, padded queries, head_dim)."""
        x = x.reshape(self.batch, self.kv_heads, self.shares, self.groups, self.queries, -1)
        return _pad(x, 4, self.query_tiles * self.block_q)

    def join_queries(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        return x[:, :, :, :, : self.queries].reshape(self.batch * self.kv_heads, -1, self.head_dim)

    def cut_rows(self, x: Float32[Array, "heads rows"], fill: float = 0.0) -> jax.Array:
        """To (batch, kv_heads, shares, query_tiles, 1, rows)."""
        x = x.reshape(self.batch, self.kv_heads, self.shares, self.groups, self.queries)
        x = _pad(x, 4, self.query_tiles * self.block_q, fill)
        x = x.reshape(*x.shape[:4], self.query_tiles, self.block_q)
        return jnp.moveaxis(x, 3, 4).reshape(*x.shape[:3], self.query_tiles, 1, self.rows)

    def join_rows(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        x = jnp.moveaxis(x.reshape(*x.shape[:4], self.groups, self.block_q), 4, 3)
        x = x.reshape(*x.shape[:4], self.query_tiles * self.block_q)[..., : self.queries]
        return x.reshape(self.batch * self.kv_heads, -1)

    def cut_keys(self, kv: Float[Array, "heads 2 keys head_dim"]) -> jax.Array:
        """To (batch, kv_heads, 2, padded keys, head_dim)."""
        return _pad(kv, 2, self.key_tiles * self.block_k).reshape(self.batch, self.kv_heads, 2, -1, self.head_dim)

    def join_keys(self, kv: jax.Array) -> jax.Array:
        """The inverse."""
        return kv[:, :, :, : self.keys].reshape(self.batch * self.kv_heads, 2, self.keys, self.head_dim)


def _pad(x: jax.Array, axis: int, size: int, fill: float = 0.0) -> jax.Array:
    amount = [(0, 0)] * x.ndim
    amount[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, amount, constant_values=fill)


def tiling_of(work: Work, inputs: Inputs, options: Options) -> Tiling:
    """Tiles as large as options or the table say, with as many heads in a tile as they have room for.

    ValueError where `unsupported` has a reason, or where there are too many.
    """
    if (reason := unsupported(inputs.q.dtype, inputs.q.shape[-1], options)) is not None:
        raise ValueError(reason)
    tiling = _tiling(work, inputs, options)
    if tiling is None:
        raise ValueError(str(too_many(inputs, options)))
    return tiling


def too_many(inputs: Inputs, options: Options) -> str | None:
    """One sentence where the forward or the backward pass has more tiles than the list of pairs has room for."""
    if all(_tiling(work, inputs, options) for work in get_args(Work)):
        return None
    (batch, queries), keys = inputs.queries.positions.shape, inputs.kv.shape[2]
    return (
        f"q, k: {batch} x {queries} queries and {keys} keys per device are more tiles than the {MAX_PAIRS} pairs that a"
        " TPU kernel can list: use a smaller batch, or more devices along the sequence"
    )


def _tiling(work: Work, inputs: Inputs, options: Options) -> Tiling | None:
    q, head_dim = inputs.q, inputs.q.shape[-1]
    (batch, queries), keys = inputs.queries.positions.shape, inputs.kv.shape[2]
    kv_heads, heads = inputs.kv_heads, inputs.groups
    blocks = blocks_for(work, head_dim, q.dtype, device_of(q).device_kind)
    block_k = _fit(options.block_k or blocks.keys, keys)
    for groups in sorted((n for n in range(1, heads + 1) if heads % n == 0), reverse=True):
        block_q = _fit(options.block_q or blocks.rows // groups // LANES * LANES, queries)
        if not block_q or groups * block_q > max(blocks.rows, block_q):
            continue
        tiling = Tiling(batch, kv_heads, heads // groups, groups, queries, keys, head_dim, block_q, block_k)
        if batch * tiling.pairs <= MAX_PAIRS and max(tiling.query_tiles, tiling.key_tiles) <= 2**TILE_BITS:
            return tiling
    return None


def _fit(block: int, length: int) -> int:
    """A block no longer than the sequence, in whole registers."""
    return min(block, pl.cdiv(length, LANES) * LANES)


class Pair(NamedTuple):
    """One entry of the list: tiles of the outer and the inner side, and what to do with them."""

    outer: jax.Array
    inner: jax.Array
    is_first: jax.Array  # of its outer tile
    is_last: jax.Array
    is_partial: jax.Array
    is_full: jax.Array  # every query sees every key: no mask is needed

    @classmethod
    def at(cls, pairs: Any, context: jax.Array, step: jax.Array, tiling: Tiling) -> "Pair":
        """The entry of this step, from a reference to what `pack_pairs` packed."""
        return cls.unpack(pairs[context * tiling.pairs + step])

    @classmethod
    def unpack(cls, code: jax.Array) -> "Pair":
        """TILE_BITS for each tile, 4 bits for what to do."""
        kind, inner = code & 3, (code >> 4) & (2**TILE_BITS - 1)
        return cls(code >> (TILE_BITS + 4), inner, (code & 8) != 0, (code & 4) != 0, kind == 1, kind == 2)


def pack_pairs(
    some: Bool[Array, "batch outer inner"], every: Bool[Array, "batch outer inner"]
) -> tuple[Int32[Array, " batch_pairs"], Int32[Array, ""]]:
    """The list of every context, one after the other, and the length of the longest.

    An outer tile that sees nothing has one entry all the same, which does nothing but write what it started with. The
    lists of shorter contexts end in repetitions that do nothing at all.
    """
    contexts, outer, inner = some.shape
    length = outer * inner
    outer_index, inner_index = jnp.arange(outer)[:, None], jnp.arange(inner)
    visited = some | (~some.any(2, keepdims=True) & (inner_index == 0))
    seen = jnp.cumsum(visited, axis=2)  # of this outer tile, up to here
    count = jnp.cumsum(seen[..., -1], axis=1)  # up to the end of this outer tile
    kind = some.astype(jnp.int32) + (some & every)
    code = (
        (outer_index << (TILE_BITS + 4))
        + (inner_index << 4)
        + ((seen == 1) << 3)
        + ((seen == seen[..., -1:]) << 2)
        + kind
    )
    idle = ((outer - 1) << (TILE_BITS + 4)) + (jnp.where(visited[:, -1], inner_index, 0).max(1) << 4)
    # Written to their places and not sorted into them: the compiler takes seconds over a sort as long as this.
    place = jnp.arange(contexts)[:, None, None] * length + (count - seen[..., -1])[..., None] + seen - 1
    place = jnp.where(visited, place, contexts * length)
    pairs = jnp.repeat(idle, length).at[place.reshape(-1)].set(code.reshape(-1), mode="drop")
    return pairs.astype(jnp.int32), count[:, -1].max().astype(jnp.int32)


class Sides(NamedTuple):
    """What the kernels know of where tokens stand: integers per tile, and which pairs of tiles to visit."""

    queries: Int32[Array, "batch query_tiles 2 rows"]
    keys: Int32[Array, "batch key_tiles 2 block_k"]
    pairs: Int32[Array, " batch_pairs"]
    steps: Int32[Array, ""]


def cut_sides(rule: Rule, queries: Side, keys: Side, tiling: Tiling, *, by_key: bool = False) -> Sides:
    """The pairs are listed query tile by query tile, or key tile by key tile."""
    query_tiles = _side_tiles(queries, tiling.query_tiles, tiling.block_q, PADDING_QUERY)
    key_tiles = _side_tiles(keys, tiling.key_tiles, tiling.block_k, PADDING_KEY)

    def kind(query_tile: Side, key_tile: Side):  # type: ignore[no-untyped-def]
        return classify(rule, Side(*(x[None] for x in query_tile)), Side(*(x[None] for x in key_tile)))

    kinds = jax.vmap(jax.vmap(jax.vmap(kind, (None, 0)), (0, None)))(query_tiles, key_tiles)
    some, every = (jnp.swapaxes(x, 1, 2) if by_key else x for x in kinds)
    pairs, steps = pack_pairs(some, every)
    rows = jnp.tile(jnp.stack(query_tiles, axis=2), tiling.groups)
    return Sides(rows, jnp.stack(key_tiles, axis=2), pairs, steps)


def _side_tiles(side: Side, tiles: int, block: int, padding: int) -> Side:
    """Positions and segment ids, (batch, tiles, block)."""
    return Side(*(x.reshape(x.shape[0], tiles, block) for x in pad_side(side, tiles * block, padding)))


class Place(NamedTuple):
    """Where a step of the grid is."""

    batch: jax.Array
    head: jax.Array
    share: jax.Array
    query: jax.Array
    key: jax.Array


class Specs(NamedTuple):
    """Blocks of the arrays that Tiling and cut_sides cut."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    values: pl.BlockSpec
    keys_and_values: pl.BlockSpec
    rows: pl.BlockSpec
    query_side: pl.BlockSpec
    key_side: pl.BlockSpec

    @property
    def backward(self) -> list[pl.BlockSpec]:
        """Of what the backward kernel takes, in its order."""
        return [self.queries] * 2 + [self.rows] * 2 + [self.query_side, self.keys, self.values, self.key_side]


def specs_of(tiling: Tiling, place: Callable[..., Place]) -> Specs:
    """`place` tells from the indices of the grid and the list of pairs where a step is."""

    def spec(shape: tuple[int | None, ...], index: Callable[[Place], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: index(place(*grid)))

    t = tiling
    return Specs(
        spec((None, None, None, t.groups, t.block_q, t.head_dim), lambda p: (p.batch, p.head, p.share, 0, p.query, 0)),
        spec((None, None, None, t.block_k, t.head_dim), lambda p: (p.batch, p.head, 0, p.key, 0)),
        spec((None, None, None, t.block_k, t.head_dim), lambda p: (p.batch, p.head, 1, p.key, 0)),
        spec((None, None, 2, t.block_k, t.head_dim), lambda p: (p.batch, p.head, 0, p.key, 0)),
        spec((None, None, None, None, 1, t.rows), lambda p: (p.batch, p.head, p.share, p.query, 0, 0)),
        spec((None, None, 2, t.rows), lambda p: (p.batch, p.query, 0, 0)),
        spec((None, None, 2, t.block_k), lambda p: (p.batch, p.key, 0, 0)),
    )


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The matrix product over these axes, in float32."""
    axes = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision_of(a), preferred_element_type=jnp.float32)


def logits(options: Options, k: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scaled and capped logits (keys, rows) in units of log 2, and the derivative of the cap (None without one)."""
    s = product(k, q, (1, 1))
    cap = options.logits_soft_cap
    if cap is None:
        return s * (options.scale * LOG2_E), None
    t = jnp.tanh(s * (options.scale / cap))
    return t * (cap * LOG2_E), 1 - t * t


def tile_mask(rule: Rule, queries: jax.Array, keys: jax.Array) -> Bool[Array, "block_k rows"]:
    """The rule for a tile, from its positions and segment ids: (2, rows) and (2, block_k)."""
    columns = keys.T
    return may_see(rule, Side(queries[:1], queries[1:]), Side(columns[:, :1], columns[:, 1:]))


def visit(pair: Pair, mask: Callable[[], jax.Array], compute: Callable[[jax.Array | None], None]) -> None:
    """`compute(None)` for a full pair, `compute(mask())` for a partial one, nothing for one that sees nothing."""
    pl.when(pair.is_full)(lambda: compute(None))
    pl.when(pair.is_partial)(lambda: compute(mask()))


def shape_like(reference: jax.Array, shape: tuple[int, ...]) -> Any:
    """A float32 output, typed as differing between devices wherever `reference` does, in any version of JAX."""
    return jax.eval_shape(lambda x: jnp.broadcast_to(x.ravel()[0].astype(jnp.float32), shape), reference)


def cost(tiling: Tiling, products: int, options: Options, *arrays: jax.Array) -> pl.CostEstimate:
    """For the scheduler, which hides transfers behind kernels: causal attention counted as half."""
    t = tiling
    logits = t.batch * t.kv_heads * t.shares * t.groups * t.queries * t.keys // (2 if options.rule.is_causal else 1)
    return pl.CostEstimate(
        flops=2 * products * logits * t.head_dim,
        transcendentals=logits,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
