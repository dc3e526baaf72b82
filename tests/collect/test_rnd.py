import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringrl.collect.rnd import RND, Moments, RndState

LEARNER = RND(4)


@pytest.fixture(scope="module")
def trained() -> tuple[RndState, RndState, np.ndarray, np.ndarray]:
    """Return the states before and after many visits to a region, and observations of this and of another region."""
    random = np.random.default_rng(0)
    old = random.normal(size=(2000, 4)) * 0.3 + [2, 0, 0, 0]
    new = random.normal(size=(2000, 4)) * 0.3 + [0, 2, 0, 0]
    before = LEARNER.init(nnx.Rngs(params=0))
    # Both regions set the scale of observations, so that novelty is not distance from the mean.
    before = before._replace(observation=before.observation.observe(jnp.asarray(np.concatenate([old, new]))))
    update, after = jax.jit(LEARNER.update), before
    for _ in range(100):
        after, _ = update(after, jnp.asarray(old[random.integers(2000, size=64)]))
    return before, after, old, new


def test_errors_fall_in_visited_regions_only(trained):
    before, after, old, new = trained
    scales = {"observation": before.observation}  # compared on one scale of inputs
    known, unknown = (LEARNER.errors(after._replace(**scales), jnp.asarray(states)).mean() for states in (old, new))
    at_first = LEARNER.errors(before, jnp.asarray(old)).mean()
    assert known < 0.2 * at_first
    assert unknown > 3 * known


def test_the_target_network_is_constant(trained):
    before, after, *_ = trained
    jax.tree.map(np.testing.assert_array_equal, before.target, after.target)
    assert not np.array_equal(before.predictor["last"]["kernel"], after.predictor["last"]["kernel"])


def test_the_bonus_is_the_error_before_the_update_in_standard_deviations():
    rnd = RND(3)
    state = rnd.init(nnx.Rngs(params=1))
    random = np.random.default_rng(1)
    seen = []
    for _ in range(5):
        states = jnp.asarray(random.normal(size=(32, 3)))
        scaled = state._replace(observation=state.observation.observe(states))
        expected = np.asarray(rnd.errors(scaled, states))
        seen.append(expected)
        state, bonus = rnd.update(state, states)
        np.testing.assert_allclose(bonus, expected / np.concatenate(seen).std(), rtol=1e-3)
    assert np.abs(np.asarray(bonus)).max() < 100


def test_moments_equal_those_of_all_values():
    random = np.random.default_rng(2)
    chunks = [random.normal(3, 2, size=(number, 2)) for number in (1, 50, 7)]
    state = Moments.zero(2)
    for chunk in chunks:
        state = state.observe(jnp.asarray(chunk))
    together = np.concatenate(chunks)
    np.testing.assert_allclose(state.mean, together.mean(0), rtol=1e-4)
    np.testing.assert_allclose(state.variance, together.var(0), rtol=1e-4)
    assert float(state.number) == len(together)
