"""Attention of a few new tokens to a key-value cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ringrl.attention.mask import Rule, Side, visible


def decode_attention(
    q: Float[Array, "batch new_tokens heads head_dim"],
    k_cache: Float[Array, "batch capacity kv_heads head_dim"],
    v_cache: Float[Array, "batch capacity kv_heads head_dim"],
    *,
    length: Int[Array, ""] | int,
    scale: float | None = None,
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """Causal attention of the newest tokens, whose keys and values are already in the cache.

    Args:
      q: queries (B, N, H, D) of tokens length - N ... length - 1.
      k_cache, v_cache: (B, C, Hkv, D), filled up to `length`; what lies beyond is never seen.
      length: tokens in the cache, the new ones included.
      scale: factor on the logits, 1/sqrt(D) by default.

    Returns:
      (B, N, H, D) in q's dtype.

    Raises:
      ValueError: shapes or heads that do not fit, or a `length` (where it is a plain number) outside N ... C.
    """
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"v_cache: expected k_cache's shape {k_cache.shape}, got {v_cache.shape}")
    batch, new, heads, head_dim = q.shape
    if (batch, head_dim) != (k_cache.shape[0], k_cache.shape[3]):
        raise ValueError(f"k_cache: expected batch and head_dim of q {q.shape}, got {k_cache.shape}")
    capacity, kv_heads = k_cache.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"k_cache: its {kv_heads} heads do not divide the {heads} heads of q")
    if new > capacity:
        raise ValueError(f"q: {new} new tokens do not fit a cache of {capacity}")
    if isinstance(length, int) and not new <= length <= capacity:
        raise ValueError(f"length: expected {new} ... {capacity} tokens in the cache, got {length}")
    scale = head_dim**-0.5 if scale is None else scale
    q = q.reshape(batch, new, kv_heads, heads // kv_heads, head_dim)
    s = jnp.einsum("bqhgd,bkhd->bhgqk", q, k_cache, preferred_element_type=jnp.float32) * scale
    segment = jnp.zeros((1, 1), jnp.int32)
    queries = Side((length - new + jnp.arange(new, dtype=jnp.int32))[None], segment)
    keys = Side(jnp.arange(capacity, dtype=jnp.int32)[None], segment)
    p = jax.nn.softmax(jnp.where(visible(Rule(is_causal=True), queries, keys)[:, None, None], s, -jnp.inf), axis=-1)
    o = jnp.einsum("bhgqk,bkhd->bqhgd", p.astype(v_cache.dtype), v_cache, preferred_element_type=jnp.float32)
    return o.reshape(batch, new, heads, head_dim).astype(q.dtype)
