from functools import partial

import numpy as np
import pytest
from dm_control import suite

from ringrl.collect.controllers import recipe_of
from ringrl.collect.record import coloured_noise, record_episode, start_seed
from ringrl.collect.scripted import CrossEntropySearch, _return
from ringrl.data import relabel
from ringrl.envs import DOMAINS, TASKS, domain_of, load_simulation, make

slow = partial(pytest.param, marks=pytest.mark.slow)
FIRST = {domain.tasks[0] for domain in DOMAINS.values()}


def _record(task: str) -> dict[str, np.ndarray]:
    recipe = recipe_of(task)
    return record_episode(load_simulation(task), recipe, recipe.mean, seed=3, index=0, noise_limit=0.2)


# The tasks of a domain differ in rewards: data/test_relabel.py.
@pytest.mark.parametrize("task", [task if task in FIRST else slow(task) for task in TASKS])
def test_replayed_actions_give_the_recorded_episode(task):
    episode = _record(task)
    env = make(task, start_seed(3, 0))
    observation, info = env.reset()
    replayed = [(observation, info["physics"], 0.0)]
    for action in episode["action"][1:]:
        observation, reward, _, truncated, info = env.step(action)
        replayed.append((observation, info["physics"], reward))
    assert truncated
    observations, physics, rewards = (np.stack(column) for column in zip(*replayed, strict=True))
    np.testing.assert_allclose(episode["observation"], observations, rtol=0, atol=1e-6)
    np.testing.assert_allclose(episode["physics"], physics, rtol=0, atol=1e-6)
    column = domain_of(task).recorded_tasks(task).index(task)
    np.testing.assert_allclose(episode["reward"][:, column], rewards, rtol=0, atol=1e-6)
    np.testing.assert_allclose(relabel(task, episode["physics"], episode["action"]), rewards, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["walker_walk", "cheetah_run", "cartpole_swingup"])
def test_dm_control_gives_the_recorded_episode(task):
    episode = _record(task)
    env = suite.load(*task.split("_"), task_kwargs={"random": np.random.RandomState(start_seed(3, 0))})
    env.reset()
    np.testing.assert_array_equal(env.physics.get_state(), episode["physics"][0])
    for row, action in enumerate(episode["action"][1:], start=1):
        step = env.step(action)
        np.testing.assert_allclose(env.physics.get_state(), episode["physics"][row], rtol=0, atol=1e-6)
        assert step.reward == pytest.approx(episode["reward"][row, 0], abs=1e-6)
    flat = np.concatenate([np.ravel(array) for array in step.observation.values()])
    np.testing.assert_allclose(flat, episode["observation"][-1], rtol=0, atol=1e-5)


def test_an_episode_does_not_depend_on_earlier_episodes():
    task = "jaco_reach_top_left"
    recipe, simulation = recipe_of(task), load_simulation(task)
    settings = {"seed": 3, "noise_limit": 0.2}
    record_episode(simulation, recipe, recipe.mean, index=0, **settings)
    second = record_episode(simulation, recipe, recipe.mean, index=1, **settings)
    alone = record_episode(load_simulation(task), recipe, recipe.mean, index=1, **settings)
    for key, array in alone.items():
        np.testing.assert_array_equal(second[key], array)


@pytest.mark.parametrize("task", [task if task in FIRST else slow(task) for task in TASKS if task.startswith("jaco")])
def test_the_arm_reaches_the_preferred_target(task):
    recipe, simulation = recipe_of(task), load_simulation(task)
    returns = []
    for preferred in range(4):
        parameters = np.array([*(preferred == np.arange(4)), 1.0, 0.0])
        episode = record_episode(simulation, recipe, parameters, seed=0, index=0, noise_limit=0)
        returns.append(episode["reward"].sum())
    assert returns[0] > 150  # the task's own target comes first
    assert max(returns[1:]) < 0.5 * returns[0]


