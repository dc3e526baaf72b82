"""Attention of a few new tokens to a key-value cache, on one device or sharded over a mesh axis.

A sharded cache is striped: device r of n holds tokens r, r + n, r + 2n, ... in its slots 0, 1, 2, ... All devices fill
evenly, and a cache grows without moving tokens between devices. Each device attends to its own slots, and one pmax and
one psum merge the results: two small collectives instead of n - 1 hops.

Contexts with the same first tokens share a prefix. The prefix is stored once, and one matrix product computes the
logits of all contexts that share it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from ringrl.attention import arguments
from ringrl.attention.arguments import Axes
from ringrl.attention.contract import (
    AxisName,
    Partial,
    Terms,
    by_head,
    by_token,
    merge,
    merge_over,
    precision_of,
    with_sinks,
)
from ringrl.attention.mask import Options, Side, visible


class Prefix(NamedTuple):
    """Tokens that precede the contexts of a batch. Each of P prefixes is shared by B / P consecutive contexts.

    The capacity axis is sharded as in the cache. The prefix axis is not sharded.
    """

    k: Float[Array, "prefixes capacity kv_heads head_dim"]
    v: Float[Array, "prefixes capacity kv_heads value_dim"]
    length: Int[Array, ""] | int  # tokens; slots beyond are ignored but must be finite


@arguments.typed
def decode_attention(
    q: Float[Array, "batch new_tokens heads head_dim"],
    k_cache: Float[Array, "batch capacity kv_heads head_dim"],
    v_cache: Float[Array, "batch capacity kv_heads value_dim"],
    *,
    length: Int[Array, " *batch"] | int,
    prefix: Prefix | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    global_prefix: Int[Array, "*batch new_tokens"] | None = None,
    position_of: Callable[[jax.Array], jax.Array] | None = None,
    scale: float | Float[Array, ""] | None = None,
    logits_soft_cap: float | Float[Array, ""] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    alibi_slopes: Float[Array, " heads"] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: AxisName = "seq",
    batch_axes: Axes = None,
    head_axes: Axes = None,
    return_residual: bool = False,
) -> Float[Array, "batch new_tokens heads value_dim"] | tuple[jax.Array, Float32[Array, "batch new_tokens heads"]]:
    """Compute causal attention of the newest tokens, whose keys and values are already in the cache.

    Args:
      q: queries (B, N, H, D) of tokens length - N ... length - 1.
      k_cache, v_cache: (B, C, Hkv, D) and (B, C, Hkv, Dv), filled up to `length` (`append_to_cache`). Later slots are
        ignored but must be finite. q is rounded to the caches' dtype.
      length: tokens in the cache, including the new ones: () or, for contexts of different lengths, (B,).
      prefix: tokens before the cache. P must divide B, and each of P prefixes is shared by B / P consecutive contexts.
      local_window_size, scale, logits_soft_cap, sinks, alibi_slopes, return_residual: as for `attention`.
      global_prefix: (B, N) or (N,), as for `attention`.
      position_of: an increasing function from a token's index to its position in the mask, by default the identity.
        Index 0 is the first token of the prefix. `local_window_size`, `global_prefix` and `alibi_slopes` are in units
        of these positions.
      mesh: the devices of a sharded cache, whose capacity axis is striped over `axis_name`; None for one device.
      axis_name, batch_axes, head_axes: mesh axes of the cache's capacity, batch and heads.

    Returns:
      (B, N, H, Dv) in q's dtype, equal on all devices of `axis_name`.

    Raises:
      ValueError: invalid shapes, heads or dtypes; a concrete `length` outside N ... C, or a prefix length outside
        0 ... its capacity; a number of prefixes that neither divides the size of `batch_axes` nor is a multiple of it.
    """
    arguments.check_arrays(q, k_cache, v_cache, ("k_cache", "v_cache"), of_cache=True)
    (batch, new), capacity = q.shape[:2], k_cache.shape[1]
    if not 0 < new <= capacity:
        raise ValueError(f"q: expected 1 ... {capacity} new tokens for this cache, got {new}")
    arguments.check_counts("length", length, batch, new, capacity)
    if prefix is not None:
        _check_prefix(prefix, k_cache, v_cache)
        prefix = prefix._replace(length=jnp.asarray(prefix.length, jnp.int32)) if prefix.k.shape[1] else None
    sinks = arguments.per_head("sinks", sinks, q.shape[2])
    scaled, options, terms = arguments.Keywords(
        local_window_size=local_window_size,
        global_prefix=global_prefix,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
    ).settings(q)
    if global_prefix is not None:
        global_prefix = arguments.integers("global_prefix", global_prefix, batch, new)
    if not batch:
        empty = jnp.zeros((*q.shape[:3], v_cache.shape[3]), q.dtype)
        return (empty, jnp.zeros(q.shape[:3], jnp.float32)) if return_residual else empty
    cache = Prefix(k_cache, v_cache, jnp.asarray(length, jnp.int32))
    arrays = scaled, cache, prefix, global_prefix, terms
    attend = partial(_over_caches, options, position_of or _index)
    if mesh is None:
        _check_whole("k_cache", k_cache)
        o, lse = attend(0, 1, *arrays)
    else:
        o, lse = _over_shards(attend, arrays, mesh, axis_name, batch_axes, head_axes)
    if sinks is not None:
        o, lse = with_sinks(o, lse, sinks)
    return (o.astype(q.dtype), lse) if return_residual else o.astype(q.dtype)


def _over_shards(
    attend: Callable[..., Partial],
    arrays: tuple[Any, ...],
    mesh: Mesh | AbstractMesh,
    axis_name: AxisName,
    batch_axes: Axes,
    head_axes: Axes,
) -> Partial:
    """Attend to caches that are striped over `axis_name`. `arrays`: those of `_over_caches`."""
    q, cache, prefix, global_prefix, _ = arrays
    size = _check_shards(mesh, axis_name, cache.k.shape[1])
    arguments.check_axes(mesh, axis_name, batch_axes, head_axes, q.shape[0], cache.k.shape[2])
    parts = arguments.mesh_size(mesh, "batch_axes", batch_axes)
    if prefix is not None:
        _check_shards(mesh, axis_name, prefix.k.shape[1])
        if (prefixes := prefix.k.shape[0]) % parts and parts % prefixes:
            raise ValueError(
                f"prefix: expected a number of prefixes that divides the {parts} shards of the batch (batch_axes), or "
                f"a multiple of {parts}, got {prefixes}"
            )

    def shard(q: jax.Array, cache: Prefix, prefix: Prefix | None, *more: Any) -> Partial:
        if prefix is not None and parts > 1:
            prefix = _of_part(prefix, lax.axis_index(batch_axes), parts)
        return merge_over(attend(lax.axis_index(axis_name), size, q, cache, prefix, *more), axis_name)

    spec: Any = PartitionSpec  # trees of specifications have the types of the arrays
    replicated = spec(batch_axes, None, head_axes)
    own, shared = (spec(axes, axis_name, head_axes) for axes in (batch_axes, None))
    in_specs = (
        replicated,
        Prefix(own, own, spec(*[batch_axes] * cache.length.ndim)),
        None if prefix is None else Prefix(shared, shared, spec()),
        None if global_prefix is None else spec(batch_axes),
        Terms(spec(head_axes), spec()),
    )
    return jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=Partial(replicated, replicated))(*arrays)


def _of_part(prefix: Prefix, index: jax.Array, parts: int) -> Prefix:
    """Return the prefixes of the contexts in part `index` of the batch."""
    number = prefix.k.shape[0]
    held = max(1, number // parts)
    first = index * number // parts
    k, v = (lax.dynamic_slice_in_dim(x, first, held, axis=0) for x in (prefix.k, prefix.v))
    return Prefix(k, v, prefix.length)


def _index(token: jax.Array) -> jax.Array:
    return token


def _over_caches(
    options: Options,
    position_of: Callable[[jax.Array], jax.Array],
    index: jax.Array | int,
    size: int,
    q: jax.Array,
    cache: Prefix,
    prefix: Prefix | None,
    global_prefix: jax.Array | None,
    terms: Terms,
) -> Partial:
    """Attend to the slots of device `index` of `size`, in the contexts' own cache and in their prefix, if any."""
    begin = jnp.zeros((), jnp.int32) if prefix is None else jnp.asarray(prefix.length)
    batch, new, heads, head_dim = q.shape
    # (1, N), or (B, N) if the lengths of the contexts differ.
    token = begin + jnp.reshape(cache.length, (-1, 1)) - new + jnp.arange(new, dtype=jnp.int32)
    queries = Side(position_of(token), jnp.zeros_like(token), global_prefix)

    def attend(q: jax.Array, cache: Prefix, queries: Side, begin: jax.Array) -> Partial:
        slot = jnp.arange(cache.k.shape[1], dtype=jnp.int32) * size + index
        is_empty = slot >= jnp.reshape(cache.length, (-1, 1))  # empty slots are a segment that no query sees
        keys = Side(position_of(begin + slot)[None], is_empty.astype(jnp.int32))
        return _over_cache(q, cache, queries, keys, options, terms)

    part = attend(q, cache, queries, begin)
    if prefix is None:
        return part
    number = prefix.k.shape[0]
    together = q.reshape(number, -1, heads, head_dim)
    queries = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, new)).reshape(number, -1), queries)
    shared = attend(together, prefix, queries, jnp.int32(0))
    return merge(part, Partial(*(x.reshape(y.shape) for x, y in zip(shared, part, strict=True))))


