"""Checks of user arguments before tracing. Each ValueError names the argument, the value and the expectation."""

import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int32

from ringrl.attention.mask import Options, Rule, Side

WIDEST = 2**31 - 1  # largest window, since positions are int32

Axes = str | Sequence[str] | None


def check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Check shapes and dtypes of queries, keys and values."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes (batch, tokens, heads, head_dim), got shape {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty axis, got shape {x.shape}")
        check_dtype(name, x)
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected k's shape {k.shape}, got {v.shape}")
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(f"k: expected batch, tokens and head_dim of q {q.shape}, got {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k: {k.shape[2]} heads do not divide the {q.shape[2]} heads of q")


def check_dtype(name: str, x: jax.Array) -> None:
    """Check that attention supports the dtype."""
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")


def check_not_sharded(name: str, x: jax.Array) -> None:
    """Check that an array is not sharded over explicit mesh axes, which loops over tiles cannot preserve."""
    spec = jax.typeof(x).sharding.spec
    if any(axis is not None for axis in spec):
        raise ValueError(f"{name}: sharded as {spec} over explicit mesh axes; use ring_attention, or jax.shard_map")


def axis_names(axes: Axes) -> tuple[str, ...]:
    """Return the names of no, one or several mesh axes."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def mesh_size(mesh: Mesh | AbstractMesh, name: str, axes: Axes) -> int:
    """Return the number of devices along one or several mesh axes."""
    for axis in axis_names(axes):
        if axis not in mesh.axis_names:
            raise ValueError(f"{name}: the mesh has no axis {axis!r}; it has {tuple(mesh.axis_names)}")
    return math.prod(mesh.shape[axis] for axis in axis_names(axes))


def integers(name: str, x: jax.Array | None, batch: int, tokens: int, default: jax.Array) -> Int32[Array, "b s"]:
    """Return positions or segment ids as (B, S) int32."""
    if x is not None:
        _check_range(name, x if isinstance(x, jax.Array) else np.asarray(x))
    x = default if x is None else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, got {x.dtype}")
    if x.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(f"{name}: expected shape ({tokens},) or ({batch}, {tokens}), got {x.shape}")
    return jnp.broadcast_to(x.astype(jnp.int32), (batch, tokens))


def query_side(
    batch: int,
    default_positions: Int32[Array, " tokens"],
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    global_prefix: jax.Array | None,
) -> Side:
    """Return the integers of the queries. The keys have the same integers, without the prefix."""
    tokens = len(default_positions)
    zeros = jnp.zeros(tokens, jnp.int32)
    return Side(
        integers("positions", positions, batch, tokens, default_positions),
        integers("segment_ids", segment_ids, batch, tokens, zeros),
        None if global_prefix is None else integers("global_prefix", global_prefix, batch, tokens, zeros),
    )


def _check_range(name: str, x: Array) -> None:
    """Check that integers fit in 32 bits. Traced arrays and arrays on other hosts cannot be checked."""
    unknown = isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable)
    if unknown or np.can_cast(x.dtype, np.int32):
        return
    known = np.asarray(x)
    if np.issubdtype(known.dtype, np.integer) and known.size and (known.min() < -(2**31) or known.max() >= 2**31):
        raise ValueError(f"{name}: expected 32-bit integers, got {known.min()} ... {known.max()}")


def options(
    q: jax.Array,
    window: int | tuple[int, int] | None,
    prefix: jax.Array | None,
    scale: float | None,
    cap: float | None,
    *,
    is_causal: bool,
) -> Options:
    """Return the static options of a call from its arguments. `prefix` is only compared with None."""
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"logits_soft_cap: expected a finite number > 0, got {cap}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if prefix is not None and window is None:
        raise ValueError("global_prefix: has no effect without a window; give local_window_size, too")
    rule = Rule(is_causal, _window(window, 0 if prefix is None else -1))
    return Options(rule, scale, None if cap is None else float(cap))


def _window(size: int | tuple[int, int] | None, least: int) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        left, right = (operator.index(n) for n in (size if isinstance(size, tuple | list) else (size, size)))
    except (TypeError, ValueError):
        raise ValueError(f"local_window_size: expected one or two whole numbers, got {size!r}") from None
    if left < least or right < 0:
        raise ValueError(f"local_window_size: expected left >= {least} and right >= 0, got {size}")
    return min(left, WIDEST), min(right, WIDEST)
