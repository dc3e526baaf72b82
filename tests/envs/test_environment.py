import copy
import pickle

import gymnasium
import numpy as np
import pytest

from ringrl.envs import DOMAINS, TASKS, load_simulation, make, make_vec
from ringrl.envs.vector import ExoRLVectorEnv
from ringrl.errors import UserError

_FIRST_TASKS = [domain.tasks[0] for domain in DOMAINS.values()]


def _episode(environment, steps=20, **reset):
    """Return observations, rewards and physics states of an episode under fixed random actions."""
    generator = np.random.RandomState(5)
    observation, info = environment.reset(**reset)
    rows = [(observation, 0.0, info["physics"])]
    for _ in range(steps):
        action = generator.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
        observation, reward, _, _, info = environment.step(action)
        rows.append((observation, reward, info["physics"]))
    return [np.stack(column) for column in zip(*rows, strict=True)]


def _same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_spaces_types_and_sizes(task):
    environment = make(task, 0)
    domain = environment.domain
    assert environment.task == task
    observation, info = environment.reset()
    action = environment.action_space.sample()
    for _ in range(2):
        assert observation.shape == (domain.observation_size,)
        assert observation.dtype == np.float32
        assert info["physics"].shape == (domain.physics_size,)
        assert info["physics"].dtype == np.float64
        observation, reward, terminated, truncated, info = environment.step(action)
        assert type(reward) is float
        assert 0 <= reward <= 1
        assert terminated is False
        assert truncated is False
    assert action.shape == (domain.action_size,)
    np.testing.assert_array_equal(environment.action_space.low, -1)
    np.testing.assert_array_equal(environment.action_space.high, 1)


@pytest.mark.parametrize("task", _FIRST_TASKS)
def test_seeds(task):
    environment = make(task, 3)
    first, second = _episode(environment), _episode(environment)
    assert not _same(first, second)  # the stream of starts continues
    again = make(task, 3)
    assert _same(first, _episode(again))
    assert _same(second, _episode(again))
    assert _same(first, _episode(again, seed=3))  # a seeded reset restarts the stream
    assert _same(second, _episode(again))
    assert not _same(first, _episode(again, seed=4))
    assert not _same(_episode(make(task)), _episode(make(task)))  # no seed: a different one each time


@pytest.mark.parametrize("task", _FIRST_TASKS)
def test_episodes_are_truncated_and_never_terminate(task):
    environment = make(task, 0)
    length = environment.domain.episode_length
    action = np.ones(environment.domain.action_size, np.float32)
    for _ in range(2):
        environment.reset()
        ends = [environment.step(action)[2:4] for _ in range(length)]
        assert ends == [(False, False)] * (length - 1) + [(False, True)]
        with pytest.raises(gymnasium.error.ResetNeeded):
            environment.step(action)


def test_a_first_step_needs_a_reset():
    with pytest.raises(gymnasium.error.ResetNeeded):
        make("cartpole_balance", 0).step(np.zeros(1, np.float32))


@pytest.mark.parametrize("task", _FIRST_TASKS)
def test_physics_state_is_a_copy_that_can_be_set_again(task):
    environment = make(task, 0)
    _, info = environment.reset()
    before = info["physics"]
    kept = before.copy()
    _, _, _, _, info = environment.step(np.ones(environment.domain.action_size, np.float32))
    np.testing.assert_array_equal(before, kept)
    assert not np.array_equal(before, info["physics"])

    simulation = load_simulation(task)
    simulation.set_physics_state(info["physics"])
    np.testing.assert_array_equal(simulation.physics_state(), info["physics"])


def test_physics_is_positions_then_velocities():
    environment = make("cartpole_swingup", 0)
    observation, info = environment.reset()
    position, angle, *velocities = info["physics"]
    expected = [position, np.cos(angle), np.sin(angle), *velocities]
    np.testing.assert_allclose(observation, expected, rtol=1e-6, atol=1e-6)


