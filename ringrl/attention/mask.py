"""The mask rule and the static options of a call. A query sees a key if position, window and segment allow it.

    position of the key   0 1 2 3 4 5 6 7 8     local window of 2 tokens to the left, and a global prefix:
    query at 7            x x x . . x x x .     this query's prefix ends at position 3

Positions, segment ids and prefixes are O(S) integers that travel with the arrays. No S x S mask exists. For a tile of
queries and keys, the minima and maxima of both decide whether the tile is skipped, computed without a mask, or masked.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

# Segment ids of padding, which match neither each other nor a real segment.
PADDING_QUERY, PADDING_KEY = -(2**31), -(2**31) + 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """The static part of the mask. With a window (left, right), a query at p sees keys in [p - left, p + right]."""

    is_causal: bool = True
    window: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of one attention call, as every kernel takes them."""

    rule: Rule
    scale: float  # multiplies the logits before the optional soft cap
    logits_soft_cap: float | None = None
    block_q: int | None = None  # tile sizes; None: the kernel's own
    block_k: int | None = None
    implementation: str = "xla"  # the name of the kernel
    is_explicit: bool = True  # named by the caller, which forbids a fallback


class Side(NamedTuple):
    """Positions and segment ids of the queries or of the keys, (B, S) int32; kernels also take one context (S,).

    Queries may have a global prefix: the window does not hide keys at positions below it.
    """

    positions: Int32[Array, "*batch tokens"]
    segment_ids: Int32[Array, "*batch tokens"]
    prefix: Int32[Array, "*batch tokens"] | None = None

    def stacked(self) -> Int32[Array, "arrays *batch tokens"]:
        """Stack the arrays into one. `Side(*stacked)` is the inverse."""
        return jnp.stack([x for x in self if x is not None])


def may_see(rule: Rule, queries: Side, keys: Side) -> jax.Array:
    """Apply the rule to arrays that broadcast against each other."""
    ahead = queries.positions - keys.positions  # tokens from the key to the query
    allowed = queries.segment_ids == keys.segment_ids
    if rule.is_causal:
        allowed &= ahead >= 0
    if rule.window is not None:
        left, right = rule.window
        near = (ahead <= left) & (ahead >= -right)  # this order cannot overflow int32 with a wide window
        allowed &= near if queries.prefix is None else near | (keys.positions < queries.prefix)
    return allowed


def visible(rule: Rule, queries: Side, keys: Side) -> Bool[Array, "*batch queries keys"]:
    """Apply the rule to every pair of a tile of queries and a tile of keys."""
    rows, columns = jax.tree.map(lambda x: x[..., :, None], queries), jax.tree.map(lambda x: x[..., None, :], keys)
    return may_see(rule, rows, columns)


class TileKind(NamedTuple):
    """Whether any query of a tile sees a key (else the tile is skipped), and whether all see all (no mask needed)."""

    any_visible: Bool[Array, ""]
    all_visible: Bool[Array, ""]


def classify(rule: Rule, queries: Side, keys: Side) -> TileKind:
    """Classify a tile by minima and maxima of positions and segment ids. `any_visible` may be a false positive."""
    q_low, q_high = queries.positions.min(-1), queries.positions.max(-1)
    k_low, k_high = keys.positions.min(-1), keys.positions.max(-1)
    qs_low, qs_high = queries.segment_ids.min(-1), queries.segment_ids.max(-1)
    ks_low, ks_high = keys.segment_ids.min(-1), keys.segment_ids.max(-1)
    some = (qs_low <= ks_high) & (ks_low <= qs_high)
    every = (qs_low == qs_high) & (ks_low == ks_high) & (qs_low == ks_low)
    if rule.is_causal:
        some &= k_low <= q_high
        every &= k_high <= q_low
    if rule.window is not None:
        left, right = rule.window
        some_near = (q_low - k_high <= left) & (q_high - k_low >= -right) & (-left <= right)
        every_near = (q_high - k_low <= left) & (q_low - k_high >= -right)
        if queries.prefix is not None:
            least, most = queries.prefix.min(-1), queries.prefix.max(-1)
            some_near |= k_low < most
            # Every query sees the keys below `least`, so the window must reach only the others.
            every_near = (k_high < least) | (q_high - jnp.maximum(k_low, least) <= left) & (q_low - k_high >= -right)
        some, every = some & some_near, every & every_near
    return TileKind(some.any(), every.all())


def classify_pairs(rule: Rule, queries: Side, keys: Side) -> TileKind:
    """Classify all pairs of tiles (tiles, ..., tokens) of both sides: two arrays (query_tiles, key_tiles) bool."""
    of_one_tile = jax.vmap(partial(classify, rule), in_axes=(None, 0))
    kinds: TileKind = jax.vmap(of_one_tile, in_axes=(0, None))(queries, keys)
    return kinds


def tile_side(side: Side, size: int, segment_id: int) -> Side:
    """Reshape (B, S) -> (B, tiles, size), padded as in `pad_side`."""
    padded = pad_side(side, -(-side.positions.shape[1] // size) * size, segment_id)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), padded)


def pad_side(side: Side, size: int, segment_id: int) -> Side:
    """Pad to `size` tokens with tokens that match no segment. Positions repeat the last one to keep tiles tight."""
    amount = [(0, 0)] * (side.positions.ndim - 1) + [(0, size - side.positions.shape[-1])]
    padded: Side = jax.tree.map(lambda x: jnp.pad(x, amount, mode="edge"), side)
    return padded._replace(segment_ids=jnp.pad(side.segment_ids, amount, constant_values=segment_id))
