from importlib import resources

import numpy as np
import pytest
from dm_control.utils.rewards import tolerance

from ringrl.data import relabel
from ringrl.envs import DOMAINS, TASKS, domain_of, load_simulation, make, make_vec
from ringrl.errors import UserError

_GOALS = {
    "point_mass_maze_reach_top_left": (-0.15, 0.15, 0.01),
    "point_mass_maze_reach_top_right": (0.15, 0.15, 0.01),
    "point_mass_maze_reach_bottom_left": (-0.15, -0.15, 0.01),
    "point_mass_maze_reach_bottom_right": (0.15, -0.15, 0.01),
}
_RADIUS = 0.01  # metres, of the mass
_GIVES = 0.002  # metres, upper bound of the penetration in MuJoCo's soft contacts


@pytest.fixture
def simulation():
    return load_simulation("point_mass_maze_reach_top_left")


def _push(simulation, position, action, seconds=10.0):
    """Return positions (steps, 2) of a mass that starts at rest, under a constant action."""
    simulation.reset(np.random.RandomState(0))
    with simulation.physics.reset_context():
        simulation.data.qpos[:] = position
    positions = []
    for _ in range(round(seconds / 0.02)):
        simulation.step(np.array(action, float))
        positions.append(simulation.data.qpos.copy())
    return np.stack(positions)


@pytest.mark.parametrize("task", _GOALS)
def test_the_goal_site_is_at_the_goal(task):
    simulation = load_simulation(task)
    simulation.reset(np.random.RandomState(0))
    np.testing.assert_array_equal(simulation.data.site("goal").xpos, _GOALS[task])


def test_the_model_has_the_described_parameters(simulation):
    model = simulation.model
    assert (model.nq, model.nv, model.na, model.nu) == (2, 2, 0, 2)
    assert model.body("mass").mass == pytest.approx(0.3)
    np.testing.assert_array_equal(model.geom("mass").size[0], _RADIUS)
    np.testing.assert_array_equal(model.jnt_range, [(-0.29, 0.29)] * 2)
    np.testing.assert_array_equal(model.dof_damping, 1)
    np.testing.assert_array_equal(model.actuator_gear[:, 0], 0.1)
    np.testing.assert_array_equal(model.geom("wall_x").size[:2], (0.18, 0.02))
    np.testing.assert_array_equal(model.geom("wall_y").size[:2], (0.02, 0.18))
    np.testing.assert_array_equal(model.geom("wall_x").pos[:2], 0)
    np.testing.assert_array_equal(model.geom("wall_y").pos[:2], 0)


def test_the_model_is_installed_with_the_package():
    assert (resources.files("ringrl.envs") / "point_mass_maze.xml").is_file()


def test_without_contact_it_moves_as_a_damped_mass(simulation):
    """m a = gear u - damping v, so v = gear u (1 - exp(-t damping / m)). Goal and floor are no obstacles."""
    positions = _push(simulation, (-0.25, 0.15), (1, 0.5), seconds=1.0)
    times = 0.02 * np.arange(1, 51)
    travelled = 0.1 * (times - 0.3 * (1 - np.exp(-times / 0.3)))
    np.testing.assert_allclose(positions[:, 0] + 0.25, travelled, atol=2e-3)
    np.testing.assert_allclose(positions[:, 1] - 0.15, travelled / 2, atol=2e-3)


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("place", [-0.1, 0.05, 0.16])
def test_inner_walls_stop_the_mass(simulation, along, side, place):
    position, action = np.zeros(2), np.zeros(2)
    position[along], position[1 - along] = place, side * 0.1
    action[1 - along] = -side
    distance = side * _push(simulation, position, action)[:, 1 - along]
    assert distance.min() > 0.02 + _RADIUS - _GIVES
    assert distance[-1] < 0.02 + _RADIUS + _GIVES  # it reached the wall


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_border_stops_the_mass_and_passages_are_open(simulation, axis, side):
    position, action = np.zeros(2), np.zeros(2)
    position[axis], action[axis] = -side * 0.28, side
    position[1 - axis] = 0.24  # beyond the end of the inner wall
    reached = side * _push(simulation, position, action)[:, axis]
    assert reached.max() < 0.29 + _GIVES
    assert reached[-1] > 0.29 - _GIVES


def test_episodes_start_at_rest_in_the_top_left_corner():
    environment = make("point_mass_maze_reach_bottom_right", 0)
    starts = np.stack([environment.reset()[0] for _ in range(500)])
    np.testing.assert_array_equal(starts[:, 2:], 0)
    for column, lower, upper in ((0, -0.29, -0.15), (1, 0.15, 0.29)):
        start = starts[:, column]
        assert (start >= np.float32(lower)).all()
        assert (start <= np.float32(upper)).all()
        assert start.min() < lower + 0.002
        assert start.max() > upper - 0.002


def test_starts_depend_on_the_seed_only():
    starts = []
    for state in (0, 1):
        np.random.seed(state)  # noqa: NPY002 (it must have no effect)
        starts.append(make("point_mass_maze_reach_top_left", 5).reset()[0])
    np.testing.assert_array_equal(*starts)


