import threading

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from ringrl.envs import DOMAINS, TASKS, domain_of, make, make_vec
from ringrl.errors import UserError

_ONE_PER_DOMAIN = [domain.tasks[-1] for domain in DOMAINS.values()]


def _actions(task, seed, steps):
    return np.random.RandomState(seed).uniform(-1, 1, (steps, domain_of(task).action_size)).astype(np.float32)


def _assert_equal_to_singles(task, steps, episodes, seed, num_envs=2, threads=2):
    """The vector's results equal the single environments', rewards up to the last digit."""
    vector = make_vec(task, num_envs, seed, threads=threads)
    singles = [make(task, seed + index) for index in range(num_envs)]
    generator = np.random.RandomState(seed)
    for _ in range(episodes):
        observations, infos = vector.reset()
        expected = [single.reset() for single in singles]
        np.testing.assert_array_equal(observations, [observation for observation, _ in expected])
        np.testing.assert_array_equal(infos["physics"], [info["physics"] for _, info in expected])
        for step in range(1, steps + 1):
            actions = generator.uniform(-1.2, 1.2, vector.action_space.shape).astype(np.float32)
            observations, rewards, terminated, truncated, infos = vector.step(actions)
            expected = [single.step(action) for single, action in zip(singles, actions, strict=True)]
            np.testing.assert_array_equal(observations, [row[0] for row in expected])
            np.testing.assert_allclose(rewards, [row[1] for row in expected], rtol=1e-13, atol=1e-30)
            np.testing.assert_array_equal(infos["physics"], [row[4]["physics"] for row in expected])
            assert not terminated.any()
            assert truncated.tolist() == [row[3] for row in expected] == [step == vector.domain.episode_length] * 2
    vector.close()


# The tasks of a domain differ in rewards: data/test_relabel.py.
@pytest.mark.parametrize(
    "task", [task if task in _ONE_PER_DOMAIN else pytest.param(task, marks=pytest.mark.slow) for task in TASKS]
)
def test_every_task_equals_the_single_environment(task):
    _assert_equal_to_singles(task, steps=12, episodes=2, seed=TASKS.index(task))


@pytest.mark.parametrize("task", _ONE_PER_DOMAIN)
def test_whole_episodes_equal_the_single_environment(task):
    _assert_equal_to_singles(task, domain_of(task).episode_length, episodes=1, seed=40)


@pytest.mark.parametrize("task", _ONE_PER_DOMAIN)
def test_episodes_are_bit_identical_for_any_batch_and_threads(task):
    steps = 40

    def episode(seeds, threads):
        vector = make_vec(task, len(seeds), seeds, threads=threads)
        observations, infos = vector.reset()
        rows = [(observations, np.zeros(len(seeds)), infos["physics"])]
        for actions in np.stack([_actions(task, seed, steps) for seed in seeds], axis=1):
            observations, rewards, _, _, infos = vector.step(actions)
            rows.append((observations, rewards, infos["physics"]))
        vector.close()
        place = seeds.index(7)
        return [np.stack([part[place] for part in column]).tobytes() for column in zip(*rows, strict=True)]

    alone = episode([7], threads=1)
    assert episode([3, 1, 4, 9, 7, 5, 2], threads=3) == alone
    assert episode([7, 8], threads=1) == alone
    assert episode([8, 8, 7], threads=8) == alone