def _over_cache(q: jax.Array, cache: Prefix, queries: Side, keys: Side, options: Options, terms: Terms) -> Partial:
    """Attend to the slots of a device: o (B, N, H, Dv) and lse (B, N, H)."""
    batch, new, heads, head_dim = q.shape
    kv_heads = cache.k.shape[2]
    groups = heads // kv_heads
    # The queries of a key head are the rows of one matrix. With other orders XLA rearranges the cache at every step.
    q = by_head(q, kv_heads).reshape(batch, kv_heads, -1, head_dim)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (cache.k, cache.v))
    product = partial(jnp.einsum, precision=precision_of(k), preferred_element_type=jnp.float32)
    s = product("bhmd,bhkd->bhmk", q.astype(k.dtype), k) * options.scale
    cap = options.logits_soft_cap if terms.soft_cap is None else terms.soft_cap
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    if terms.slopes is not None:
        slopes = jnp.repeat(terms.slopes.reshape(kv_heads, groups), new, axis=1)
        distance = jnp.abs(queries.positions[:, :, None] - keys.positions[:, None, :])
        s -= slopes[:, :, None] * jnp.tile(distance, (1, groups, 1))[:, None].astype(jnp.float32)
    seen = jnp.tile(visible(options.rule, queries, keys), (1, groups, 1))[:, None]
    s = jnp.where(seen, s, -jnp.inf)
    maximum = s.max(-1, keepdims=True)
    p = jnp.exp(s - jnp.where(jnp.isneginf(maximum), 0.0, maximum))  # a device may have no token yet
    total = p.sum(-1, keepdims=True)
    o = product("bhmk,bhkd->bhmd", p.astype(v.dtype), v)
    o, lse = o / jnp.where(total == 0, 1.0, total), (maximum + jnp.log(total))[..., 0]
    return Partial(*(by_token(x.reshape(batch * kv_heads, *x.shape[2:]), batch, new) for x in (o, lse)))


