import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringrl.data.collect import rnd


@pytest.fixture(scope="module")
def trained() -> tuple[rnd.RndState, rnd.RndState, np.ndarray, np.ndarray]:
    """Before and after many visits to one region; states of that region and of another, equally far from the mean."""
    random = np.random.default_rng(0)
    old = random.normal(size=(2000, 4)) * 0.3 + [2, 0, 0, 0]
    new = random.normal(size=(2000, 4)) * 0.3 + [0, 2, 0, 0]
    before = rnd.initial_state(4, jax.random.key(0))
    # The scale of observations is that of both regions, so that novelty is not mere distance from the mean.
    before = before._replace(observation=rnd.observe(before.observation, jnp.asarray(np.concatenate([old, new]))))
    update, after = jax.jit(rnd.update), before
    for _ in range(100):
        after, _ = update(after, jnp.asarray(old[random.integers(2000, size=64)]))
    return before, after, old, new


def test_the_bonus_falls_where_one_has_been_and_stays_high_where_not(trained):
    before, after, old, new = trained
    scales = {"observation": before.observation}  # compared on one scale of inputs
    known, unknown = (rnd.errors(after._replace(**scales), jnp.asarray(states)).mean() for states in (old, new))
    at_first = rnd.errors(before, jnp.asarray(old)).mean()
    assert known < 0.2 * at_first
    assert unknown > 3 * known


def test_only_the_predictor_learns(trained):
    before, after, *_ = trained
    jax.tree.map(np.testing.assert_array_equal, before.target, after.target)
    assert not np.array_equal(before.predictor[0]["weight"], after.predictor[0]["weight"])


def test_the_bonus_is_the_error_before_the_step_in_standard_deviations():
    state = rnd.initial_state(3, jax.random.key(1))
    random = np.random.default_rng(1)
    seen = []
    for _ in range(5):
        states = jnp.asarray(random.normal(size=(32, 3)))
        scaled = state._replace(observation=rnd.observe(state.observation, states))
        expected = np.asarray(rnd.errors(scaled, states))
        seen.append(expected)
        state, bonus = rnd.update(state, states)
        np.testing.assert_allclose(bonus, expected / np.concatenate(seen).std(), rtol=1e-3)
    assert np.abs(np.asarray(bonus)).max() < 100


def test_moments_are_those_of_all_that_was_seen():
    random = np.random.default_rng(2)
    chunks = [random.normal(3, 2, size=(number, 2)) for number in (1, 50, 7)]
    state = rnd.initial_state(2, jax.random.key(0)).observation
    for chunk in chunks:
        state = rnd.observe(state, jnp.asarray(chunk))
    together = np.concatenate(chunks)
    np.testing.assert_allclose(state.mean, together.mean(0), rtol=1e-4)
    np.testing.assert_allclose(state.variance, together.var(0), rtol=1e-4)
    assert float(state.number) == len(together)