def test_behaves_like_gymnasiums_vector():
    task = "cartpole_swingup"
    ours = make_vec(task, 3, seed=0, threads=2)
    theirs = SyncVectorEnv([lambda: make(task)] * 3, autoreset_mode=AutoresetMode.DISABLED)
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.num_envs == theirs.num_envs
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"]

    def same(one, other, rows):
        for a, b in zip(one[:-1], other[:-1], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a[rows], b[rows], rtol=1e-13)
        assert one[-1].keys() == other[-1].keys() == {"physics", "_physics"}
        np.testing.assert_array_equal(one[-1]["_physics"], other[-1]["_physics"])
        np.testing.assert_array_equal(one[-1]["physics"][rows], other[-1]["physics"][rows])

    for seed in (5, [9, 2, 9], None, [None, 3, None]):
        same(ours.reset(seed=seed), theirs.reset(seed=seed), slice(None))
        for actions in np.random.RandomState(0).uniform(-1, 1, (5, 3, 1)).astype(np.float32):
            same(ours.step(actions), theirs.step(actions), slice(None))
    mask = np.array([True, False, True])
    ours_reset = ours.reset(seed=[1, 2, 3], options={"reset_mask": mask})
    theirs_reset = theirs.reset(seed=[1, 2, 3], options={"reset_mask": mask.copy()})
    np.testing.assert_array_equal(ours_reset[0], theirs_reset[0])
    same(ours_reset, theirs_reset, mask)
    same(ours.reset(), theirs.reset(), slice(None))  # the seed of the environment that was not reset had no effect
    ours.close()
    theirs.close()


def test_gymnasiums_wrapper_counts_episodes():
    vector = RecordEpisodeStatistics(make_vec("point_mass_maze_reach_top_left", 2, seed=0))
    length = domain_of("point_mass_maze_reach_top_left").episode_length
    for _ in range(2):
        vector.reset(options={"reset_mask": np.ones(2, bool)})
        returns = np.zeros(2)
        for _ in range(length):
            _, rewards, _, truncated, infos = vector.step(np.full((2, 2), 0.3, np.float32))
            returns += rewards
        assert truncated.all()
        np.testing.assert_allclose(infos["episode"]["r"], returns)
        np.testing.assert_array_equal(infos["episode"]["l"], [length, length])
    vector.close()


def test_a_step_needs_an_episode():
    vector = make_vec("cartpole_balance", 2, seed=0)
    action = np.zeros((2, 1), np.float32)
    with pytest.raises(gymnasium.error.ResetNeeded):
        vector.step(action)
    vector.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gymnasium.error.ResetNeeded):
        vector.step(action)
    vector.reset()
    for _ in range(vector.domain.episode_length):
        *_, truncated, _ = vector.step(action)
    assert truncated.all()
    with pytest.raises(gymnasium.error.ResetNeeded):
        vector.step(action)
    vector.close()


def test_seeds():
    def starts(vector):
        return vector.reset()[1]["physics"]

    from_one, from_three = make_vec("cartpole_swingup", 3, np.int64(4)), make_vec("cartpole_swingup", 3, [4, 5, 6])
    first = starts(from_one)
    np.testing.assert_array_equal(first, starts(from_three))
    second = starts(from_one)
    assert not (first == second).any()
    np.testing.assert_array_equal(from_one.reset(seed=4)[1]["physics"], first)
    mixed = from_one.reset(seed=[None, 100, 6])[1]["physics"]  # the first stream continues
    np.testing.assert_array_equal(mixed[[0, 2]], [second[0], first[2]])
    assert not (mixed[1] == second[1]).any()
    unseeded = [starts(make_vec("cartpole_swingup", 2)) for _ in range(2)]
    assert not (unseeded[0] == unseeded[1]).any()


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, "the seed is -1"),
        (2**32 - 1, "the seed is 4294967296"),  # the second environment's
        ([1, -2], "the seed is -2"),
        ("three", "the seed is 'three'"),
        (1.5, "the seed is 1.5"),
        ([1, 2, 3], "3 seeds for 2 environments"),
    ],
)
def test_bad_seeds_change_nothing(seed, message):
    with pytest.raises(UserError, match=message):
        make_vec("cartpole_balance", 2, seed)
    vector = make_vec("cartpole_balance", 2, 0)
    with pytest.raises(UserError, match=message):
        vector.reset(seed=seed)
    np.testing.assert_array_equal(vector.reset()[0], make_vec("cartpole_balance", 2, 0).reset()[0])


