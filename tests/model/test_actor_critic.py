"""Actor and critics against their formulas in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringrl.config import ModelConfig
from ringrl.context import Context, Transitions
from ringrl.model import ActorCritic, Goal, make_policy

OBSERVATION, ACTION, BATCH = 3, 2, 6
GOAL = Goal(place=(0.1, -0.2), columns=(2, 0), mean=(0.3, -0.1), std=(0.5, 2.0))


def make(goal: Goal | None = GOAL, seed: int = 1) -> ActorCritic:
    """Return a small actor-critic with large last layers and targets that differ from the learned networks."""
    config = ModelConfig(kind="td3_bc", layers=2, width=16)
    policy = make_policy(config, OBSERVATION, ACTION, seed, goal)
    random = np.random.default_rng(seed)
    graph, params = nnx.split(policy)
    params = jax.tree.map(lambda x: x + 0.3 * random.normal(size=x.shape).astype(np.float32), params)
    return nnx.merge(graph, params)


@pytest.fixture
def batch() -> Transitions:
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    discount = np.linspace(0.5, 0.99, BATCH, dtype=np.float32)
    following = 4 * normal(BATCH, OBSERVATION)  # beyond the clip at times
    action = np.tanh(normal(BATCH, ACTION))
    return Transitions(normal(BATCH, OBSERVATION), action, normal(BATCH), discount, following, normal(BATCH, 2))


def network(mlp: nnx.Module, x: np.ndarray) -> np.ndarray:
    """Apply a layer-normalised ReLU network in float64."""
    x = np.asarray(x, np.float64)
    for layer in mlp.layers:
        x = x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
        x = np.maximum((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6), 0)
    return x @ np.asarray(mlp.last.kernel[...], np.float64) + np.asarray(mlp.last.bias[...], np.float64)


def inputs(observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Return the network inputs in float64."""
    observation, goal = np.asarray(observation, np.float64), np.asarray(goal, np.float64)
    position = np.stack([0.5 * observation[:, 2] + 0.3, 2.0 * observation[:, 0] - 0.1], -1)
    offset = position - goal
    return np.concatenate([np.clip(observation, -5, 5), 5 * goal, 5 * offset, np.tanh(20 * offset)], -1)


def test_inputs_hold_the_observation_the_goal_and_the_offset(batch: Transitions) -> None:
    found = make().inputs(jnp.asarray(batch.following), jnp.asarray(batch.goal))
    np.testing.assert_allclose(found, inputs(batch.following, batch.goal), rtol=1e-4, atol=1e-4)
    assert np.abs(batch.following).max() > 5, "there is something to clip"
    without = make(goal=None).inputs(jnp.asarray(batch.observation), jnp.zeros((BATCH, 0)))
    np.testing.assert_array_equal(without, batch.observation)


def test_target_by_hand(batch: Transitions) -> None:
    policy = make()
    noise = np.random.default_rng(1).normal(size=(BATCH, ACTION)).astype(np.float32)
    x = inputs(batch.following, batch.goal)
    free = np.tanh(network(policy.target_actor, x)) + noise
    assert (np.abs(free) > 1).any(), "there is something to clip"
    together = np.concatenate([x, np.clip(free, -1, 1)], -1)
    first, second = (network(critic, together)[:, 0] for critic in policy.target_critics)
    assert 0 < (first < second).sum() < BATCH, "each critic is the lower one somewhere"
    expected = batch.reward + batch.discount * np.minimum(first, second)
    np.testing.assert_allclose(policy.target_value(batch, jnp.asarray(noise)), expected, rtol=2e-4, atol=2e-4)


def test_losses_by_hand(batch: Transitions) -> None:
    policy = make()
    x = inputs(batch.observation, batch.goal)
    target = np.linspace(-1, 1, BATCH, dtype=np.float32)
    values = [network(critic, np.concatenate([x, batch.action], -1))[:, 0] for critic in policy.critics]
    expected = sum(np.square(value - target).mean() for value in values)
    np.testing.assert_allclose(policy.critic_loss(batch, jnp.asarray(target)), expected, rtol=1e-3)

    action = np.tanh(network(policy.actor, x))
    value = network(policy.critics[0], np.concatenate([x, action], -1))[:, 0]
    expected = -value.mean() / np.abs(value).mean() + 0.7 * np.square(action - batch.action).mean()
    np.testing.assert_allclose(policy.actor_loss(batch, 0.7), expected, rtol=1e-2, atol=1e-3)


def test_actor_gradient_stops_at_the_value_scale(batch: Transitions) -> None:
    """Otherwise a policy could lower its loss by making values small."""
    policy = make()
    graph, params = nnx.split(policy)
    scale = 1e-3 + jnp.abs(_first_values(policy, batch)).mean()
    found = jax.grad(lambda p: nnx.merge(graph, p).actor_loss(batch, 0.0))(params)
    expected = jax.grad(lambda p: -_first_values(nnx.merge(graph, p), batch).mean() / scale)(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def _first_values(policy: ActorCritic, batch: Transitions) -> jax.Array:
    x = policy.inputs(jnp.asarray(batch.observation), jnp.asarray(batch.goal))
    return policy.critics[0](jnp.concatenate([x, jnp.tanh(policy.actor(x))], -1))[:, 0]


def test_actions_use_the_target_actor_and_the_task_goal(context: Callable[..., Context]) -> None:
    policy, steps = make(), context(time=3)
    x = inputs(steps.observation[:, -1], np.tile(GOAL.place, (2, 1)))
    expected = np.tanh(network(policy.target_actor, x))
    current = jax.tree.map(lambda a: a[:, -1:], steps)
    found, memory = policy.act(None, current, policy.reset(2, 10))
    assert memory is None
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(policy.actions(steps)[:, -1], found, rtol=1e-5, atol=1e-6)
    assert np.abs(np.tanh(network(policy.actor, x)) - expected).max() > 0.01, "the two actors differ here"


def test_actions_without_a_goal(context: Callable[..., Context]) -> None:
    policy, steps = make(goal=None), context(time=3)
    expected = np.tanh(network(policy.target_actor, steps.observation[:, -1]))
    np.testing.assert_allclose(policy.actions(steps)[:, -1], expected, rtol=1e-4, atol=1e-4)


def test_untrained_actions_are_near_zero_and_targets_equal_networks(batch: Transitions) -> None:
    policy = make_policy(ModelConfig(kind="td3_bc", layers=2, width=64), OBSERVATION, ACTION, 0, GOAL)
    x = policy.inputs(jnp.asarray(batch.observation), jnp.asarray(batch.goal))
    assert np.abs(policy.actor(x)).max() < 0.3
    np.testing.assert_array_equal(policy.actor(x), policy.target_actor(x))
    first, second = (critic(jnp.concatenate([x, batch.action], -1)) for critic in policy.critics)
    assert np.abs(first - second).max() > 1e-3, "the critics are two"
