"""The public functions: arguments checked here, before anything is traced."""

import operator
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ringrl.attention.kernels.xla import Options
from ringrl.attention.local import local_attention
from ringrl.attention.mask import Rule, Side

IMPLEMENTATIONS = ("xla",)
WIDEST = 2**31 - 1  # window: positions are int32


@overload
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_residual: Literal[False] = ..., **options: object
) -> jax.Array: ...
@overload
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_residual: Literal[True], **options: object
) -> tuple[jax.Array, jax.Array]: ...


def attention(  # type: ignore[misc]
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    *,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Int[Array, "*batch tokens"] | None = None,
    positions: Int[Array, "*batch tokens"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Float[Array, "batch tokens heads head_dim"] | tuple[jax.Array, Float32[Array, "batch tokens heads"]]:
    """softmax(scale * q k^T) v over the keys that each query may see, in O(S) memory.

    Output and log-sum-exp carry the checkpoint name "ring_attention": with a remat policy that saves it, as
    jax.checkpoint_policies.save_only_these_names("ring_attention"), attention is never computed twice.

    Args:
      q: queries (B, S, H, D); float32, bfloat16 or float16.
      k, v: keys and values (B, S, Hkv, D) of q's dtype; Hkv divides H (grouped-query attention).
      is_causal: a query sees keys at its own and earlier positions only.
      local_window_size: a query at position p sees keys in [p - left, p + right]; an int means both sides.
      segment_ids: (B, S) or (S,) integers >= 0; a query sees keys of its own segment only.
      positions: (B, S) or (S,) integers; by default 0 ... S-1. Used by the mask alone (rotary is the caller's).
      scale: factor on the logits, 1/sqrt(D) by default.
      logits_soft_cap: logits become cap * tanh(logits / cap).
      implementation: None picks the best for the platform; "xla" is tiled attention in plain XLA.
      return_residual: also return the log-sum-exp (B, S, H) float32, differentiable.

    Returns:
      (B, S, H, D) in q's dtype; a query that sees no key gives 0 (log-sum-exp -inf) with finite gradients.

    Raises:
      ValueError: an argument that does not fit, by its name.
    """
    _check_arrays(q, k, v)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation: {implementation!r} is unknown; use None or one of {IMPLEMENTATIONS}")
    batch, tokens, _, head_dim = q.shape
    side = Side(
        _integers("positions", positions, batch, tokens, jnp.arange(tokens, dtype=jnp.int32)),
        _integers("segment_ids", segment_ids, batch, tokens, jnp.zeros(tokens, jnp.int32)),
    )
    rule = Rule(is_causal, _window(local_window_size))
    options = Options(rule, head_dim**-0.5 if scale is None else float(scale), _soft_cap(logits_soft_cap))
    o, lse = local_attention(q, k, v, side, side, options)
    return (o, lse) if return_residual else o


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes (batch, tokens, heads, head_dim), got shape {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty axis, got shape {x.shape}")
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected k's shape {k.shape}, got {v.shape}")
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(f"k: expected batch, tokens and head_dim of q {q.shape}, got {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k: its {k.shape[2]} heads do not divide the {q.shape[2]} heads of q")


def _integers(name: str, x: jax.Array | None, batch: int, tokens: int, default: jax.Array) -> jax.Array:
    x = default if x is None else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, got {x.dtype}")
    if x.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(f"{name}: expected shape ({tokens},) or ({batch}, {tokens}), got {x.shape}")
    return jnp.broadcast_to(x.astype(jnp.int32), (batch, tokens))


def _window(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        left, right = (operator.index(n) for n in (size if isinstance(size, tuple | list) else (size, size)))
    except (TypeError, ValueError):
        raise ValueError(f"local_window_size: expected one or two whole numbers, got {size!r}") from None
    if left < 0 or right < 0:
        raise ValueError(f"local_window_size: expected sizes >= 0, got {size}")
    return min(left, WIDEST), min(right, WIDEST)


def _soft_cap(cap: float | None) -> float | None:
    if cap is not None and not cap > 0:
        raise ValueError(f"logits_soft_cap: expected a number > 0, got {cap}")
    return None if cap is None else float(cap)
