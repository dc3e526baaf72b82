"""Normalised scores: their two fixed points, and constants that the environments confirm."""

import numpy as np
import pytest

from ringrl.envs import DOMAINS, TASKS, domain_of, make
from ringrl.errors import UserError
from ringrl.evaluation.scores import normalised_score, scale_of


def test_random_is_0_and_the_bound_is_100():
    for task in TASKS:
        scale = scale_of(task)
        assert 0 <= scale.random < scale.reference == domain_of(task).episode_length
        np.testing.assert_allclose(normalised_score(task, np.array([scale.random, scale.reference])), [0, 100])


def test_by_hand():
    scale = scale_of("walker_walk")
    assert normalised_score("walker_walk", 500.0) == pytest.approx(100 * (500 - scale.random) / (1000 - scale.random))
    assert normalised_score("jaco_reach_top_left", 250.0) == pytest.approx(100)
    assert normalised_score("walker_walk", 0.0) < 0  # worse than random is possible


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="walker_wlak"):
        normalised_score("walker_wlak", 1.0)


@pytest.mark.parametrize(
    ("task", "episodes", "margin"),
    [
        ("cartpole_swingup", 10, 25.0),
        ("cheetah_run", 4, 3.0),
        ("walker_stand", 3, 30.0),
        ("jaco_reach_top_left", 12, 25.0),
    ],
)
def test_the_random_policy_returns_what_the_constants_say(task, episodes, margin):
    """A few episodes of the real environment; the margin is about four of their standard errors."""
    environment = make(task, seed=11)
    generator = np.random.default_rng(11)
    total = 0.0
    for _ in range(episodes):
        environment.reset()
        for action in generator.uniform(-1, 1, (domain_of(task).episode_length, *environment.action_space.shape)):
            total += float(environment.step(action.astype(np.float32))[1])
    assert total / episodes == pytest.approx(scale_of(task).random, abs=margin)


def test_every_domain_is_covered():
    assert {domain_of(task).name for task in TASKS} == set(DOMAINS)