@pytest.mark.parametrize("preferred", range(4))
def test_the_mass_reaches_the_preferred_goal(preferred):
    task = domain_of("point_mass_maze_reach_top_left").tasks[preferred]
    recipe, simulation = recipe_of(task), load_simulation(task)
    parameters = np.array([*(preferred == np.arange(4)), 0.0])
    returns = record_episode(simulation, recipe, parameters, seed=0, index=0, noise_limit=0)["reward"].sum(axis=0)
    assert returns[preferred] > 400
    assert np.delete(returns, preferred).max() < 0.2 * returns[preferred]


@pytest.mark.parametrize("place", ["-0.2,0.05", "0.1,0.1", "-0.1,-0.1", "0.1,-0.1"])
def test_the_mass_takes_the_way_to_a_goal_of_its_own(place):
    task, tasks = f"point_mass_maze_reach({place})", domain_of("point_mass_maze_reach_top_left").tasks
    episode = record_episode(load_simulation(task), recipe_of(task), np.zeros(5), seed=0, index=0, noise_limit=0)
    returns = [relabel(one, episode["physics"], episode["action"]).sum() for one in (task, *tasks)]
    assert returns[0] > 400
    assert [_return(one, episode) for one in (task, *tasks)] == pytest.approx(returns), "what the search maximises"


@pytest.mark.parametrize(
    ("task", "least"),
    [("cartpole_swingup", 800), slow("cartpole_swingup_sparse", 600), ("cartpole_balance", 950),
     slow("cartpole_balance_sparse", 950)],
)  # fmt: skip
def test_good_gains_solve_cartpole_and_noise_lowers_the_return(task, least):
    recipe, simulation = recipe_of(task), load_simulation(task)

    def mean_return(noise_limit: float) -> float:
        settings = {"parameters": np.zeros(8), "seed": 0, "noise_limit": noise_limit}
        episodes = [record_episode(simulation, recipe, index=index, **settings) for index in range(4)]
        return np.mean([episode["reward"].sum() for episode in episodes])

    assert mean_return(0) > least
    assert mean_return(1) < 0.8 * mean_return(0)


def test_recipes_are_consistent():
    for task in TASKS:
        recipe = recipe_of(task)
        assert recipe.mean.shape == recipe.deviation.shape
        assert (recipe.deviation > 0).all()
        assert all(0 <= limit <= 1 for limit in recipe.noise)
    assert len(recipe_of("walker_walk").mean) == 1 + 3 * domain_of("walker_walk").action_size


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_has_the_requested_spectrum_and_unit_variance(exponent):
    noise = coloured_noise(np.random.default_rng(0), 1000, 300, exponent)
    assert noise.shape == (1000, 300)
    assert np.abs(noise.mean(axis=0)).max() < 1e-9
    assert noise.var() == pytest.approx(1, abs=0.1)
    power = (np.abs(np.fft.rfft(noise, axis=0)) ** 2).mean(axis=1)[1:-1]
    slope = np.polyfit(np.log(np.arange(1, len(power) + 1)), np.log(power), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.05)


def test_the_search_finds_a_maximum():
    top = np.array([1.0, -0.5, 0.3])
    search = CrossEntropySearch(np.zeros(3), np.ones(3))
    for generation in range(25):
        tried = search.propose(np.random.default_rng(generation), 20)
        search.learn(tried, -np.square(tried - top).sum(axis=1))
    np.testing.assert_allclose(search.mean, top, atol=0.1)
    np.testing.assert_allclose(search.deviation, 0.1)  # the lower bound


def test_equal_returns_do_not_change_the_search():
    search = CrossEntropySearch(np.zeros(3), np.ones(3))
    search.learn(search.propose(np.random.default_rng(0), 10), np.zeros(10))
    np.testing.assert_array_equal(search.mean, np.zeros(3))
    np.testing.assert_array_equal(search.deviation, np.ones(3))
