import io
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ringrl.collect.controllers import recipe_of
from ringrl.collect.record import record_episode, start_seed
from ringrl.data.relabel import relabel, relabel_all
from ringrl.envs import DOMAINS, TASKS, load_simulation, make
from ringrl.errors import UserError

_RECORDED = [
    ("cartpole/ddpg.zip", "cartpole_swingup"),
    ("cheetah/ddpg.zip", "cheetah_run"),
    ("walker/ddpg.zip", "walker_walk"),
    ("walker/rnd.zip", "walker_stand"),
    ("jaco/ddpg.zip", "jaco_reach_top_left"),
]


def _roll_out(task, steps=120, seed=0):
    """Return physics, random actions and rewards of the first steps of an episode in ExoRL's rows."""
    environment = make(task, seed)
    generator = np.random.RandomState(seed)
    _, info = environment.reset()
    rows = [(info["physics"], np.zeros(environment.action_space.shape, np.float32), 0.0)]
    for _ in range(steps):
        action = generator.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
        _, reward, _, _, info = environment.step(action)
        rows.append((info["physics"], action, reward))
    physics, action, reward = (np.stack(column) for column in zip(*rows, strict=True))
    return physics, action, reward


@pytest.mark.parametrize("task", TASKS)
def test_equals_what_the_environment_rewards(task):
    physics, action, reward = _roll_out(task)
    relabelled = relabel(task, physics, action)
    assert relabelled.dtype == np.float32
    assert relabelled.shape == (121,)
    assert relabelled[0] == 0
    np.testing.assert_allclose(relabelled, reward, atol=1e-7)
    unlucky = ("cartpole_swingup_sparse", "jaco_reach_top_left")
    if task not in unlucky and not task.startswith("point_mass_maze"):  # random actions have reward 0 there
        assert np.ptp(relabelled[1:]) > 0


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_all_tasks_in_one_pass(domain):
    physics, action, _ = _roll_out(DOMAINS[domain].tasks[0], steps=30)
    rewards = relabel_all(domain, physics, action)
    assert tuple(rewards) == DOMAINS[domain].tasks
    for task, reward in rewards.items():
        np.testing.assert_array_equal(reward, relabel(task, physics, action))


@pytest.mark.parametrize(("archive", "task"), _RECORDED)
def test_equals_what_exorl_recorded(archive, task, exorl_folder):
    episodes = 0
    with zipfile.ZipFile(exorl_folder / archive) as opened:
        for name in opened.namelist():
            if name.endswith(".npz"):
                episode = np.load(io.BytesIO(opened.read(name)))
                relabelled = relabel(task, episode["physics"], episode["action"])
                np.testing.assert_allclose(relabelled, episode["reward"][:, 0], atol=1e-5, rtol=0)
                episodes += 1
    assert episodes >= 100


@pytest.mark.parametrize("task", ["cartpole_swingup", "point_mass_maze_reach_top_left", "walker_walk"])
def test_equals_exorls_own_loop_if_wanted(task):
    """Return dm_control's rewards of the states with a control of zero."""
    physics, action, _ = _roll_out(task, steps=30)
    if task.startswith("point_mass_maze"):
        physics[:, :2] = -0.15, 0.155  # at the goal, which random actions do not reach
    simulation = load_simulation(task)
    rewards = [0.0]
    for state in physics[1:]:
        with simulation.physics.reset_context():
            simulation.physics.set_state(state)
        rewards.append(float(simulation.reward(task, simulation.sensors(), simulation.physics.control())))
    compatible = relabel(task, physics, np.zeros_like(action))
    np.testing.assert_allclose(compatible, rewards, atol=1e-7)
    if task != "walker_walk":
        assert compatible.sum() > relabel(task, physics, action).sum()


def test_the_control_counts_in_the_dense_cartpole_reward():
    physics = np.array([[0, 0, 0, 0]] * 4, float)  # at rest, upright, in the middle: everything else is perfect
    action = np.array([[0.7], [0], [0.5], [1]], np.float32)
    np.testing.assert_allclose(relabel("cartpole_balance", physics, action), [0, 1, 0.95, 0.8], atol=1e-6)
    np.testing.assert_array_equal(relabel("cartpole_balance_sparse", physics, action), [0, 1, 1, 1])


