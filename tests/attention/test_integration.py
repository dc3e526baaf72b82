"""Attention inside flax.nnx.MultiHeadAttention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringrl.attention import as_attention_fn, attention


def layer(attention_fn=None, **options) -> nnx.MultiHeadAttention:
    chosen = {} if attention_fn is None else {"attention_fn": attention_fn}
    return nnx.MultiHeadAttention(
        num_heads=2, in_features=8, qkv_features=16, decode=False, rngs=nnx.Rngs(0), **chosen, **options
    )


def test_equals_flax_with_a_causal_mask():
    x = jax.random.normal(jax.random.key(1), (2, 12, 8))
    mask = nnx.make_causal_mask(jnp.ones((2, 12)))
    ours = layer(as_attention_fn(partial(attention, is_causal=True)))
    flax = layer()
    np.testing.assert_allclose(ours(x), flax(x, mask=mask), rtol=1e-5, atol=1e-5)
    gradient_of = nnx.grad(lambda module, mask: jnp.square(module(x, mask=mask)).sum())
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient_of(ours, None), gradient_of(flax, mask)
    )


def test_mask_and_dropout_raise():
    x = jnp.ones((1, 4, 8))
    attention_fn = as_attention_fn(attention)
    with pytest.raises(ValueError, match=r"^mask: "):
        layer(attention_fn)(x, mask=nnx.make_causal_mask(jnp.ones((1, 4))))
    with pytest.raises(ValueError, match=r"^dropout_rate: "):
        layer(attention_fn, dropout_rate=0.5, deterministic=False)(x, rngs=nnx.Rngs(0))
