"""The update equations, each against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringrl.data.collect import td3
from ringrl.data.collect.td3 import Batch, Td3Settings, Td3State

OBSERVATION, ACTION, ROWS = 3, 2, 8
SETTINGS = Td3Settings(width=5)
BALANCE = 3.3


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True), jax.disable_jit():
        yield


def _state(seed: int = 0) -> Td3State:
    """A learner whose networks are all different and none near zero, as after many updates."""
    random = np.random.default_rng(seed)
    state = td3.initial_state(SETTINGS, OBSERVATION, ACTION, jax.random.key(seed))

    def shaken(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(np.asarray(leaf, np.float64) + random.normal(size=leaf.shape))

    names = ("actor", "critics", "target_actor", "target_critics")
    fresh = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) if leaf.ndim else leaf, state)
    fresh = fresh._replace(**{name: jax.tree.map(shaken, getattr(state, name)) for name in names})
    _first, second = fresh.target_critics
    second[2]["bias"] = second[2]["bias"] + BALANCE  # so that now the one, now the other is lower
    return fresh


def _batch(seed: int = 1) -> Batch:
    random = np.random.default_rng(seed)
    return Batch(
        observation=jnp.asarray(random.normal(size=(ROWS, OBSERVATION))),
        action=jnp.asarray(random.uniform(-1, 1, (ROWS, ACTION))),
        reward=jnp.asarray(random.random(ROWS)),
        discount=jnp.asarray(random.choice([0.99, 0.98, 0.97], ROWS)),
        following=jnp.asarray(random.normal(size=(ROWS, OBSERVATION))),
    )


def _network(layers, x: np.ndarray) -> np.ndarray:
    (w1, b1), (w2, b2), (w3, b3) = [(np.asarray(layer["weight"]), np.asarray(layer["bias"])) for layer in layers]
    x = x @ w1 + b1
    x = (x - x.mean(axis=1)[:, None]) / np.sqrt(x.var(axis=1)[:, None] + 1e-5)
    return np.maximum(np.tanh(x) @ w2 + b2, 0) @ w3 + b3


def _value(critic, observation, action) -> np.ndarray:
    return _network(critic, np.concatenate([observation, action], axis=1))[:, 0]


def _target(state: Td3State, batch: Batch, noise: np.ndarray) -> np.ndarray:
    following = np.asarray(batch.following)
    noise = np.clip(0.2 * noise, -0.5, 0.5)
    action = np.clip(np.tanh(_network(state.target_actor, following)) + noise, -1, 1)
    lower = np.minimum(*(_value(critic, following, action) for critic in state.target_critics))
    return np.asarray(batch.reward) + np.asarray(batch.discount) * lower


NOISE = np.random.default_rng(2).normal(size=(ROWS, ACTION)) * 3  # so large that some of it is clipped


def test_the_target_is_the_rewards_and_the_lower_critic_on_a_noisy_action():
    state, batch = _state(), _batch()
    found = td3.target_value(SETTINGS, state, batch, jnp.asarray(NOISE))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, _target(state, batch, NOISE), rtol=1e-12)


def test_the_target_asks_both_critics_and_clips_noise_and_action():
    # Each of these would go unnoticed above if it never mattered in this batch.
    state, batch = _state(), _batch()
    following = np.asarray(batch.following)
    clean = np.tanh(_network(state.target_actor, following))
    first, second = (_value(critic, following, clean) for critic in state.target_critics)
    assert 0 < (first < second).sum() < ROWS
    assert (np.abs(0.2 * NOISE) > 0.5).any()
    assert (np.abs(clean + np.clip(0.2 * NOISE, -0.5, 0.5)) > 1).any()


def _numerical(loss, layers, number: int, name: str) -> np.ndarray:
    """The gradient of a loss with respect to one array of a network, by central differences."""
    gradient = np.zeros(layers[number][name].shape)
    for index in np.ndindex(gradient.shape):
        sides = []
        for step in (1e-6, -1e-6):
            changed = [{key: np.array(value) for key, value in layer.items()} for layer in layers]
            changed[number][name][index] += step
            sides.append(loss(changed))
        gradient[index] = (sides[0] - sides[1]) / 2e-6
    return gradient


def test_critics_descend_the_squared_error_of_each():
    state, batch = _state(), _batch()
    after = td3.update(SETTINGS, state, batch, jnp.asarray(NOISE))
    target = _target(state, batch, NOISE)
    observation, action = np.asarray(batch.observation), np.asarray(batch.action)
    first_moments = after.critics_optimiser[0].mu
    for which, critic in enumerate(state.critics):
        for number, name in ((0, "weight"), (1, "bias"), (2, "weight")):
            wanted = _numerical(
                lambda layers: np.square(_value(layers, observation, action) - target).mean(), critic, number, name
            )
            np.testing.assert_allclose(first_moments[which][number][name], 0.1 * wanted, rtol=1e-5, atol=1e-7)
    # Adam's first step goes against the gradient by the learning rate.
    gradient = np.asarray(first_moments[0][2]["weight"]) / 0.1
    moved = np.asarray(after.critics[0][2]["weight"]) - np.asarray(state.critics[0][2]["weight"])
    np.testing.assert_allclose(moved, -SETTINGS.learning_rate * np.sign(gradient), rtol=1e-5)


def test_the_actor_climbs_the_first_critic_after_the_critics_have_moved():
    state, batch = _state(), _batch()
    once = td3.update(SETTINGS, state, batch, jnp.asarray(NOISE))
    twice = td3.update(SETTINGS, once, batch, jnp.asarray(NOISE))
    observation = np.asarray(batch.observation)

    def loss(layers) -> float:
        return -_value(twice.critics[0], observation, np.tanh(_network(layers, observation))).mean()

    for number, name in ((0, "bias"), (2, "weight")):
        wanted = _numerical(loss, state.actor, number, name)
        found = twice.actor_optimiser[0].mu[number][name]
        np.testing.assert_allclose(found, 0.1 * wanted, rtol=1e-5, atol=1e-8)


def _same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_actor_and_targets_move_at_every_second_update_only():
    state, batch = _state(), _batch()
    delayed = ("actor", "actor_optimiser", "target_actor", "target_critics")
    once = td3.update(SETTINGS, state, batch, jnp.asarray(NOISE))
    assert all(_same(getattr(once, name), getattr(state, name)) for name in delayed)
    assert not _same(once.critics, state.critics)
    twice = td3.update(SETTINGS, once, batch, jnp.asarray(NOISE))
    assert not any(_same(getattr(twice, name), getattr(once, name)) for name in delayed)
    for target, source in (("target_actor", "actor"), ("target_critics", "critics")):
        before, moved, now = getattr(once, target), getattr(twice, target), getattr(twice, source)
        wanted = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, before, now)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), moved, wanted)
    thrice = td3.update(SETTINGS, twice, batch, jnp.asarray(NOISE))
    assert _same(thrice.actor, twice.actor)


def test_the_actor_acts_the_same_in_numpy():
    actor, observation = _state().actor, np.asarray(_batch().observation)
    found = td3.act(jax.device_get(actor), observation)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, np.tanh(_network(actor, observation)), rtol=1e-12)
    np.testing.assert_allclose(found, jnp.tanh(td3.apply_network(actor, jnp.asarray(observation))), rtol=1e-12)


def test_at_first_actions_are_near_zero_and_targets_equal_what_they_follow():
    state = td3.initial_state(Td3Settings(), OBSERVATION, ACTION, jax.random.key(0))
    observation = 100 * np.random.default_rng(0).normal(size=(50, OBSERVATION))
    assert np.abs(td3.act(jax.device_get(state.actor), observation)).max() < 0.3
    assert _same(state.actor, state.target_actor)
    assert _same(state.critics, state.target_critics)
    assert not _same(*state.critics)
