import numpy as np
import pytest

from ringrl.envs import DOMAINS, goal_space
from ringrl.envs.simulation import load_simulation
from ringrl.errors import UserError


def test_domains_without_places_to_reach_have_none():
    assert [name for name in DOMAINS if goal_space(name)] == ["jaco"]
    with pytest.raises(UserError, match="unknown domain"):
        goal_space("jacko")


def test_every_task_has_a_place_and_is_rewarded_for_it():
    space = goal_space("jaco")
    assert tuple(space.goals) == DOMAINS["jaco"].tasks
    random = np.random.default_rng(0)
    positions = random.normal(0, 0.1, (200, 3))
    simulation = load_simulation("jaco_reach_top_left")
    for task, goal in space.goals.items():
        np.testing.assert_array_equal(
            space.reward(positions, np.array(goal)), simulation.reward(task, positions, np.zeros((200, 9)))
        )
    goals = random.normal(0, 0.1, (200, 3))
    rewards = [float(space.reward(position, goal)) for position, goal in zip(positions, goals, strict=True)]
    np.testing.assert_allclose(space.reward(positions, goals), rewards)
    assert space.reward(positions, positions + np.array([0, 0.1, 0])) == pytest.approx(0.1)


def test_the_observation_holds_the_position_where_it_is_said_to():
    simulation = load_simulation("jaco_reach_top_left")
    simulation.reset(np.random.RandomState(0))
    found = simulation.observation()[goal_space("jaco").observation]
    np.testing.assert_array_equal(found, simulation.sensors().astype(np.float32))
