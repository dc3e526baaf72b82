import numpy as np
import pytest
from dm_control import suite

from ringrl.envs import make


def _flat(observation):
    return observation["observations"].astype(np.float32)


@pytest.mark.parametrize("task", ["stand", "walk", "run"])
@pytest.mark.parametrize("seed", [0, 7])
def test_stock_tasks_equal_dm_control(task, seed, assert_equals_dm_control):
    reference = suite.load("walker", task, task_kwargs={"random": seed}, environment_kwargs={"flat_observation": True})
    steps = 1000 if (task, seed) == ("walk", 0) else 100
    assert_equals_dm_control(make(f"walker_{task}", seed), reference, steps, _flat)


def test_flip_rewards_standing_and_angular_momentum():
    environment, reference = make("walker_flip", 1), suite.load("walker", "stand", task_kwargs={"random": 1})
    environment.reset()
    reference.reset()
    generator = np.random.RandomState(0)
    sloped = 0
    for _ in range(300):
        action = generator.uniform(-1, 1, 6)
        stand = reference.step(action).reward
        momentum = reference.physics.named.data.subtree_angmom["torso"][1]
        move = min(max(momentum / 5, 0.0), 1.0)
        assert environment.step(action)[1] == pytest.approx(stand * (5 * move + 1) / 6, abs=1e-12)
        sloped += 0 < move < 1
    assert sloped > 50


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        # upright and tall: only the motion varies
        ("walker_stand", [1, 1, 1, 1]),
        ("walker_walk", [1, (5 * 0.5 + 1) / 6, 1 / 6, 1]),
        ("walker_run", [(5 * 0.5 + 1) / 6, (5 * 0.0625 + 1) / 6, 1 / 6, 1]),
        ("walker_flip", [1 / 6, (5 * 0.5 + 1) / 6, 1, 1]),
    ],
)
def test_rewards_at_known_points(task, expected):
    from ringrl.envs.walker import WalkerSimulation

    # height, uprightness, velocity, angular momentum
    sensors = np.array([[1.2, 1, 4, 0], [1.3, 1, 0.5, 2.5], [2, 1, -3, 5], [1.5, 1, 9, 8]], float)
    np.testing.assert_allclose(WalkerSimulation.reward(task, sensors, np.zeros((4, 6))), expected, atol=1e-12)


def test_the_standing_reward_is_gaussian_below_the_height():
    from ringrl.envs.walker import WalkerSimulation

    sensors = np.array([[0.6, 0.0, 0.0, 0.0]])  # one margin below the standing height: a tenth
    np.testing.assert_allclose(WalkerSimulation.reward("walker_stand", sensors, np.zeros((1, 6))), (0.3 + 0.5) / 4)