def test_actions_are_clipped_and_checked():
    one, other = make("walker_walk", 0), make("walker_walk", 0)
    one.reset()
    other.reset()
    np.testing.assert_array_equal(one.step(np.full(6, 9.0))[0], other.step(np.ones(6))[0])
    with pytest.raises(UserError, match=r"walker_walk: the action has shape \(5,\), expected \(6,\)"):
        one.step(np.zeros(5))
    with pytest.raises(UserError, match="walker_walk: the action of step 1 is not finite"):
        one.step(np.array([0, 0, np.nan, 0, 0, 0]))


def test_an_unstable_simulation_raises_until_its_reset():
    from dm_control.rl.control import PhysicsError

    simulation = load_simulation("cheetah_run")
    simulation.reset(np.random.RandomState(0))
    simulation.set_physics_state(np.full(18, 1e12))
    with pytest.raises(PhysicsError, match=r"cheetah_run: the simulation is unstable \(mjWARN_BAD"):
        simulation.step(np.zeros(6))
    simulation.reset(np.random.RandomState(0))
    simulation.step(np.zeros(6))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("made", [make, lambda task, seed: make_vec(task, 2, seed)])
@pytest.mark.parametrize("task", ["walker_walk", "jaco_reach_top_left"])
def test_a_copy_continues_the_episode_and_notices_an_unstable_simulation(task, made, copied):
    environment = made(task, seed=0)
    environment.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (6, *environment.action_space.shape))
    for action in actions[:3]:
        environment.step(action)
    other = copied(environment)
    for action in actions[3:]:
        one, two = environment.step(action), other.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_array_equal(environment.reset()[0], other.reset()[0])
    from dm_control.rl.control import PhysicsError

    if isinstance(other, ExoRLVectorEnv):
        other._datas[1].qvel[:] = 1e15
        assert other.step(actions[0])[4]["unstable"].tolist() == [False, True]
        other.close()
        environment.close()
    else:
        other._simulation.data.qvel[:] = 1e15
        with pytest.raises(PhysicsError, match="unstable"):
            other.step(actions[0])


@pytest.mark.parametrize("seed", [-1, 2**32, "three"])
def test_bad_seeds(seed):
    with pytest.raises(UserError, match="the seed is"):
        make("cartpole_balance", seed)
    with pytest.raises(UserError, match="the seed is"):
        make("cartpole_balance", 0).reset(seed=seed)


def test_unknown_task():
    with pytest.raises(UserError, match="did you mean walker_walk"):
        make("walker_wlak")


@pytest.mark.parametrize("domain", ["walker", "cheetah", "cartpole", "jaco"])
def test_recorded_transitions_are_reproduced(domain, recorded_episodes):
    """Recorded states give the recorded observations, and recorded actions the recorded next states."""
    import mujoco

    task, episodes = recorded_episodes(domain)
    simulation = load_simulation(task)
    simulation.reset(np.random.RandomState(0))
    # Jaco's torques depend on the forces of the step before, which are not part of the state.
    of_state = np.delete(np.arange(simulation.domain.observation_size), slice(12, 18) if domain == "jaco" else [])
    for episode in episodes:
        for row in range(0, len(episode["action"]) - 1, 25):
            simulation.set_physics_state(episode["physics"][row])
            simulation.data.qacc_warmstart[:] = 0
            mujoco.mj_forward(simulation.model, simulation.data)
            np.testing.assert_array_equal(simulation.observation()[of_state], episode["observation"][row][of_state])
            action = episode["action"][row + 1]
            simulation.step(action)
            np.testing.assert_allclose(simulation.physics_state(), episode["physics"][row + 1], atol=1e-5)
            np.testing.assert_allclose(simulation.observation(), episode["observation"][row + 1], atol=1e-4)
            reward = simulation.reward(task, simulation.sensors(), action)
            np.testing.assert_allclose(reward, episode["reward"][row + 1, 0], atol=1e-6)
