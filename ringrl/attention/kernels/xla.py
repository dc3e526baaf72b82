"""Tiled attention in plain XLA: the path of every CPU user, and the check on the others.

Memory is O(S): a scan over tiles of queries holds one (block_q, block_k) tile of logits at a time. Operations per
visible tile pair, per head: 4 * block_q * block_k * D forward, 10 * block_q * block_k * D backward. Tiles that the
mask rule excludes are skipped, so causal costs half of full.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Side, classify, pad_side, tiles, visible
from ringrl.attention.options import Options
from ringrl.attention.varying import varying_like


class Queries(NamedTuple):
    """One tile of queries, (B, Hkv, G, block_q, D), and where it stands."""

    q: jax.Array
    side: Side


class Residuals(NamedTuple):
    """What the backward needs beside a tile of queries: lse and delta (B, Hkv, G, block_q), do like the queries."""

    lse: jax.Array
    delta: jax.Array
    do: jax.Array


class Keys(NamedTuple):
    """One tile of keys and values, (B, Hkv, block_k, D) each, and where it stands."""

    k: jax.Array
    v: jax.Array
    side: Side


def _logits(options: Options, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scaled, soft-capped logits in float32 and the derivative of the cap (None without one)."""
    s = jnp.einsum("bhgqd,bhkd->bhgqk", q, k, preferred_element_type=jnp.float32) * options.scale
    if options.logits_soft_cap is None:
        return s, None
    t = jnp.tanh(s / options.logits_soft_cap)
    return t * options.logits_soft_cap, 1 - t * t


def _mask(options: Options, queries: Queries, keys: Keys) -> jax.Array:
    return visible(options.rule, queries.side, keys.side)[:, None, None]


def _by_kind(options: Options, queries: Queries, keys: Keys, skip, compute):  # type: ignore[no-untyped-def]
    """Run `skip()`, `compute(None)` or `compute(mask)` as the tile's extremes decide."""
    kind = classify(options.rule, queries.side, keys.side)
    return lax.cond(
        kind.any_visible,
        lambda: lax.cond(kind.all_visible, lambda: compute(None), lambda: compute(_mask(options, queries, keys))),
        skip,
    )


def _forward_tile(options: Options, queries: Queries, carry, keys: Keys):  # type: ignore[no-untyped-def]
    """Online softmax: fold one tile of keys into (accumulator, running maximum, running sum)."""
    o, maximum, total = carry

    def compute(mask: jax.Array | None):  # type: ignore[no-untyped-def]
        s, _ = _logits(options, queries.q, keys.k)
        if mask is not None:
            s = jnp.where(mask, s, -jnp.inf)
        new_maximum = jnp.maximum(maximum, s.max(-1))
        shift = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)  # rows that have seen nothing yet
        p = jnp.exp(s - shift[..., None])
        alpha = jnp.exp(maximum - shift)
        pv = jnp.einsum("bhgqk,bhkd->bhgqd", p.astype(keys.v.dtype), keys.v, preferred_element_type=jnp.float32)
        return o * alpha[..., None] + pv, new_maximum, total * alpha + p.sum(-1)

    return _by_kind(options, queries, keys, lambda: carry, compute), None


def _backward_tile(options: Options, queries: Queries, residuals: Residuals, carry, keys: Keys):  # type: ignore[no-untyped-def]
    """Add one tile pair's share to (dq, dk, dv), from the global log-sum-exp and delta."""
    q, (lse, delta, do) = queries.q, residuals

    def compute(mask: jax.Array | None):  # type: ignore[no-untyped-def]
        s, cap_slope = _logits(options, q, keys.k)
        p = jnp.exp(s - lse[..., None])
        if mask is not None:
            p = jnp.where(mask, p, 0.0)
        dp = jnp.einsum("bhgqd,bhkd->bhgqk", do, keys.v, preferred_element_type=jnp.float32)
        ds = p * (dp - delta[..., None])
        if cap_slope is not None:
            ds *= cap_slope
        ds = (ds * options.scale).astype(q.dtype)
        dq = jnp.einsum("bhgqk,bhkd->bhgqd", ds, keys.k, preferred_element_type=jnp.float32)
        dk = jnp.einsum("bhgqk,bhgqd->bhkd", ds, q, preferred_element_type=jnp.float32)
        dv = jnp.einsum("bhgqk,bhgqd->bhkd", p.astype(do.dtype), do, preferred_element_type=jnp.float32)
        return jax.tree.map(jnp.add, carry, (dq, dk, dv))

    return _by_kind(options, queries, keys, lambda: carry, compute)


def _split_queries(x: jax.Array, num_kv_heads: int, block: int) -> jax.Array:
    """(B, S, H[, D]) -> (tiles, B, Hkv, G, block[, D]), padded with zeros."""
    x = _pad(x, block)
    x = x.reshape(*x.shape[:2], num_kv_heads, -1, *x.shape[3:])
    return jnp.moveaxis(tiles(x, block), 2, 4)


