"""Operations counted by hand, and beside what XLA counts."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ringrl.config import ModelConfig
from ringrl.model.transformer import Transformer
from ringrl.training.throughput import forward_flops, peak_flops, step_flops, step_memory

CONFIG = ModelConfig(layers=3, width=64, heads=4, kv_heads=4)


def test_the_formula_of_the_paper():
    tokens, width = 512, 64
    assert forward_flops(CONFIG, tokens) == 3 * (24 * tokens * width**2 + 2 * tokens**2 * width)
    assert step_flops(CONFIG, tokens, contexts=5) == 15 * forward_flops(CONFIG, tokens)


def test_fewer_key_heads_and_another_feed_forward_width():
    config = CONFIG.model_copy(update={"kv_heads": 1, "feed_forward": 2})
    assert forward_flops(config, 10) == 3 * 10 * (2 * 64 * (64 + 2 * 16 + 64) + 2 * 2 * 64 * 128 + 2 * 10 * 64)


def test_what_sees_no_context_has_no_count():
    assert step_flops(CONFIG.model_copy(update={"kind": "behaviour_cloning"}), 512, 1) is None


def test_xla_counts_the_same_matrices():
    """One layer of vanilla attention, which computes hidden logits too: twice our attention term."""
    config = CONFIG.model_copy(update={"layers": 1, "attention": "vanilla"})
    model = Transformer(config, nnx.Rngs(params=0))
    tokens = 256
    cost = jax.jit(model.__call__).lower(jnp.zeros((1, tokens, 64))).compile().cost_analysis()
    expected = forward_flops(config, tokens) + 2 * tokens**2 * 64
    assert cost["flops"] == pytest.approx(expected, rel=0.2), "norms, softmax and rotations are the rest"


def test_a_processor_has_no_data_sheet():
    assert jax.devices()[0].platform != "cpu" or peak_flops(1) is None


def test_the_memory_of_a_step_is_what_it_holds_and_nothing_is_traced_again() -> None:
    traced = []

    @jax.jit
    def step(x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        return (x @ x).T @ x

    x = jnp.ones((256, 256))
    step(x)
    found = step_memory(step, x)
    assert found is not None
    assert x.nbytes < found <= 5 * x.nbytes, "what is given, and something besides"
    assert len(traced) == 1
