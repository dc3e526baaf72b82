"""Attention for a sequence on one device."""

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ringrl.attention import arguments, kernels
from ringrl.attention.attend import LOCAL, attend
from ringrl.attention.device import device_of
from ringrl.attention.mask import Side


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
    """Compute softmax(scale * q k^T) v over the visible keys of each query, in O(S) memory.

    Output and log-sum-exp carry the checkpoint name "ring_attention". A remat policy such as
    jax.checkpoint_policies.save_only_these_names("ring_attention") avoids computing attention twice.

    Args:
      q: queries (B, S, H, D); float32, bfloat16 or float16. All values must be finite, also under the mask.
        Gradients lose precision for logits above 1e4, where the log-sum-exp is accurate to 1e-3 only.
      k, v: keys and values (B, S, Hkv, D) in q's dtype; Hkv divides H (grouped-query attention).
      is_causal: a query sees keys at its own and earlier positions only.
      local_window_size: a query at position p sees keys in [p - left, p + right]; an int means both sides.
      segment_ids: (B, S) or (S,) integers >= 0; a query sees keys of its own segment only.
      positions: (B, S) or (S,) integers, less than 2**31 apart; by default 0 ... S-1. Only the mask uses them;
        rotary embeddings are up to the caller.
      scale: factor on the logits, 1/sqrt(D) by default.
      logits_soft_cap: logits become cap * tanh(logits / cap).
      implementation: the kernel. None selects "mosaic_tpu" on TPUs, "mosaic_gpu" on Hopper GPUs (bfloat16 or float16,
        head_dim 64 or 128) and "xla" (tiled attention in plain XLA) elsewhere. A fallback on an accelerator is logged.
        A kernel selected by name raises ValueError for unsupported inputs.
      return_residual: also return the log-sum-exp (B, S, H) float32, differentiable.

    Returns:
      (B, S, H, D) in q's dtype. A query without visible keys gives 0 (log-sum-exp -inf) with finite gradients.

    Raises:
      ValueError: an invalid argument, named in the message.
    """
    arguments.check_arrays(q, k, v)
    arguments.check_not_sharded("q", q)
    arguments.check_implementation(implementation)
    batch, tokens, _, head_dim = q.shape
    side = Side(
        arguments.integers("positions", positions, batch, tokens, jnp.arange(tokens, dtype=jnp.int32)),
        arguments.integers("segment_ids", segment_ids, batch, tokens, jnp.zeros(tokens, jnp.int32)),
    )
    options = arguments.options(
        head_dim,
        is_causal=is_causal,
        local_window_size=local_window_size,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )
    options = kernels.with_kernel(options, implementation, q, device_of(q))
    o, lse = attend(q, k, v, side, side, options, LOCAL)
    return (o, lse) if return_residual else o
