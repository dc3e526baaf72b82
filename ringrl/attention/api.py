"""The public functions: attention on one device and over a mesh axis."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from ringrl.attention import arguments, kernels
from ringrl.attention.arguments import AttentionFunction, Axes, Keywords, axis_names, typed
from ringrl.attention.attend import LOCAL, AllGather, Exchange, attend
from ringrl.attention.contract import AxisName, varying_like, with_sinks
from ringrl.attention.layout import check_length, shard_positions
from ringrl.attention.ring import make_ring
from ringrl.attention.strategy import STRATEGIES, choose_strategy, device_of
from ringrl.attention.ulysses import gather_heads, heads_of_device, scatter_heads


def _public(function: Callable[..., Any]) -> AttentionFunction:
    """Add to a function: inputs without batch axis or tokens, values of another width, sinks, errors for keywords."""

    signature = inspect.signature(function)
    if "options" in signature.parameters:  # the keywords of `attention`, which help() then lists, too
        own = {name: x for name, x in signature.parameters.items() if name != "options"}
        shared = [x for name, x in inspect.signature(attention).parameters.items() if name not in own]
        signature = signature.replace(parameters=[*own.values(), *shared])

    @functools.wraps(function)
    def call(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        sinks: jax.Array | None = None,
        return_residual: bool = False,
        **options: Any,
    ) -> Any:
        for name in ("mask", "bias"):
            if name in options:
                raise _unsupported(name)
        if all(getattr(x, "ndim", None) == 3 for x in (q, k, v)):
            found = call(q[None], k[None], v[None], sinks=sinks, return_residual=return_residual, **options)
            return jax.tree.map(lambda x: x[0], found)
        arguments.check_arrays(q, k, v)
        try:
            signature.bind(q, k, v, **options)
        except TypeError as error:  # an unknown or missing keyword
            raise TypeError(f"{function.__name__}: {error}") from None
        sinks = arguments.per_head("sinks", sinks, q.shape[2])
        if (slopes := options.get("alibi_slopes")) is not None:
            options["alibi_slopes"] = arguments.per_head("alibi_slopes", slopes, q.shape[2])
        if 0 in (*q.shape[:2], k.shape[1]):
            o, lse = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        else:
            if options.get("scale") is None:
                options["scale"] = q.shape[-1] ** -0.5
            o, lse = function(*arguments.pad_to_same_width(q, k, v), **options)
            o = o[..., : v.shape[3]]
        if sinks is not None:
            o, lse = with_sinks(o, lse, sinks)
        return (o, lse) if return_residual else o

    call.__signature__ = signature  # type: ignore[attr-defined]
    return typed(call)


def _unsupported(name: str) -> ValueError:
    """Return the error for an argument of other libraries."""
    return ValueError(
        f"{name}: not supported; pass is_causal, local_window_size, global_prefix or segment_ids instead. "
        "In layers of Flax, wrap the function with as_attention_fn and use decode=False"
    )


@_public
def attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads value_dim"],
    *,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    global_prefix: Int[Array, "*batch tokens"] | None = None,
    segment_ids: Int[Array, "*batch tokens"] | None = None,
    key_segment_ids: Int[Array, "*batch keys"] | None = None,
    positions: Int[Array, "*batch tokens"] | None = None,
    key_positions: Int[Array, "*batch keys"] | None = None,
    query_seq_lengths: Int[Array, " batch"] | None = None,
    key_value_seq_lengths: Int[Array, " batch"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    logits_soft_cap: float | Float[Array, ""] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    alibi_slopes: Float[Array, " heads"] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Float[Array, "batch tokens heads value_dim"] | tuple[jax.Array, Float32[Array, "batch tokens heads"]]:
    """Compute softmax(scale * q k^T) v over the visible keys of each query, in O(S + T) memory.

    If there are fewer queries than keys, the queries have the last positions by default. A single context needs no
    batch axis. Without queries, the result is empty. Without keys, it is 0. Output and log-sum-exp have the checkpoint
    name "ring_attention": under jax.checkpoint, the policy save_only_these_names("ring_attention") of
    jax.checkpoint_policies avoids computing attention twice.

    Args:
      q: queries (B, S, H, D); float32, bfloat16 or float16. All values must be finite, also hidden ones.
        Gradients lose precision for logits above 1e4, where the log-sum-exp is accurate to 1e-3 only.
      k, v: keys (B, T, Hkv, D) and values (B, T, Hkv, Dv) in q's dtype; Hkv divides H (grouped-query attention). If
        D and Dv differ, the narrower arrays are padded with zeros.
      is_causal: a query sees keys at its own and earlier positions only.
      local_window_size: a query at position p sees keys in [p - left, p + right]; an int means both sides.
      global_prefix: (B, S) or (S,) positions, one for each query. The window hides no keys before this position, but
        the causal mask and the segments do. If this position is the start of the query's own document, the query sees
        all earlier documents and a window of its own document. A window (-1, 0) shows only the prefix.
      segment_ids, key_segment_ids: (B, S) or (S,), and (B, T) or (T,) integers; a query sees keys of its own
        segment only. If S = T, keys have the segments of the queries by default.
      positions, key_positions: integers of the same shapes, less than 2**31 apart; by default T - S ... T-1 and
        0 ... T-1. If S = T, keys have the positions of the queries by default. Only the mask and
        alibi_slopes use positions. The caller applies rotary embeddings.
      query_seq_lengths, key_value_seq_lengths: (B,) or () number of tokens in each context. Queries beyond
        see nothing, and keys beyond are hidden. Default positions do not depend on these lengths.
      scale: factor on the logits, 1/sqrt(D) by default. An array () may be traced and has a gradient. It multiplies q,
        and the product is rounded to q's dtype.
      logits_soft_cap: logits become cap * tanh(logits / cap). An array () may be traced and has a gradient.
      sinks: (H,) one extra logit for each head, in the denominator only. A sink is neither scaled nor capped, and the
        log-sum-exp includes it. A query without visible keys gives 0, and the sink as log-sum-exp.
      alibi_slopes: (H,) logits fall by slope * |position of the query - position of the key| (ALiBi, 2108.12409),
        after the soft cap.
      implementation: the kernel. None selects "mosaic_tpu" on TPUs, "mosaic_gpu" on Hopper GPUs, "cudnn" on other
        NVIDIA GPUs since Ampere, and "xla" (tiled attention in plain XLA) elsewhere. For unsupported inputs, None falls
        back to "xla" and logs a warning. A kernel selected by name raises ValueError instead. "autodiff" leaves
        differentiation to JAX: it is slower, but has forward-mode derivatives (jax.jvp). None selects "autodiff" for
        alibi_slopes and a traced cap.
      return_residual: also return the log-sum-exp (B, S, H) float32, differentiable.

    Returns:
      (B, S, H, Dv) in q's dtype. A query without visible keys gives 0 (log-sum-exp -inf) with finite gradients.

    Raises:
      ValueError: an invalid argument, named in the message.
    """
    del sinks, return_residual  # see _public
    spec = jax.typeof(q).sharding.spec
    if any(axis is not None for axis in spec):  # loops over tiles cannot preserve a sharding
        raise ValueError(f"q: sharded as {spec} over explicit mesh axes; use ring_attention, or jax.shard_map")
    (batch, tokens), keys = q.shape[:2], k.shape[1]
    given = Keywords(
        positions, key_positions, segment_ids, key_segment_ids, global_prefix, query_seq_lengths, key_value_seq_lengths,
        is_causal, local_window_size, scale, logits_soft_cap, alibi_slopes, implementation,
    ).checked(batch, tokens, keys)  # fmt: skip
    places = jnp.arange(tokens, dtype=jnp.int32), jnp.arange(keys, dtype=jnp.int32)
    sides = given.sides(batch, *places, keys - tokens)
    q, options, terms = given.settings(q)
    options = kernels.with_kernel(options, implementation, q, device_of(q), terms)
    return attend(q, k, v, *sides, options, LOCAL, terms)


@_public
def ring_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads value_dim"],
    *,
    mesh: Mesh | AbstractMesh,
    axis_name: AxisName = "seq",
    layout: str = "zigzag",
    strategy: str = "ring",
    bidirectional: bool = False,
    batch_axes: Axes = None,
    head_axes: Axes = None,
    **options: Any,
) -> Float[Array, "batch tokens heads value_dim"] | tuple[jax.Array, Float32[Array, "batch tokens heads"]]:
    """Compute `attention`, exact to rounding, of global arrays whose sequence axis is sharded over a mesh axis.

    All arrays with an axis of tokens are in layout order (`to_layout`, once per batch, not per layer). The function
    works under jit, grad, vmap, remat and scan.

    Args:
      q, k, v: as for `attention`; the lengths of queries and keys divide into the layout's chunks.
      mesh: the devices.
      axis_name: the mesh axis of the sequence. A tuple of axes is one long ring, the last axis fastest. The strategy
        "ulysses_ring" needs the tuple (ring axis, Ulysses axis).
      layout: "contiguous" | "striped" | "zigzag": the order of the tokens.
      strategy, bidirectional: as for `ring_attention_shard`.
      batch_axes, head_axes: mesh axes over which batch and heads are sharded, if any. If both are None and q is a
        concrete array on this mesh, q's sharding gives the axes.
      options: the keywords of `attention` (is_causal, segment_ids, scale, ...). Default positions are
        `layout_positions`, shifted by T - S for queries.

    Returns and raises as `attention`. The result is sharded like q.
    """
    ring_size = arguments.mesh_size(mesh, "axis_name", axis_name)
    for name, x in (("q", q), ("k", k)):
        check_length(name, x.shape[1], layout, ring_size)
    if batch_axes is None and head_axes is None:
        batch_axes, head_axes = _axes_of(q, mesh, axis_name)
    arguments.check_axes(mesh, axis_name, batch_axes, head_axes, q.shape[0], k.shape[2])
    given = Keywords(**options).checked(q.shape[0], q.shape[1], k.shape[1])._asdict()
    arrays = {name: x for name, x in given.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in given.items() if name not in arrays}
    static |= {"axis_name": axis_name, "layout": layout, "strategy": strategy, "bidirectional": bidirectional}
    qkv_spec, lengths = PartitionSpec(batch_axes, axis_name, head_axes), PartitionSpec(batch_axes)
    others = {"scale": PartitionSpec(), "logits_soft_cap": PartitionSpec(), "alibi_slopes": PartitionSpec(head_axes)}
    others |= {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    specs = {name: others.get(name, PartitionSpec(batch_axes, axis_name)) for name in arrays}
    return jax.shard_map(
        lambda q, k, v, arrays: ring_attention_shard(q, k, v, **arrays, **static, return_residual=True),
        mesh=mesh,
        in_specs=(qkv_spec, qkv_spec, qkv_spec, specs),
        out_specs=(qkv_spec, qkv_spec),
    )(q, k, v, arrays)


@_public
def ring_attention_shard(
    q: Float[Array, "batch local_tokens heads head_dim"],
    k: Float[Array, "batch local_keys kv_heads head_dim"],
    v: Float[Array, "batch local_keys kv_heads value_dim"],
    *,
    axis_name: AxisName = "seq",
    layout: str = "zigzag",
    strategy: str = "ring",
    bidirectional: bool = False,
    **options: Any,
) -> Float[Array, "batch local_tokens heads value_dim"] | tuple[jax.Array, Float32[Array, "batch local_tokens heads"]]:
    """Compute `ring_attention` inside an existing shard_map, where every array is this device's shard.

    With contiguous chunks, default positions and no global prefix, a window reduces the number of hops.

    Args:
      q, k, v, segment_ids, key_segment_ids, positions, key_positions, global_prefix: this device's tokens, in layout
        order.
      query_seq_lengths, key_value_seq_lengths: tokens of the whole sequence, not of this device.
      strategy: "ring": keys and values travel, memory is constant in the ring size. "ulysses": all-to-all from tokens
        to heads. "ulysses_ring": Ulysses and a ring, over a pair of axes. "all_gather": every device
        gets all keys and values. "auto": the result of `choose_strategy`.
      bidirectional: half of the key heads travel in the opposite direction, which uses both directions of the links.
        Used by "ring" and "ulysses_ring". Ignored if a window reduces the number of hops.
      sinks, alibi_slopes: (local heads,).
      axis_name, layout, options: as for `ring_attention`.

    Returns and raises as `attention`, for this device's queries.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: {strategy!r} is unknown; use one of {STRATEGIES}")
    arguments.check_flag("bidirectional", bidirectional)
    try:
        given, size = Keywords(**options), lax.axis_size(axis_name)
    except NameError:
        raise ValueError(f"axis_name: {axis_name!r} is not an axis of a surrounding jax.shard_map") from None
    q, settings, terms = given.settings(q)
    settings = kernels.with_kernel(settings, given.implementation, q, device_of(q), terms)
    # Keys may be replicated over devices with different query heads; JAX then sums the keys' gradients.
    q, (k, v) = varying_like(k, q), varying_like(q, (k, v))
    terms = varying_like(q, terms)  # else JAX sums their gradients over devices in every visible tile: a deadlock
    (batch, tokens, heads, _), local_keys = q.shape, k.shape[1]
    given = given.checked(batch, tokens, local_keys, size)
    index = lax.axis_index(axis_name)
    of_queries, of_keys = (shard_positions(layout, size, length, index) for length in (tokens, local_keys))
    queries, keys = varying_like(q, given.sides(batch, of_queries, of_keys, (local_keys - tokens) * size))
    if strategy == "auto":
        kind = device_of(q).device_kind
        strategy = choose_strategy(
            tokens, size, heads, k.shape[2], device_kind=kind, itemsize=k.dtype.itemsize, is_causal=given.is_causal
        ).strategy
    ring_axis, ulysses_axis = _split_axes(strategy, axis_name)
    if ulysses_axis is not None:
        q, k, v, queries, keys = scatter_heads(q, k, v, queries, keys, ulysses_axis, lax.axis_size(ulysses_axis))
        if terms.slopes is not None:
            terms = terms._replace(slopes=heads_of_device(terms.slopes, ulysses_axis))
    exchange: Exchange = LOCAL
    if strategy == "all_gather":
        exchange = AllGather(axis_name)
    elif ring_axis is not None and lax.axis_size(ring_axis) > 1:
        if bidirectional and k.shape[2] % 2:
            raise ValueError(f"bidirectional: expected an even number of key heads on each device, got {k.shape[2]}")
        custom = given.positions, given.key_positions, given.global_prefix
        is_plain = tokens == local_keys and all(x is None for x in custom)
        exchange = make_ring(ring_axis, q.shape[1], layout, settings.rule, is_plain, bidirectional=bidirectional)
    o, lse = attend(q, k, v, queries, keys, settings, exchange, terms)
    return (o, lse) if ulysses_axis is None else gather_heads(o, lse, ulysses_axis)