@pytest.mark.parametrize("task", DOMAINS["point_mass_maze"].tasks)
def test_the_mazes_rewards_equal_those_of_its_way_to_the_goal(task):
    tasks = DOMAINS["point_mass_maze"].tasks
    preferred = np.array([*(task == np.array(tasks)), 0.0])
    episode = record_episode(load_simulation(task), recipe_of(task), preferred, seed=0, index=0, noise_limit=0.5)
    environment = make(task, start_seed(0, 0))
    environment.reset()
    rewards = [0.0, *(environment.step(action)[1] for action in episode["action"][1:])]
    assert sum(rewards) > 200
    np.testing.assert_allclose(relabel(task, episode["physics"], episode["action"]), rewards, atol=1e-7)
    for column, other in enumerate(tasks):
        relabelled = relabel(other, episode["physics"], episode["action"])
        np.testing.assert_allclose(relabelled, episode["reward"][:, column], atol=1e-7)


def test_the_control_counts_in_the_mazes_reward():
    physics = np.array([[0.15, -0.15, 0, 0]] * 4)  # at the goal
    action = np.array([[1, 1], [0, 0], [0.5, 0], [-1, 1]], np.float32)
    rewards = relabel("point_mass_maze_reach_bottom_right", physics, action)
    np.testing.assert_allclose(rewards, [0, 1, (4 + 0.875) / 5, 0.8], atol=1e-6)


def test_the_order_of_states_does_not_matter():
    physics, action, _ = _roll_out("walker_run", steps=50)
    order = np.random.RandomState(0).permutation(np.arange(1, 51))
    shuffled = np.concatenate([[0], order])
    np.testing.assert_array_equal(
        relabel("walker_run", physics, action)[shuffled], relabel("walker_run", physics[shuffled], action[shuffled])
    )


def test_read_only_arrays_are_accepted():
    physics, action, _ = _roll_out("cheetah_run", steps=10)
    kept = physics.copy()
    physics.flags.writeable = action.flags.writeable = False
    relabel_all("cheetah", physics, action)
    np.testing.assert_array_equal(physics, kept)


def test_threads_do_not_share_a_state():
    episodes = [_roll_out("walker_walk", seed=seed)[:2] for seed in range(4)] * 4
    alone = [relabel("walker_walk", *episode) for episode in episodes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda episode: relabel("walker_walk", *episode), episodes))
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("task", "physics", "action", "message"),
    [
        ("walker_walk", (5, 17), (5, 6), r"physics has shape \(5, 17\), but walker needs \(time, 18\)"),
        ("walker_walk", (5, 18), (5, 1), r"action has shape \(5, 1\), but walker needs \(time, 6\)"),
        ("jaco_reach_top_left", (18,), (5, 9), r"physics has shape \(18,\), but jaco needs \(time, 18\)"),
        ("cartpole_balance", (5, 4), (6, 1), "physics has 5 rows and action 6"),
        ("cartpole_balance", (0, 4), (0, 1), "physics has 0 rows"),
        ("walker_wlak", (5, 18), (5, 6), "did you mean walker_walk"),
    ],
)
def test_wrong_shapes_and_names(task, physics, action, message):
    with pytest.raises(UserError, match=message):
        relabel(task, np.zeros(physics), np.zeros(action, np.float32))


@pytest.mark.parametrize("name", ["physics", "action"])
def test_rows_that_are_not_finite_are_named(name):
    arrays = {"physics": np.zeros((5, 4)), "action": np.zeros((5, 1), np.float32)}
    arrays[name][3, 0] = np.nan
    with pytest.raises(UserError, match=f"{name} is not finite in row 3"):
        relabel_all("cartpole", **arrays)


def test_unknown_domain():
    with pytest.raises(UserError, match="unknown domain 'wlaker'; did you mean walker"):
        relabel_all("wlaker", np.zeros((5, 18)), np.zeros((5, 6), np.float32))
