import numpy as np
import pytest
from dm_control import suite
from dm_control.utils.rewards import tolerance

from ringrl.envs import load_simulation, make


def _flat(observation):
    return observation["observations"].astype(np.float32)


@pytest.mark.parametrize("task", ["walk", "run"])
@pytest.mark.parametrize("seed", [0, 7])
def test_stock_tasks_equal_dm_control(task, seed, assert_equals_dm_control):
    reference = suite.load(
        "quadruped", task, task_kwargs={"random": seed}, environment_kwargs={"flat_observation": True}
    )
    steps = 1000 if (task, seed) == ("walk", 0) else 100
    assert_equals_dm_control(make(f"quadruped_{task}", seed), reference, steps, _flat)


@pytest.mark.parametrize("task", ["stand", "jump"])
def test_custom_rewards_equal_their_formula(task):
    environment = make(f"quadruped_{task}", 1)
    reference = suite.load("quadruped", "walk", task_kwargs={"random": 1})
    environment.reset()
    reference.reset()
    lower, upper = reference.action_spec().minimum, reference.action_spec().maximum
    generator = np.random.RandomState(0)
    rewards = []
    for _ in range(200):
        action = generator.uniform(-1, 1, 12)
        reference.step((upper + lower) / 2 + (upper - lower) / 2 * action)
        data = reference.physics.named.data
        expected = (1 + reference.physics.torso_upright()) / 2
        if task == "jump":
            height = data.sensordata["center_of_mass"][2]
            expected *= tolerance(height, bounds=(1, np.inf), margin=1, value_at_margin=0.5, sigmoid="linear")
        rewards.append(environment.step(action)[1])
        assert rewards[-1] == pytest.approx(float(expected), abs=1e-12)
    assert np.ptp(rewards) > 0.01


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        # the linear slopes are 0.5 one margin below the target and continue to zero
        ("quadruped_stand", [1, 1, 0.5, 0, 1]),
        ("quadruped_walk", [0.5, 1, 0.5, 0, 0]),
        ("quadruped_run", [0.5, 0.55, 0.5, 0, 0.35]),
        ("quadruped_jump", [1, 0.75, 0.375, 0, 0.5]),
    ],
)
def test_rewards_at_known_points(task, expected):
    from ringrl.envs.quadruped import QuadrupedSimulation

    # uprightness, forward velocity, height of the centre of mass
    sensors = np.array([[1, 0, 1], [1, 0.5, 0.5], [0, 5, 0.5], [-1, 9, 2], [1, -1.5, 0]], float)
    np.testing.assert_allclose(QuadrupedSimulation.reward(task, sensors, np.zeros((5, 12))), expected, atol=1e-12)


def test_episodes_start_in_any_orientation_without_contact():
    simulation = load_simulation("quadruped_jump")
    random = np.random.RandomState(0)
    upright = []
    for _ in range(20):
        simulation.reset(random)
        assert simulation.data.ncon == 0
        np.testing.assert_allclose(np.linalg.norm(simulation.data.qpos[3:7]), 1)
        upright.append(simulation.sensors()[0])
    assert min(upright) < -0.5
    assert max(upright) > 0.5


def test_activations_are_part_of_the_physics_state():
    environment = make("quadruped_run", 0)
    environment.reset()
    for _ in range(5):
        info = environment.step(np.full(12, 0.5))[-1]
    simulation = load_simulation("quadruped_run")
    simulation.set_physics_state(info["physics"])
    assert (simulation.data.act != 0).all()
    np.testing.assert_array_equal(simulation.data.act, info["physics"][-12:])
    np.testing.assert_array_equal(simulation.observation()[32:44], info["physics"][-12:].astype(np.float32))
