"""The definition of attention with O(S^2) memory, for tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ringrl.attention.contract import precision_of
from ringrl.attention.mask import Rule, Side, visible


def reference_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    queries: Side,
    keys: Side,
    *,
    rule: Rule,
    scale: float,
    logits_soft_cap: float | jax.Array | None = None,
    sinks: Float[Array, " heads"] | None = None,
    alibi_slopes: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
    """Return output and log-sum-exp in the dtype of the inputs. JAX differentiates the function."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision_of(q)) * scale
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    if alibi_slopes is not None:
        distance = jnp.abs(queries.positions[:, :, None] - keys.positions[:, None, :])
        s = s - alibi_slopes[:, None, None] * distance[:, None]
    mask = visible(rule, queries, keys)[:, None]
    if sinks is not None:  # one more key that every query sees, with the value 0
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (*s.shape[:3], 1))], axis=-1)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)
        v = jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
    sees_some = mask.any(-1, keepdims=True)
    s = jnp.where(mask, s, jnp.where(sees_some, -jnp.inf, 0.0))  # keep the softmax of empty rows finite
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.where(mask, jnp.exp(s - lse[..., None]), 0.0)
    lse = jnp.where(sees_some[..., 0], lse, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", p, v, precision=precision_of(v)), jnp.swapaxes(lse, 1, 2)