def _split_axes(strategy: str, axis_name: AxisName) -> tuple[AxisName | None, AxisName | None]:
    """Return (ring axis, Ulysses axis) of a strategy."""
    if strategy == "ulysses":
        return None, axis_name
    if strategy != "ulysses_ring":
        return axis_name, None
    if not isinstance(axis_name, tuple) or len(axis_name) != 2:
        raise ValueError(
            f'axis_name: strategy "ulysses_ring" expects two mesh axes, (ring axis, Ulysses axis), got {axis_name!r}'
        )
    return axis_name


def _axes_of(x: jax.Array, mesh: Mesh | AbstractMesh, axis_name: AxisName) -> tuple[Axes, ...]:
    """Return the mesh axes of a concrete array's batch and heads, without the axes of the sequence."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.core.Tracer) or not isinstance(sharding, NamedSharding) or sharding.mesh != mesh:
        return None, None
    spec = (*sharding.spec, None, None, None, None)
    return tuple(None if set(axis_names(axes)) & set(axis_names(axis_name)) else axes for axes in (spec[0], spec[2]))


def as_attention_fn(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wrap `attend` as the `attention_fn` of Flax's nnx.MultiHeadAttention and linen.MultiHeadDotProductAttention.

        attend = functools.partial(ring_attention, mesh=mesh, is_causal=True)
        nnx.MultiHeadAttention(..., attention_fn=as_attention_fn(attend))

    The options of `attend` (is_causal, segment_ids, ...) define the mask. Any mask array, a bias or dropout raises
    ValueError. A layer's decode=True makes a mask, and therefore raises ValueError, too. Flax passes is_causal=False by
    default, so False is ignored: set is_causal on `attend`.
    """

    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        is_causal: bool = False,
        module: object = None,
        **_: object,  # dropout_rng, broadcast_dropout, dtype and precision have no effect
    ) -> jax.Array:
        for name, value_given in (("mask", mask), ("bias", bias), ("module", module)):
            if value_given is not None:
                raise _unsupported(name)
        if dropout_rate > 0 and not deterministic:
            raise ValueError(f"dropout_rate: attention dropout is not supported, got {dropout_rate}; use 0")
        return attend(query, key, value, **({"is_causal": True} if is_causal else {}))

    return attention_fn
