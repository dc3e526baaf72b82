"""Attention as the `attention_fn` of Flax's layers. Imports no Flax."""

from collections.abc import Callable

import jax

from ringrl.attention.api import unsupported_error


def as_attention_fn(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wrap `attend` as the `attention_fn` of Flax: nnx.MultiHeadAttention, and linen.MultiHeadDotProductAttention.

        attend = functools.partial(ring_attention, mesh=mesh, is_causal=True)
        nnx.MultiHeadAttention(..., attention_fn=as_attention_fn(attend))

    The options of `attend` (is_causal, segment_ids, ...) define the mask. Any mask array, a bias or dropout raises
    ValueError; so does decode=True of a layer, which makes a mask. Flax passes is_causal=False by default, so False is
    ignored: set is_causal on `attend`.
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
                raise unsupported_error(name)
        if dropout_rate > 0 and not deterministic:
            raise ValueError(f"dropout_rate: attention dropout is not supported, got {dropout_rate}; use 0")
        return attend(query, key, value, **({"is_causal": True} if is_causal else {}))

    return attention_fn