def _split_keys(x: jax.Array, block: int) -> jax.Array:
    """(B, S, Hkv, D) -> (tiles, B, Hkv, block, D), padded with zeros."""
    return jnp.swapaxes(tiles(_pad(x, block), block), 2, 3)


def _pad(x: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))


def _join_queries(x: jax.Array, length: int) -> jax.Array:
    """(tiles, B, Hkv, G, block[, D]) -> (B, S, H[, D]) without the padding."""
    x = jnp.moveaxis(x, (1, 4), (0, 2))  # (B, tiles, block, Hkv, G[, D])
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], *x.shape[5:])[:, :length]


def _join_keys(x: jax.Array, length: int) -> jax.Array:
    """(tiles, B, Hkv, block, D) -> (B, S, Hkv, D) without the padding."""
    x = jnp.moveaxis(x, (1, 3), (0, 2))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _split_side(side: Side, block: int, padding: int) -> Side:
    length = side.positions.shape[1]
    padded = pad_side(side, length + -length % block, padding)
    return Side(tiles(padded.positions, block), tiles(padded.segment_ids, block))


def _fit(options: Options, q: jax.Array, k: jax.Array) -> Options:
    """Blocks no longer than the (8-aligned) sequences, so that short ones are not padded to a whole block."""
    align = lambda n: -(-n // 8) * 8  # noqa: E731
    return dataclasses.replace(
        options,
        block_q=min(options.block_q, align(q.shape[1])),
        block_k=min(options.block_k, align(k.shape[1])),
    )


def _key_tiles(k: jax.Array, v: jax.Array, side: Side, block: int) -> Keys:
    return Keys(_split_keys(k, block), _split_keys(v, block), _split_side(side, block, PADDING_KEY))


def forward(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    queries: Side,
    keys: Side,
    options: Options,
) -> tuple[Float32[Array, "batch queries heads head_dim"], Float32[Array, "batch queries heads"]]:
    """Normalised output and log-sum-exp; a query that sees no key gives 0 and -inf."""
    options = _fit(options, q, k)
    key_tiles = _key_tiles(k, v, keys, options.block_k)

    def query_tile(_: None, tile: Queries) -> tuple[None, tuple[jax.Array, jax.Array]]:
        shape = tile.q.shape
        zeros = partial(jnp.zeros, dtype=jnp.float32)
        start = (zeros(shape), jnp.full(shape[:-1], -jnp.inf, jnp.float32), zeros(shape[:-1]))
        (o, maximum, total), _ = lax.scan(partial(_forward_tile, options, tile), varying_like(q, start), key_tiles)
        return None, (o / jnp.where(total == 0, 1.0, total)[..., None], maximum + jnp.log(total))

    tile = Queries(_split_queries(q, k.shape[2], options.block_q), _split_side(queries, options.block_q, PADDING_QUERY))
    _, (o, lse) = lax.scan(query_tile, None, tile)
    return _join_queries(o, q.shape[1]), _join_queries(lse, q.shape[1])


def backward(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    queries: Side,
    keys: Side,
    options: Options,
    lse: Float32[Array, "batch queries heads"],
    delta: Float32[Array, "batch queries heads"],
    do: Float[Array, "batch queries heads head_dim"],
) -> tuple[
    Float32[Array, "batch queries heads head_dim"],
    Float32[Array, "batch keys kv_heads head_dim"],
    Float32[Array, "batch keys kv_heads head_dim"],
]:
    """Gradients of this block of keys, from the global `lse` and `delta` of its queries."""
    options = _fit(options, q, k)
    kv_heads, block = k.shape[2], options.block_q
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)  # such rows are masked everywhere: any finite value will do
    key_tiles = _key_tiles(k, v, keys, options.block_k)

    def query_tile(carry, tile_and_residuals):  # type: ignore[no-untyped-def]
        tile, residuals = tile_and_residuals

        def key_tile(dq: jax.Array, keys_and_gradients):  # type: ignore[no-untyped-def]
            keys_tile, dk, dv = keys_and_gradients
            dq, dk, dv = _backward_tile(options, tile, residuals, (dq, dk, dv), keys_tile)
            return dq, (dk, dv)

        start = varying_like(q, jnp.zeros(tile.q.shape, jnp.float32))
        dq, carry = lax.scan(key_tile, start, (key_tiles, *carry))
        return carry, dq

    split = partial(_split_queries, num_kv_heads=kv_heads, block=block)
    tile = Queries(split(q), _split_side(queries, block, PADDING_QUERY))
    residuals = Residuals(split(lse), split(delta), split(do))
    start = (jnp.zeros(key_tiles.k.shape, jnp.float32), jnp.zeros(key_tiles.v.shape, jnp.float32))
    (dk, dv), dq = lax.scan(query_tile, varying_like(q, start), (tile, residuals))
    return _join_queries(dq, q.shape[1]), _join_keys(dk, k.shape[1]), _join_keys(dv, k.shape[1])
