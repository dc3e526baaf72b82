"""The one mask rule: a query sees a key if position, window and segment allow it.

Positions and segment ids are O(S) integers that travel with the arrays; no S x S mask ever exists. For a tile of
queries and keys the extremes of both decide whether it is skipped, computed without mask arithmetic, or masked.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

# Segment ids of padding: they match neither each other nor a real segment.
PADDING_QUERY, PADDING_KEY = -(2**31), -(2**31) + 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is allowed, as static data. A window (left, right) lets a query at p see keys in [p - left, p + right]."""

    is_causal: bool = True
    window: tuple[int, int] | None = None


class Side(NamedTuple):
    """Where the tokens of one side (queries or keys) stand: positions and segment ids, both (B, S) int32; kernels also
    take one context without the batch axis."""

    positions: Int32[Array, "*batch tokens"]
    segment_ids: Int32[Array, "*batch tokens"]


def may_see(rule: Rule, queries: Side, keys: Side) -> jax.Array:
    """The rule itself, for arrays of any shapes that broadcast against each other."""
    ahead = queries.positions - keys.positions  # steps that the query is ahead of the key
    allowed = queries.segment_ids == keys.segment_ids
    if rule.is_causal:
        allowed &= ahead >= 0
    if rule.window is not None:
        left, right = rule.window
        allowed &= (ahead <= left) & (ahead >= -right)  # compared this way, no window is too wide for int32
    return allowed


def visible(rule: Rule, queries: Side, keys: Side) -> Bool[Array, "*batch queries keys"]:
    """The rule for every pair of one tile of queries and one of keys."""
    return may_see(rule, Side(*(x[..., :, None] for x in queries)), Side(*(x[..., None, :] for x in keys)))


class TileKind(NamedTuple):
    """Whether any query of a tile can see a key (else skip it), and whether all see all (no mask arithmetic)."""

    any_visible: Bool[Array, ""]
    all_visible: Bool[Array, ""]


def classify(rule: Rule, queries: Side, keys: Side) -> TileKind:
    """Decide from the extremes of positions and segment ids alone; `any_visible` may err towards computing."""
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
        some &= (q_low - k_high <= left) & (q_high - k_low >= -right)
        every &= (q_high - k_low <= left) & (q_low - k_high >= -right)
    return TileKind(some.any(), every.all())


def pad_side(side: Side, size: int, segment_id: int) -> Side:
    """Pad to `size` tokens that see and are seen by nothing; positions repeat the last one to keep tiles tight."""
    amount = [(0, 0)] * (side.positions.ndim - 1) + [(0, size - side.positions.shape[-1])]
    return Side(
        jnp.pad(side.positions, amount, mode="edge"), jnp.pad(side.segment_ids, amount, constant_values=segment_id)
    )
