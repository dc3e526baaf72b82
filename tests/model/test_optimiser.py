import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ringrl.config import ModelConfig, OptimiserConfig
from ringrl.model import make_policy
from ringrl.model.optimiser import learning_rate, make_optimiser


def test_warm_up_and_cosine():
    schedule = learning_rate(OptimiserConfig(steps=110, warmup_steps=10, learning_rate=0.5, final_learning_rate=0.2))
    steps = np.arange(111)
    cosine = 0.1 + 0.4 * (1 + np.cos(np.pi * (steps - 10) / 100)) / 2
    expected = np.where(steps < 10, 0.05 * steps, cosine)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=1e-5, atol=1e-7)


def test_the_default_is_cosine_bit_for_bit():
    config = OptimiserConfig(steps=300, learning_rate=3e-3, final_learning_rate=0.1)
    steps = np.arange(301)
    expected = jax.vmap(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, 300, 3e-3 * 0.1))(steps)
    np.testing.assert_array_equal(jax.vmap(learning_rate(config))(steps), expected)


@pytest.mark.parametrize(
    ("schedule", "corners"),  # between which the learning rate is linear
    [
        ("constant", {0: 0.0, 10: 0.5, 110: 0.5}),
        ("linear", {0: 0.0, 10: 0.5, 110: 0.1}),
        ("wsd", {0: 0.0, 10: 0.5, 88: 0.5, 110: 0.1}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_are_linear_between_their_corners(schedule, corners, warmup):
    final = {} if schedule == "constant" else {"final_learning_rate": 0.2}
    config = OptimiserConfig(steps=110, warmup_steps=warmup, learning_rate=0.5, schedule=schedule, **final)
    if not warmup:
        corners = {0: 0.5} | {step: rate for step, rate in corners.items() if step > 10}
    expected = np.interp(np.arange(111), list(corners), list(corners.values()))
    found = jax.vmap(learning_rate(config))(np.arange(111))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_decay_of_wsd_waits_for_the_end_of_a_long_warm_up():
    schedule = learning_rate(OptimiserConfig(steps=100, warmup_steps=90, learning_rate=1.0, schedule="wsd"))
    np.testing.assert_allclose([schedule(80), schedule(90), schedule(95)], [80 / 90, 1, 0.5], rtol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "constant", "linear", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 50), (2, 50), (1, 0), (50, 50)])
def test_short_runs_have_a_schedule(steps, warmup, kind):
    schedule = learning_rate(OptimiserConfig(steps=steps, warmup_steps=warmup, learning_rate=1.0, schedule=kind))
    found = jax.vmap(schedule)(np.arange(steps))
    assert np.isfinite(found).all()
    assert max(found) == pytest.approx(1.0), "the peak is reached"


def test_beta2_is_the_configured_one():
    optimiser = make_optimiser(OptimiserConfig(beta2=0.5, clip_norm=1e9))
    params = {"w": jnp.ones((2, 2))}
    state = optimiser.init(params)
    _, state = optimiser.update({"w": jnp.full((2, 2), 3.0)}, state, params)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "nu")["w"], 0.5 * 9)


DECAYED = {
    "transformer": {"timestep_embedding": True, "trajectory_embedding": True, "width": 16},
    "behaviour_cloning": {"width": 16},
    "td3_bc": {"width": 16},
}


@pytest.mark.parametrize("kind", DECAYED)
def test_weight_decay_applies_to_matrices_only(kind: str) -> None:
    """Biases and norm scales of stacked blocks are two-dimensional too, but must not decay."""
    config = ModelConfig.model_validate({"kind": kind, "layers": 2} | DECAYED[kind])
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make_policy(config, 4, 3, 0)), nnx.Param))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    optimiser = make_optimiser(OptimiserConfig(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.5))
    zero = jax.tree.map(np.zeros_like, params)
    after = jax.jit(lambda x: optax.apply_updates(x, optimiser.update(zero, optimiser.init(x), x)[0]))(params)
    changed = {
        jax.tree_util.keystr(path): bool((x != 1).any()) for path, x in jax.tree_util.tree_leaves_with_path(after)
    }
    assert any(changed.values())
    assert not all(changed.values())
    for name, has_changed in changed.items():
        assert has_changed == name.endswith(("['kernel']", "['embedding']")), name
