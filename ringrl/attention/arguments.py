"""Checks of user arguments. Each ValueError names the argument, the value and the expectation."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, Self, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float32, Int32

from ringrl.attention.contract import Terms
from ringrl.attention.mask import PADDING_KEY, PADDING_QUERY, Options, Rule, Side

WIDEST = 2**31 - 1  # largest window, since positions are int32

Axes = str | Sequence[str] | None


class AttentionFunction(Protocol):
    """Type of the public functions: with `return_residual=True` they also return the log-sum-exp."""

    @overload
    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, return_residual: Literal[True], **options: Any
    ) -> tuple[jax.Array, jax.Array]: ...
    @overload
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array: ...


def typed(function: Callable[..., Any]) -> AttentionFunction:
    """Return the function, with the type of its result depending on `return_residual`."""
    return cast(AttentionFunction, function)


def check_arrays(
    q: jax.Array, k: jax.Array, v: jax.Array, names: tuple[str, str] = ("k", "v"), *, of_cache: bool = False
) -> None:
    """Check shapes and dtypes of queries, keys and values. A cache may have another dtype than the queries."""
    key_name, value_name = names
    for name, x in (("q", q), (key_name, k), (value_name, v)):
        if not hasattr(x, "ndim"):
            raise ValueError(f"{name}: expected an array, got {type(x).__name__}")
        if x.ndim != 4:
            shapes = f"q {jnp.shape(q)}, {key_name} {jnp.shape(k)}, {value_name} {jnp.shape(v)}"
            raise ValueError(f"{name}: expected axes (batch, tokens, heads, head_dim) of all arrays, got {shapes}")
        if 0 in x.shape[2:]:
            raise ValueError(f"{name}: expected at least one head and one feature, got shape {x.shape}")
        check_dtype(name, x)
        if x.dtype != q.dtype and not of_cache:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{value_name}: expected batch, tokens and heads of {key_name} {k.shape}, got {v.shape}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{key_name}: expected batch and head_dim of q {q.shape}, got {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{key_name}: {k.shape[2]} heads do not divide the {q.shape[2]} heads of q")


def check_flag(name: str, flag: object) -> None:
    """Check that a value is True or False, not an array or another value with a truth."""
    if not isinstance(flag, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {flag!r}")


def check_dtype(name: str, x: jax.Array) -> None:
    """Check that attention supports the dtype."""
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")


def per_head(name: str, x: jax.Array | None, heads: int) -> Float32[Array, " heads"] | None:
    """Return an optional array (H,) of real numbers."""
    if x is None:
        return None
    x = _converted(name, x, jnp.asarray)
    if x.shape != (heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected {heads} real numbers, one for each head of q, got {x.dtype} {x.shape}")
    return x.astype(jnp.float32)


def _converted(name: str, x: Any, convert: Callable[[Any], Any] = np.asarray) -> Any:
    """Return numbers as an array. Arrays of JAX stay as they are. ValueError for anything else."""
    if isinstance(x, jax.Array):
        return x
    try:
        return jnp.asarray(x) if hasattr(x, "__jax_array__") else convert(x)  # a parameter of Flax may be traced
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected numbers, got {x!r}") from None


def pad_to_same_width(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """Return queries, keys and values of the same last axis, the narrower ones padded with zeros."""
    width = max(q.shape[-1], v.shape[-1])
    if width == min(q.shape[-1], v.shape[-1]):
        return q, k, v
    return tuple(jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),)) for x in (q, k, v))


def axis_names(axes: Axes) -> tuple[str, ...]:
    """Return the names of no, one or several mesh axes."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def mesh_size(mesh: Mesh | AbstractMesh, name: str, axes: Axes) -> int:
    """Return the number of devices along one or several mesh axes."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    if not isinstance(axes, str | tuple | list | None):
        raise ValueError(f"{name}: expected the name of a mesh axis, a tuple of names or None, got {axes!r}")
    for axis in axis_names(axes):
        if axis not in mesh.axis_names:
            raise ValueError(f"{name}: the mesh has no axis {axis!r}; it has {tuple(mesh.axis_names)}")
    return math.prod(mesh.shape[axis] for axis in axis_names(axes))


def check_axes(
    mesh: Mesh | AbstractMesh, axis_name: Axes, batch_axes: Axes, head_axes: Axes, batch: int, kv_heads: int
) -> None:
    """Check that the axes are different, and that contexts and key heads divide over them."""
    used = [*axis_names(axis_name)]
    if not used or len(set(used)) < len(used):
        raise ValueError(f"axis_name: expected one or several different mesh axes, got {axis_name!r}")
    for name, axes, amount, kind in (
        ("batch_axes", batch_axes, batch, "contexts of the batch"),
        ("head_axes", head_axes, kv_heads, "key heads"),
    ):
        if amount % (devices := mesh_size(mesh, name, axes)):
            raise ValueError(f"{name}: {amount} {kind} do not divide evenly over the {devices} devices of {axes!r}")
        if both := [axis for axis in axis_names(axes) if axis in used]:
            raise ValueError(f"{name}: the mesh axis {both[0]!r} has another use; give every axis one use")
        used += axis_names(axes)


def integers(name: str, x: jax.Array, batch: int, tokens: int) -> Int32[Array, "b s"]:
    """Return positions or segment ids as (B, S) int32."""
    given = _converted(name, x)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, got {given.dtype}")
    if _is_known(given) and not np.can_cast(given.dtype, np.int32):
        known = np.asarray(given)
        if known.size and (known.min() < -(2**31) or known.max() >= 2**31):
            raise ValueError(f"{name}: expected 32-bit integers, got {known.min()} ... {known.max()}")
    x = jnp.asarray(given)
    if x.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(f"{name}: expected shape ({tokens},) or ({batch}, {tokens}), got {x.shape}")
    return jnp.broadcast_to(x.astype(jnp.int32), (batch, tokens))


class Keywords(NamedTuple):
    """The keywords of `attention` that its variants for several devices share."""

    positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    key_segment_ids: jax.Array | None = None
    global_prefix: jax.Array | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None
    is_causal: bool = True
    local_window_size: int | tuple[int, int] | None = None
    scale: float | jax.Array | None = None
    logits_soft_cap: float | jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    implementation: str | None = None

    def checked(self, batch: int, queries: int, keys: int, devices: int = 1) -> Self:
        """Return them, with integers as int32 (B, S), (B, T) or (B,). ValueError for a wrong shape, dtype or number.

        S and T are the tokens on one of `devices`. Lengths count the tokens of all.
        """
        if self.key_segment_ids is not None and self.segment_ids is None:
            raise ValueError("segment_ids: missing; key_segment_ids needs the segments of the queries, too")
        if self.segment_ids is not None and self.key_segment_ids is None and queries != keys:
            raise ValueError(f"key_segment_ids: missing; the {keys} keys are not the {queries} queries")
        found = self._checked_settings()
        for name in INTEGERS:
            x = getattr(self, name)
            tokens = keys if name.startswith("key") else queries
            if x is not None and name.endswith("lengths"):
                check_counts(name, x, batch, 0, tokens * devices)
                found[name] = jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch,))
            else:
                found[name] = None if x is None else integers(name, x, batch, tokens)
                is_array = isinstance(x, jax.Array)  # not read, which would wait for the device
                if name.endswith("segment_ids") and not is_array and np.isin(x, (PADDING_QUERY, PADDING_KEY)).any():
                    raise ValueError(f"{name}: {PADDING_QUERY} and {PADDING_KEY} are reserved; use other ids")
        return self._replace(**found)

    def sides(self, batch: int, queries: Int32[Array, " q"], keys: Int32[Array, " k"], ahead: int) -> tuple[Side, Side]:
        """Return the integers of both sides, from the index of each token in its sequence.

        `ahead` is T - S of the whole sequence: by default, the queries have the last positions.
        """
        positions = _or_default(self.positions, queries + ahead, batch)
        given = self.positions if self.key_positions is None and ahead == 0 else self.key_positions
        key_positions = _or_default(given, keys, batch)
        segments = _or_default(self.segment_ids, jnp.zeros_like(queries), batch)
        given = self.segment_ids if self.key_segment_ids is None else self.key_segment_ids
        key_segments = _or_default(given, jnp.zeros_like(keys), batch)
        if self.query_seq_lengths is not None:
            segments = jnp.where(queries < self.query_seq_lengths[:, None], segments, PADDING_QUERY)
        if self.key_value_seq_lengths is not None:
            key_segments = jnp.where(keys < self.key_value_seq_lengths[:, None], key_segments, PADDING_KEY)
        return Side(positions, segments, self.global_prefix), Side(key_positions, key_segments)

    def settings(self, q: jax.Array) -> tuple[jax.Array, Options, Terms]:
        """Return the queries, the static options of a call, and its arrays that only the kernel "autodiff" computes.

        A scale that is an array multiplies the queries, so that it has a gradient.
        """
        is_causal, window, scale, cap = self._checked_settings().values()
        slopes = per_head("alibi_slopes", self.alibi_slopes, q.shape[2])
        terms = Terms(slopes, cap if isinstance(cap, jax.Array) else None)
        if isinstance(scale, jax.Array):
            q, scale = (q.astype(jnp.float32) * scale.astype(jnp.float32)).astype(q.dtype), 1.0
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return q, Options(Rule(is_causal, window), scale, None if isinstance(cap, jax.Array) else cap), terms

    def _checked_settings(self) -> dict[str, Any]:
        """Return the keywords that are no arrays of tokens or heads: is_causal, window, scale and cap."""
        check_flag("is_causal", self.is_causal)
        scale, cap = _number("scale", self.scale), _number("logits_soft_cap", self.logits_soft_cap)
        if isinstance(scale, float) and not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        if cap is not None and _is_known(cap) and not 0 < np.asarray(cap) < math.inf:
            raise ValueError(f"logits_soft_cap: expected a finite number > 0, got {cap}")
        if self.global_prefix is not None and self.local_window_size is None:
            raise ValueError("global_prefix: has no effect without a window; give local_window_size, too")
        window = _window(self.local_window_size, 0 if self.global_prefix is None else -1)
        return {"is_causal": bool(self.is_causal), "local_window_size": window, "scale": scale, "logits_soft_cap": cap}


INTEGERS = Keywords._fields[:7]  # the mask depends on them


def _or_default(x: jax.Array | None, default: jax.Array, batch: int) -> jax.Array:
    return jnp.broadcast_to(default, (batch, len(default))) if x is None else x


def check_counts(name: str, counts: Any, batch: int | None, least: int, most: int, advice: str = "") -> None:
    """Check a number of tokens, or one for each context of a batch."""
    counts = _converted(name, counts)
    shapes = ((),) if batch is None else ((), (batch,))
    if counts.shape not in shapes or not jnp.issubdtype(counts.dtype, jnp.integer):
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected integers of shape {expected}, got {counts.dtype} {counts.shape}")
    if counts.size and _is_known(counts):
        known = np.asarray(counts)
        if not least <= known.min() <= known.max() <= most:
            raise ValueError(f"{name}: expected {least} ... {most} tokens, got {known}{advice}")


def _number(name: str, x: Any) -> float | jax.Array | None:
    """Return a number as float, or as an array of JAX if it is one."""
    if x is None:
        return None
    x = _converted(name, x)
    if x.shape or not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"{name}: expected one number, got {x.dtype} {x.shape}")
    return x if isinstance(x, jax.Array) else float(x)


def _is_known(x: Any) -> bool:
    """Return whether the values can be checked: the array is not traced, and no part of it is on another host."""
    return not isinstance(x, jax.core.Tracer) and (not isinstance(x, jax.Array) or x.is_fully_addressable)


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