def test_the_observation_is_position_then_velocity():
    environment = make("point_mass_maze_reach_top_left", 0)
    environment.reset()
    for _ in range(3):
        observation, *_, info = environment.step(np.array([1, -0.5]))
        np.testing.assert_array_equal(observation, info["physics"].astype(np.float32))
    assert observation[2] > 0 > observation[3]


@pytest.mark.parametrize("task", list(_GOALS))
def test_rewards_equal_the_formula_step_by_step(task):
    simulation = load_simulation(task)
    assert task in DOMAINS["point_mass_maze"].tasks
    simulation.reset(np.random.RandomState(0))
    simulation.data.qpos[:] = np.array(_GOALS[task][:2]) - 0.03
    random = np.random.RandomState(1)
    rewards = []
    for _ in range(100):
        action = random.uniform(-0.2, 1, 2)
        simulation.step(action)
        named = simulation.physics.named
        distance = np.linalg.norm(named.data.geom_xpos["mass"] - named.model.site_pos["goal"])
        near = tolerance(distance, bounds=(0, 0.015), margin=0.015)
        control = tolerance(simulation.physics.control(), margin=1, value_at_margin=0, sigmoid="quadratic").mean()
        rewards.append(float(simulation.reward(task, simulation.sensors(), action)))
        assert rewards[-1] == pytest.approx(near * (control + 4) / 5, abs=1e-12)
    assert max(rewards) > 0.8
    assert np.ptp(rewards) > 0.5
    np.testing.assert_array_equal(simulation.physics.named.model.site_pos["goal"], _GOALS[task])


@pytest.mark.parametrize("task", list(_GOALS))
def test_rewards_at_known_points(task):
    from ringrl.envs.point_mass_maze import PointMassMazeSimulation

    sensors = np.array(_GOALS[task]) + np.array([[0, 0, 0], [0.0149, 0, 0], [0, 0.03, 0], [0, 0, 0], [0, 0, 0]])
    action = np.array([[0, 0], [0, 0], [0, 0], [1, 0], [1, -1]], np.float32)
    rewards = PointMassMazeSimulation.reward(task, sensors, action)
    np.testing.assert_allclose(rewards, [1, 1, 0.1, 0.9, 0.8], atol=1e-6)


def test_a_goal_anywhere_in_a_room_is_a_task():
    task, goal = "point_mass_maze_reach(0.2,-0.08)", (0.2, -0.08, 0.01)
    assert domain_of(task) is DOMAINS["point_mass_maze"]
    assert task not in TASKS
    simulation = load_simulation(task)
    np.testing.assert_array_equal(simulation.physics.named.model.site_pos["goal"], goal)
    sensors = np.array(goal) + np.array([[0, 0, 0], [0, 0.03, 0], [0, 0.09, 0], [0, 0, 0]])
    action = np.array([[0, 0], [0, 0], [0, 0], [1, -1]], np.float32)
    np.testing.assert_allclose(simulation.reward(task, sensors, action), [1, 0.1, 0, 0.8], atol=1e-6)
    env = make(task, seed=3)
    vector = make_vec(task, 1, seed=3)
    np.testing.assert_array_equal(env.reset()[0], vector.reset()[0][0])


def test_the_place_of_an_exorl_task_has_its_rewards():
    random = np.random.default_rng(0)
    physics = random.uniform(-0.2, 0.2, (500, 4))
    physics[::2, :2] = np.array((0.15, -0.15)) + random.normal(size=(250, 2)) * 0.015
    action = random.uniform(-1, 1, (500, 2)).astype(np.float32)
    known = relabel("point_mass_maze_reach_bottom_right", physics, action)
    np.testing.assert_array_equal(relabel("point_mass_maze_reach(0.15,-0.15)", physics, action), known)
    assert (known > 0).sum() > 50


@pytest.mark.parametrize("place", ["0.2,0", "0.29,0.1", "-0.02,0.1", "1,1"])
def test_a_goal_in_a_wall_or_a_passage_is_refused(place):
    with pytest.raises(UserError, match=r"is not in a room; choose a place 0\.03 to 0\.28 m from both axes"):
        make(f"point_mass_maze_reach({place})")


@pytest.mark.parametrize("goal", ["(0.1)", "(a,b)", "(0.1,0.1)x", "(0.1, 0.2)", "(nan,0.1)", "(0.1;0.2)"])
def test_the_form_of_a_goal_is_shown(goal):
    with pytest.raises(UserError, match=r"write x and y in metres, without spaces, as in .*\(-0\.1,0\.25\)"):
        make(f"point_mass_maze_reach{goal}")


@pytest.mark.parametrize("name", ["point_mass_maze_reach", "walker_reach(0.1,0.1)"])
def test_names_that_are_no_goal_are_unknown(name):
    with pytest.raises(UserError, match="unknown task"):
        make(name)