def test_bad_arguments():
    with pytest.raises(UserError, match="did you mean walker_walk"):
        make_vec("walker_wlak", 2, 0)
    with pytest.raises(UserError, match="num_envs is 0"):
        make_vec("cartpole_swingup", 0, 0)
    with pytest.raises(UserError, match="threads is 0"):
        make_vec("cartpole_swingup", 2, 0, threads=0)
    vector = make_vec("walker_walk", 2, 0)
    for mask in ([True], [1, 0]):
        with pytest.raises(UserError, match="reset_mask"):
            vector.reset(options={"reset_mask": np.array(mask)})
    vector.reset()
    with pytest.raises(UserError, match=r"walker_walk: the actions have shape \(6,\), expected \(2, 6\)"):
        vector.step(np.zeros(6))
    actions = np.zeros((2, 6))
    actions[1, 3] = np.nan
    with pytest.raises(UserError, match="walker_walk: the action of step 0 of environment 1 is not finite"):
        vector.step(actions)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_unstable_simulation_affects_no_other_and_is_reset(threads):
    def play(vector, breaks):
        rows = [(*vector.reset(seed=0), None)]
        for step, actions in enumerate(np.random.RandomState(0).uniform(-1, 1, (6, 4, 6)).astype(np.float32)):
            if breaks and step == 2:
                vector._datas[2].qpos[:] = 1e12
            observations, rewards, terminated, truncated, info = vector.step(actions)
            assert not terminated.any()
            assert not truncated.any()
            rows.append((observations, info, rewards))
        return rows

    vector = make_vec("cheetah_run", 4, seed=0, threads=threads)
    whole, broken, again = (play(vector, breaks) for breaks in (False, True, False))
    fine = [0, 1, 3]
    for step, ((x, info, reward), (y, other, earned)) in enumerate(zip(whole, broken, strict=True)):
        for a, b in ((x, y), (info["physics"], other["physics"]), *([(reward, earned)] if step else [])):
            np.testing.assert_array_equal(a[fine], b[fine])
            assert np.isnan(b[2]).all() == (step > 2)
        assert "unstable" not in info
        assert other.get("unstable", np.zeros(4, bool)).tolist() == [False, False, step > 2, False]
    for (x, *_), (y, *_) in zip(whole, again, strict=True):
        np.testing.assert_array_equal(x, y)
    vector.close()


def test_returned_arrays_do_not_change():
    vector = make_vec("cartpole_swingup", 2, seed=0)
    action = np.ones((2, 1), np.float32)
    observation, info = vector.reset()
    first = [observation, info["physics"]]
    second = [part for part in vector.step(action) if isinstance(part, np.ndarray)]
    kept = [part.copy() for part in first + second]
    for _ in range(3):
        vector.step(action)
    vector.reset()
    for part, copy in zip(first + second, kept, strict=True):
        np.testing.assert_array_equal(part, copy)


def test_closing_ends_the_threads():
    def helpers():
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("ringrl-cartpole_balance")]

    vector = make_vec("cartpole_balance", 6, seed=0, threads=3)
    vector.reset()
    vector.step(np.zeros((6, 1), np.float32))
    assert 1 <= len(helpers()) <= 2  # the caller is the third
    vector.close()
    vector.close()
    assert helpers() == []
    for use in (vector.reset, lambda: vector.step(np.zeros((6, 1), np.float32))):
        with pytest.raises(gymnasium.error.ClosedEnvironmentError):
            use()


@pytest.mark.parametrize(("worth", "threads"), [(0.0, True), (np.inf, False)])
def test_cheap_physics_is_stepped_by_one_thread(worth, threads, monkeypatch):
    """Whether the trial steps find the physics cheap changes the threads, and no bit of the results."""
    monkeypatch.setattr("ringrl.envs.vector.WORTH_A_THREAD", worth)
    monkeypatch.setattr("ringrl.envs.vector.available_cores", lambda: 3)
    vector, alone = (make_vec("cheetah_run", 6, 0, threads=count) for count in (None, 1))
    for environments in (vector, alone):
        environments.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (5, *vector.action_space.shape)):
        found, expected = vector.step(action), alone.step(action)
        np.testing.assert_array_equal(found[4]["physics"], expected[4]["physics"])
    assert any(one.name.startswith("ringrl-cheetah_run") for one in threading.enumerate()) == threads
    vector.close()
