"""The training step, computed by hand."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from ringrl.config import ModelConfig, OptimiserConfig
from ringrl.context import Context, Outcome
from ringrl.model import make_policy
from ringrl.model.agents.imitation import initial_state, make_train_step
from ringrl.model.optimiser import make_optimiser


@pytest.fixture
def batch() -> Context:
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    index = np.tile(np.arange(5, dtype=np.int32), (2, 1))
    outcome, previous = (Outcome(np.tanh(normal(2, 5, 2)), normal(2, 5), normal(2, 5)) for _ in range(2))
    return Context(
        observation=normal(2, 5, 3),
        return_to_go=normal(2, 5),
        timestep=index,
        trajectory=index * 0,
        position=index,
        start=index * 0,
        weight=np.ones((2, 5), np.float32),
        previous=previous,
        **outcome._asdict(),
    )


def test_a_step_by_hand(batch):
    """Clipping by global norm, Adam with bias correction, then weight decay of matrices."""
    config = OptimiserConfig(
        steps=10, warmup_steps=0, learning_rate=0.01, final_learning_rate=1, weight_decay=0.3, clip_norm=0.05, beta2=0.9
    )
    policy = make_policy(ModelConfig(layers=1, width=8, heads=1), 3, 2, seed=0)
    optimiser = make_optimiser(config)
    state = initial_state(lambda: policy, optimiser)
    before = jax.tree.map(np.array, state.params)
    graph, _ = nnx.split(policy, nnx.Param)
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(batch)))(state.params)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradients)))
    assert norm > 2 * config.clip_norm, "there is something to clip"
    state, metrics = make_train_step(nnx.split(policy, nnx.Param)[0], optimiser)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    assert int(state.step) == 1

    def expected(path: tuple, parameter: np.ndarray, gradient: jax.Array) -> np.ndarray:
        clipped = np.asarray(gradient, np.float64) * config.clip_norm / norm
        adam = clipped / (np.abs(clipped) + 1e-8)  # the first step: both corrected moments are the gradient's own
        return parameter - 0.01 * (adam + (0.3 * parameter if path[-1].key == "kernel" else 0))

    wanted = jax.tree_util.tree_map_with_path(expected, before, gradients)
    for path, found in jax.tree_util.tree_leaves_with_path(state.params):
        value = wanted
        for key in path:
            value = value[key.key]
        np.testing.assert_allclose(found, value, atol=2e-4, err_msg=jax.tree_util.keystr(path))


def test_state_is_donated_and_non_finite_steps_change_only_counts(batch):
    policy = make_policy(ModelConfig(layers=1, width=8, heads=1), 3, 2, seed=0)
    optimiser = make_optimiser(OptimiserConfig(warmup_steps=0))
    step = make_train_step(nnx.split(policy, nnx.Param)[0], optimiser)
    first = initial_state(lambda: policy, optimiser)
    state, metrics = step(first, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params)), "memory for two states would be needed"
    assert int(metrics["skipped"]) == 0
    before = jax.tree.map(np.array, state)
    bad = batch._replace(action=np.where(np.arange(5)[:, None] == 2, np.inf, batch.action).astype(np.float32))
    state, metrics = step(state, bad)
    assert (int(metrics["skipped"]), int(state.step)) == (1, 2)
    assert not np.isfinite(metrics["loss"])
    for old, new in zip(jax.tree.leaves(before[:2]), jax.tree.leaves(state[:2]), strict=True):
        np.testing.assert_array_equal(old + 1 if old.dtype == np.int32 else old, new, "counts advance")
    state, metrics = step(state, batch)
    assert int(metrics["skipped"]) == 0
    assert any(
        (old != new).any()
        for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True)
    )


@pytest.mark.parametrize(("loss_on", "parts"), [pytest.param("all", 2, marks=pytest.mark.slow), ("last", 4)])
def test_accumulated_gradient_equals_that_of_the_whole_batch(loss_on, parts):
    """Contexts differ in length, so the mean of the parts' means would be wrong."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    index = np.tile(np.arange(6, dtype=np.int32), (4, 1))
    weight = (index < np.array([[6], [2], [5], [1]])).astype(np.float32)
    actions = np.tanh(normal(4, 6, 2))
    previous = Outcome(np.zeros_like(actions), np.zeros((4, 6), np.float32), np.zeros((4, 6), np.float32))
    others = (normal(4, 6) for _ in range(3))
    batch = Context(normal(4, 6, 3), actions, *others, index, index // 2, index, index * 0, weight, previous)
    optimiser = optax.sgd(1.0)
    found = []
    for accumulation in (1, parts):
        policy = make_policy(ModelConfig(layers=1, width=8, heads=1, loss_on=loss_on), 3, 2, seed=0)
        step = make_train_step(nnx.split(policy, nnx.Param)[0], optimiser, accumulation)
        state, metrics = step(initial_state(lambda policy=policy: policy, optimiser), batch)
        found.append(jax.device_get((state.params, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)