def append_to_cache(
    cache: Float[Array, "batch capacity kv_heads head_dim"],
    new: Float[Array, "batch new_tokens kv_heads head_dim"],
    length: Int[Array, " *batch"] | int,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: AxisName = "seq",
    batch_axes: Axes = None,
    head_axes: Axes = None,
) -> Float[Array, "batch capacity kv_heads head_dim"]:
    """Write new tokens after the first `length` tokens of a cache, in place if the caller's jit donates the cache.

    Arguments are as for `decode_attention`, but `length` excludes the new tokens. `grow_cache` raises the capacity.
    Raise ValueError for invalid shapes or too many tokens. A traced `length` is not checked.
    """
    if new.shape[1] > cache.shape[1]:
        raise ValueError(f"new: {new.shape[1]} new tokens do not fit a cache of {cache.shape[1]}")
    if (new.shape[0], *new.shape[2:]) != (cache.shape[0], *cache.shape[2:]):
        raise ValueError(f"new: expected batch, heads and head_dim of the cache {cache.shape}, got {new.shape}")
    arguments.check_counts(
        "length", length, len(cache), 0, cache.shape[1] - new.shape[1], "; enlarge the cache by grow_cache"
    )
    new = new.astype(cache.dtype)
    length = jnp.asarray(length, jnp.int32)
    if mesh is None:
        _check_whole("cache", cache)
        return _write(cache, new, length, 0, 1)
    size = _check_shards(mesh, axis_name, cache.shape[1], "cache")
    arguments.check_axes(mesh, axis_name, batch_axes, head_axes, cache.shape[0], cache.shape[2])

    def shard(cache: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
        return _write(cache, new, length, lax.axis_index(axis_name), size)

    replicated = PartitionSpec(batch_axes, None, head_axes)
    sharded = PartitionSpec(batch_axes, axis_name, head_axes)
    in_specs = (sharded, replicated, PartitionSpec(*[batch_axes] * length.ndim))
    return jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=sharded)(cache, new, length)


