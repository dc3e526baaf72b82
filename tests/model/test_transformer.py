from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringrl.config import ModelConfig
from ringrl.model.transformer import Attention, EpisodeWindow, Place, Transformer, TransformerBlock, rotate

CONFIG = ModelConfig(layers=2, width=16, heads=4, kv_heads=2)


@pytest.mark.parametrize("base", [10_000.0, 25e6])
def test_rotary_angles(base):
    """RoFormer, equation 34, for the pairs (i, i + D/2)."""
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 6)).astype(np.float32)
    positions = np.array([0, 1, 50])
    found = np.asarray(rotate(x, positions, base))
    for t, position in enumerate(positions):
        for i in range(3):
            angle = position * base ** (-2 * i / 6)
            turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            pair = (0, t, 0, [i, i + 3])
            np.testing.assert_allclose(found[pair], turned @ x[pair], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[:, 0], x[:, 0])


def test_rotary_angles_hold_at_millions_of_tokens():
    positions = np.array([1023, 1024, 511_999, 512_000, 4_000_001])
    x = np.zeros((1, 5, 1, 64), np.float32)
    x[..., :32] = 1
    found = np.asarray(rotate(x, positions))[0, :, 0]
    angle = positions[:, None] * 10_000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(found[:4], np.concatenate([np.cos(angle), np.sin(angle)], 1)[:4], atol=5e-4)
    np.testing.assert_allclose(found[4], np.concatenate([np.cos(angle), np.sin(angle)], 1)[4], atol=5e-3)


def test_rotary_products_depend_on_the_distance_alone():
    random = np.random.default_rng(0)
    q, k = (random.normal(size=(1, 1, 1, 16)).astype(np.float32) for _ in range(2))

    def product(query: int, key: int) -> float:
        return float((rotate(q, np.array([query])) * rotate(k, np.array([key]))).sum())

    for distance in (0, 1, 7):
        found = [product(start + distance, start) for start in (0, 1, 13, 400)]
        np.testing.assert_allclose(found, found[0], rtol=1e-3, atol=1e-4)
    assert abs(product(7, 0) - product(0, 0)) > 0.1


def test_rotary_keeps_the_dtype():
    assert rotate(jnp.ones((1, 2, 1, 4), jnp.bfloat16), jnp.arange(2)).dtype == jnp.bfloat16


def test_a_larger_rotary_base_finds_distant_keys():
    """Attention scores of a matching key at up to 512,000 tokens of distance."""
    same = np.zeros((1, 1, 1, 64), np.float32)
    same[..., [15, 31, 47, 63]] = 1  # the slower pairs
    positions = np.arange(512_000, 0, -1000)

    def least(base: float) -> float:
        keys = rotate(np.repeat(same, len(positions), 1), positions, base)
        return float((rotate(same, np.array([512_000]), base) * keys).sum(-1).min()) / 4

    assert least(10_000.0) < 0
    assert least(1e12) > 0.4
    settings = CONFIG.model_copy(update={"layers": 1}), CONFIG.model_copy(update={"layers": 1, "rotary_base": 1e6})
    x = np.random.default_rng(0).normal(size=(1, 5, 16)).astype(np.float32)
    one, other = (np.asarray(Transformer(config, nnx.Rngs(params=0))(x)) for config in settings)
    assert np.abs(one - other)[0, 1:].max() > 1e-4, "the configuration's base is not used"


def test_order_of_tokens_matters():
    """Without positions, swapping two earlier tokens would not change the last output of a one-layer model."""
    made = Transformer(CONFIG.model_copy(update={"layers": 1}), nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(1, 5, 16)).astype(np.float32)
    run = jax.jit(made.__call__)
    assert np.abs(run(x)[:, -1] - run(x[:, [1, 0, 2, 3, 4]])[:, -1]).max() > 1e-3


def test_transformer_is_causal():
    made = Transformer(CONFIG, nnx.Rngs(params=0))
    run = jax.jit(made.__call__)
    x = np.random.default_rng(0).normal(size=(1, 9, 16)).astype(np.float32)
    before = np.asarray(run(x))
    for t in range(9):
        changed = x.copy()
        changed[:, t] += 1
        after = np.asarray(run(changed))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (np.abs(before[:, t:] - after[:, t:]).max(-1) > 1e-6).all(), "later tokens change"


def test_attention_layer_by_hand():
    """Query head h uses key and value head h // 2."""
    layer = Attention(CONFIG, nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(1, 5, 16)).astype(np.float32)
    query, key_value, out = (np.asarray(part.kernel[...]) for part in (layer.query, layer.key_value, layer.out))
    q, (k, v) = np.einsum("tw,whd->thd", x[0], query), np.einsum("tw,wihd->ithd", x[0], key_value)
    q, k = (np.asarray(rotate(y[None], np.arange(5)))[0] for y in (q, k))
    rows = np.zeros((5, 4, 4))
    for t, h in np.ndindex(5, 4):
        weights = np.exp(k[: t + 1, h // 2] @ q[t, h] / 2)
        rows[t, h] = weights @ v[: t + 1, h // 2] / weights.sum()
    place = Place(jnp.arange(5), jnp.zeros(5, int))
    found = layer(x, place, EpisodeWindow(None, 4))[0][0]
    np.testing.assert_allclose(found, rows.reshape(5, 16) @ out.reshape(16, 16), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_features_are_float32_for_every_dtype(dtype):
    made = Transformer(CONFIG.model_copy(update={"dtype": dtype}), nnx.Rngs(params=0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(made, nnx.Param))} == {jnp.dtype(jnp.float32)}
    x, place = jnp.ones((1, 3, 16), dtype), Place(jnp.arange(3), jnp.zeros(3, int))
    block = TransformerBlock(CONFIG.model_copy(update={"dtype": dtype}), nnx.Rngs(params=0))
    assert jax.eval_shape(made.__call__, x).dtype == jnp.float32
    assert jax.eval_shape(partial(block.__call__, window=EpisodeWindow(None, 4)), x, place)[0].dtype == jnp.dtype(dtype)