def _write(cache: jax.Array, new: jax.Array, length: jax.Array, index: jax.Array | int, size: int) -> jax.Array:
    """Return the cache of device `index` of `size` with its share of the new tokens.

    Several slots are written together. On CPUs, XLA copies the whole cache eight times if a single slot is written.
    """
    tokens, capacity = new.shape[1], cache.shape[1]
    if not tokens:
        return cache
    if length.ndim:
        return jax.vmap(lambda *one: _write(one[0][None], one[1][None], one[2], index, size)[0])(cache, new, length)
    width = min((tokens - 1) // size + 2, capacity)
    first = jnp.minimum(length // size, capacity - width)
    offset = (first + jnp.arange(width, dtype=jnp.int32)) * size + index - length
    is_new = (offset >= 0) & (offset < tokens)
    stretch = jnp.where(
        is_new[None, :, None, None],
        new[:, jnp.clip(offset, 0, tokens - 1)],
        lax.dynamic_slice_in_dim(cache, first, width, axis=1),
    )
    return lax.dynamic_update_slice_in_dim(cache, stretch, first, axis=1)


def grow_cache(
    cache: Float[Array, "batch capacity kv_heads head_dim"],
    capacity: int,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: AxisName = "seq",
    batch_axes: Axes = None,
    head_axes: Axes = None,
) -> Float[Array, "batch new_capacity kv_heads head_dim"]:
    """Return the cache with a larger capacity. Doubling the capacity keeps the number of compiled programs small.

    Raise ValueError for a smaller capacity, or a capacity that the number of devices does not divide.
    """
    if capacity < cache.shape[1]:
        raise ValueError(f"capacity: expected at least the cache's {cache.shape[1]} tokens, got {capacity}")
    size = 1 if mesh is None else _check_shards(mesh, axis_name, capacity, "capacity")

    def widen(cache: jax.Array) -> jax.Array:
        return jnp.pad(cache, ((0, 0), (0, capacity // size - cache.shape[1]), (0, 0), (0, 0)))

    if mesh is None:
        return widen(cache)
    sharded = PartitionSpec(batch_axes, axis_name, head_axes)
    return jax.shard_map(widen, mesh=mesh, in_specs=sharded, out_specs=sharded)(cache)


def _check_shards(mesh: Mesh | AbstractMesh, axis_name: AxisName, capacity: int, name: str = "k_cache") -> int:
    size = arguments.mesh_size(mesh, "axis_name", axis_name)
    if capacity % size:
        raise ValueError(f"{name}: a capacity of {capacity} does not divide among the {size} devices of {axis_name!r}")
    return size


def _check_whole(name: str, cache: jax.Array) -> None:
    """Check that a cache is not striped over devices, since `mesh` is missing. Traced caches cannot be checked."""
    sharding = None if isinstance(cache, jax.core.Tracer) else getattr(cache, "sharding", None)
    if isinstance(sharding, NamedSharding) and (*sharding.spec, None, None)[1] is not None:
        raise ValueError(f"{name}: its tokens are sharded over {sharding.spec[1]!r}; pass mesh, too")


def _check_prefix(prefix: Prefix, *caches: jax.Array) -> None:
    if not isinstance(prefix, Prefix):
        raise ValueError(f"prefix: expected a Prefix, got {type(prefix).__name__}")
    number, batch = prefix.k.shape[0], len(caches[0])
    for name, x, cache in zip(("prefix.k", "prefix.v"), (prefix.k, prefix.v), caches, strict=True):
        expected = (*prefix.k.shape[:2], *cache.shape[2:])
        if x.shape != expected or not number or batch % number:
            raise ValueError(
                f"prefix: expected (P, tokens, {', '.join(map(str, cache.shape[2:]))}) with P dividing {batch}, "
                f"got {x.shape} as {name}"
            )
        arguments.check_dtype(name, x)
    arguments.check_counts("prefix.length", prefix.length, None, 0, prefix.k.shape[1])
