from pathlib import Path

import jax
import numpy as np
import pytest

from ringrl.config import ContextConfig
from ringrl.context import Context
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

TASK = "cartpole_swingup"
REWARDS = [[0.5, 0.25, 0.25], [0.0, 0.0, 0.5], [1.0, 1.0, 0.0], [0.0, 0.25, 0.0]]  # returns 1, .5, 2, .25
LENGTH = 3


def golden_episode(random_episode, number: int, rewards: list[float]) -> dict[str, np.ndarray]:
    """Return an episode with observation and action 100 * number + t in row t. Action and reward of row 0 are 0."""
    episode = random_episode("cartpole", len(rewards), number)
    rows = 100 * number + np.arange(len(rewards) + 1, dtype=np.float32)[:, None]
    episode["observation"][:] = rows
    episode["action"][:] = np.where(rows % 100 == 0, 0, rows)
    episode[f"reward/{TASK}"] = np.array([0, *rewards], np.float32)
    return episode


@pytest.fixture
def golden(tmp_path: Path, random_episode, write_store) -> EpisodeStore:
    """A store of four hand-written episodes of three steps."""
    episodes = [golden_episode(random_episode, number, rewards) for number, rewards in enumerate(REWARDS)]
    return write_store(tmp_path / "golden.h5", "cartpole", episodes)


def sampler(store: EpisodeStore, batch_size: int = 1, seed: int = 0, **config: object) -> ContextSampler:
    identity = Normalisation(np.zeros(5), np.ones(5), LENGTH)
    return ContextSampler(store, TASK, ContextConfig(**config), identity, batch_size, seed)


def episode_numbers(batch: Context) -> np.ndarray:
    """Return the episode numbers of the trajectories of each context (batch, trajectories)."""
    return (np.asarray(batch.observation)[:, ::LENGTH, 0] // 100).astype(int)


def test_a_whole_context_written_by_hand(golden: EpisodeStore) -> None:
    batch = sampler(golden, trajectories=4).batch(0)
    expected = {
        "reward": [[0, 0.25, 0, 0, 0, 0.5, 0.5, 0.25, 0.25, 1, 1, 0]],
        # ascending by return; every return-to-go starts at the best return, 2, divided by the episode length
        "return_to_go": np.array([[2, 2, 1.75, 2, 2, 2, 2, 1.5, 1.25, 2, 1, 0]]) / LENGTH,
        "completion": [[0] * 11 + [1]],
        "timestep": [[0, 1, 2] * 4],
        "trajectory": [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3],
    }
    expected |= {"position": [list(range(12))], "weight": [[1] * 12]}
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(batch, name), values, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(batch.observation[0, :, 0], [300, 301, 302, 100, 101, 102, 0, 1, 2, 200, 201, 202])
    # the action of a step is on the next row of ExoRL's format
    np.testing.assert_array_equal(batch.action[0, :, 0], [301, 302, 303, 101, 102, 103, 1, 2, 3, 201, 202, 203])
    # the previous step of a first step is the last one of the trajectory before
    np.testing.assert_array_equal(batch.previous.action[0, :, 0], [0, 301, 302, 303, 101, 102, 103, 1, 2, 3, 201, 202])
    np.testing.assert_array_equal(batch.previous.reward, [[0, 0, 0.25, 0, 0, 0, 0.5, 0.5, 0.25, 0.25, 1, 1]])
    np.testing.assert_array_equal(batch.previous.completion, [[0] * 12])
    for x in jax.tree.leaves(batch):
        assert x.dtype == (np.int32 if x.dtype.kind == "i" else np.float32)


def test_own_targets_start_from_each_trajectorys_return(golden: EpisodeStore) -> None:
    batch = sampler(golden, trajectories=4, target="own").batch(0)
    np.testing.assert_allclose(batch.return_to_go[0, ::LENGTH] * LENGTH, [0.25, 0.5, 1, 2])
    np.testing.assert_array_equal(batch.completion[0], [0, 0, 1] * 4)
    np.testing.assert_array_equal(batch.previous.completion[0], [0, 0, 0] + [1, 0, 0] * 3)


def test_without_a_target_returns_to_go_and_completions_are_zero(golden: EpisodeStore) -> None:
    """Algorithm distillation orders episodes by collection. Other arrays of the context are unchanged."""
    history = {"trajectories": 3, "order": "history", "sampling": "history_window"}
    batch = sampler(golden, target="none", **history).batch(0)
    for zero in (batch.return_to_go, batch.completion, batch.previous.completion):
        np.testing.assert_array_equal(zero, np.zeros((1, 9), np.float32))
    asked = sampler(golden, **history).batch(0)
    assert asked.return_to_go.any()
    assert asked.completion.any()
    for name in set(Context._fields) - {"return_to_go", "completion", "previous"}:
        np.testing.assert_array_equal(getattr(batch, name), getattr(asked, name), err_msg=name)
    np.testing.assert_array_equal(np.diff(episode_numbers(batch)), [[1, 1]])
    assert batch.reward.any()


def test_shorter_contexts_are_padded_at_the_end(tmp_path: Path, random_episode, write_store) -> None:
    """One context of episodes of 3, 1 and 2 steps has six steps, padded to three times the longest episode."""
    rewards = [[0.5, 0.25, 0.25], [0.5], [0.0, 2.0]]  # returns 1, .5, 2
    store = write_store(
        tmp_path / "mixed.h5", "cartpole", [golden_episode(random_episode, *x) for x in enumerate(rewards)]
    )
    made = sampler(store, trajectories=3)
    assert made.time == 9
    batch = made.batch(0)
    expected = {
        "reward": [0.5, 0.5, 0.25, 0.25, 0, 2, 0, 0, 0],
        "return_to_go": np.array([2, 2, 1.5, 1.25, 2, 2, 0, 0, 0]) / LENGTH,
        "completion": [0, 0, 0, 0, 0, 1, 0, 0, 0],
        "timestep": [0, 0, 1, 2, 0, 1, 0, 0, 0],
        "trajectory": [0, 1, 1, 1, 2, 2, 0, 0, 0],
        "position": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "weight": [1, 1, 1, 1, 1, 1, 0, 0, 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(batch, name), [values], rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(batch.observation[0, :, 0], [100, 0, 1, 2, 200, 201, 0, 0, 0])
    np.testing.assert_array_equal(batch.action[0, :, 0], [101, 1, 2, 3, 201, 202, 0, 0, 0])
    np.testing.assert_array_equal(batch.previous.action[0, :, 0], [0, 101, 1, 2, 3, 201, 0, 0, 0])
    np.testing.assert_array_equal(batch.previous.reward, [[0, 0.5, 0.5, 0.25, 0.25, 0, 0, 0, 0]])
    own = sampler(store, trajectories=3, target="own").batch(0)
    np.testing.assert_array_equal(own.completion, [[1, 0, 0, 1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(own.previous.completion, [[0, 1, 0, 0, 1, 0, 0, 0, 0]])
    assert {sampler(store, 30, trajectories=n).batch(0).reward.shape for n in (1, 2)} == {(30, 3), (30, 6)}


def test_every_best_trajectory_completes(tmp_path: Path, random_episode, write_store) -> None:
    episodes = [random_episode("cartpole", LENGTH, 0) for _ in range(3)]
    store = write_store(tmp_path / "equal.h5", "cartpole", episodes)
    np.testing.assert_array_equal(sampler(store, trajectories=3).batch(0).completion[0], [0, 0, 1] * 3)


def test_orders(golden: EpisodeStore) -> None:
    for seed in range(5):
        batch = sampler(golden, seed=seed, trajectories=4, order="history").batch(3)
        assert episode_numbers(batch).tolist() == [[0, 1, 2, 3]]
        batch = sampler(golden, seed=seed, trajectories=4, order="descending").batch(3)
        assert episode_numbers(batch).tolist() == [[2, 0, 1, 3]]
    seen = {tuple(episode_numbers(sampler(golden, trajectories=4, order="random").batch(i))[0]) for i in range(100)}
    assert len(seen) > 12


def test_a_batch_is_a_function_of_seed_and_step_alone(golden: EpisodeStore) -> None:
    first, again = sampler(golden, 4, trajectories=2), sampler(golden, 4, trajectories=2)
    later = first.batch(7)
    for step in (3, 0, 7):
        again.batch(step)
    for a, b in zip(jax.tree.leaves(later), jax.tree.leaves(again.batch(7)), strict=True):
        np.testing.assert_array_equal(a, b)
    for seed, step in ((0, 8), (1, 7), (1, 6), (7, 0)):  # other seeds and steps draw other episodes
        other = sampler(golden, 8, seed, trajectories=2).batch(step)
        assert episode_numbers(other).tolist() != episode_numbers(sampler(golden, 8, trajectories=2).batch(7)).tolist()


def test_contexts_hold_distinct_trajectories_and_uniform_sampling_is_uniform(golden: EpisodeStore) -> None:
    numbers = episode_numbers(sampler(golden, 4000, trajectories=2).batch(0))
    assert (numbers[:, 0] != numbers[:, 1]).all()
    np.testing.assert_allclose(np.bincount(numbers.ravel()) / numbers.size, 1 / 4, atol=0.02)


def test_stratified_sampling_draws_ranges_of_return_alike(tmp_path: Path, random_episode, write_store) -> None:
    episodes = []
    for number, value in enumerate([0, 0, 0, 0, 0, 0, 0, 0, 0, 3]):  # nine in the lowest range, one in the highest
        episode = random_episode("cartpole", LENGTH, number)
        episode["observation"][:] = 100 * number
        episode[f"reward/{TASK}"] = np.array([0, value, 0, 0], np.float32)
        episodes.append(episode)
    store = write_store(tmp_path / "skewed.h5", "cartpole", episodes)
    numbers = episode_numbers(sampler(store, 4000, trajectories=1, sampling="return_stratified").batch(0))
    assert (numbers == 9).mean() == pytest.approx(0.5, abs=0.03)


def test_best_fraction_keeps_the_best(golden: EpisodeStore) -> None:
    numbers = episode_numbers(sampler(golden, 100, trajectories=1, best_fraction=0.5).batch(0))
    assert set(numbers.ravel()) == {0, 2}


def test_invalid_settings_are_rejected(golden: EpisodeStore) -> None:
    with pytest.raises(UserError, match=r"no rewards for task walker_walk .domain cartpole.. Tasks: cartpole_balance"):
        ContextSampler(golden, "walker_walk", ContextConfig(), Normalisation.of(golden), 1, 0)
    with pytest.raises(UserError, match=r"context\.trajectories: 5 are more than the 4 eligible"):
        sampler(golden, trajectories=5)
    with pytest.raises(UserError, match=r"3 are more than the 2 .*raise .*context\.max_transitions"):
        sampler(golden, trajectories=3, max_transitions=8)
    with pytest.raises(UserError, match=r"context\.max_transitions: 2 is less than one episode .*\(3 steps\)"):
        sampler(golden, trajectories=1, max_transitions=2)


def test_observations_and_returns_are_normalised(golden: EpisodeStore) -> None:
    scale = Normalisation(np.arange(5.0), np.array([1.0, 2.0, 4.0, 8.0, 16.0]), 60)
    made = ContextSampler(golden, TASK, ContextConfig(trajectories=1, order="history"), scale, 1, 0)
    batch = made.batch(0)
    number = int(batch.observation[0, 0, 0]) // 100
    rows = golden.episode(number)["observation"][:-1]
    np.testing.assert_allclose(batch.observation[0], (rows - np.arange(5)) / [1, 2, 4, 8, 16], rtol=1e-6)
    np.testing.assert_allclose(batch.return_to_go[0, 0], sum(REWARDS[number]) / 60, rtol=1e-6)
    assert batch.reward[0].tolist() == REWARDS[number], "rewards are as the task gives them"


def test_contexts_of_a_batch_differ(golden: EpisodeStore) -> None:
    numbers = episode_numbers(sampler(golden, 30, trajectories=2).batch(0))
    assert len({tuple(row) for row in numbers.tolist()}) == 6, "all pairs of four, ascending"


def test_stratified_sampling_by_hand(tmp_path: Path, random_episode, write_store) -> None:
    """Returns 0, 0, 0, .31, 1 fill three ranges of width .1. Each range is drawn a third of the time."""
    episodes = []
    for number, value in enumerate([0, 0, 0, 0.31, 1]):
        episode = random_episode("cartpole", LENGTH, number)
        episode["observation"][:] = 100 * number
        episode[f"reward/{TASK}"] = np.array([0, value, 0, 0], np.float32)
        episodes.append(episode)
    store = write_store(tmp_path / "ranges.h5", "cartpole", episodes)
    numbers = episode_numbers(sampler(store, 6000, trajectories=1, sampling="return_stratified").batch(0)).ravel()
    np.testing.assert_allclose(np.bincount(numbers) / 6000, [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 3], atol=0.02)
    two = episode_numbers(sampler(store, 500, trajectories=2, sampling="return_stratified").batch(0))
    assert (two[:, 0] != two[:, 1]).all()


def test_stratified_sampling_of_equal_returns_is_uniform(tmp_path: Path, random_episode, write_store) -> None:
    episodes = [random_episode("cartpole", LENGTH, number) for number in range(4)]
    for number, episode in enumerate(episodes):
        episode["observation"][:] = 100 * number
        episode[f"reward/{TASK}"] = np.array([0, 0.5, 0, 0], np.float32)
    store = write_store(tmp_path / "equal.h5", "cartpole", episodes)
    numbers = episode_numbers(sampler(store, 4000, trajectories=1, sampling="return_stratified").batch(0)).ravel()
    np.testing.assert_allclose(np.bincount(numbers) / 4000, 1 / 4, atol=0.03)


def test_a_context_can_hold_all_eligible_episodes(golden: EpisodeStore) -> None:
    for fraction, kept in ((0.25, [2]), (0.5, [0, 2]), (0.75, [0, 1, 2]), (1.0, [0, 1, 2, 3]), (0.01, [2])):
        made = sampler(golden, trajectories=len(kept), best_fraction=fraction)
        assert made.eligible[TASK].tolist() == kept
        assert sorted(episode_numbers(made.batch(5))[0]) == kept
    with pytest.raises(UserError, match=r"2 are more than the 1 eligible.*raise context\.best_fraction"):
        sampler(golden, trajectories=2, best_fraction=0.25)


def test_a_history_window_holds_consecutive_episodes(golden: EpisodeStore) -> None:
    settings = {"trajectories": 2, "sampling": "history_window"}
    windows = episode_numbers(sampler(golden, 3000, order="history", **settings).batch(0))
    found, counts = np.unique(windows, axis=0, return_counts=True)
    assert found.tolist() == [[0, 1], [1, 2], [2, 3]]
    np.testing.assert_allclose(counts / 3000, 1 / 3, atol=0.04)
    by_return = episode_numbers(sampler(golden, 50, **settings).batch(0))
    assert {tuple(row) for row in by_return.tolist()} == {(1, 0), (1, 2), (3, 2)}
    shuffled = episode_numbers(sampler(golden, 50, order="random", **settings).batch(0))
    assert len({tuple(row) for row in shuffled.tolist()}) == 6


def test_a_history_stride_leaves_episodes_out(golden: EpisodeStore) -> None:
    settings = {"trajectories": 2, "order": "history", "sampling": "history_window"}
    windows = episode_numbers(sampler(golden, 1000, history_stride=2, **settings).batch(0))
    found, counts = np.unique(windows, axis=0, return_counts=True)
    assert found.tolist() == [[0, 2], [1, 3]]
    assert counts.min() > 400
    assert episode_numbers(sampler(golden, history_stride=3, **settings).batch(0)).tolist() == [[0, 3]]
    with pytest.raises(UserError, match=r"history_stride: 2 episodes at a stride of 4 span 5 episodes, and .* has 4"):
        sampler(golden, history_stride=4, **settings)
    with pytest.raises(ValueError, match="history_stride: has no effect with sampling uniform"):
        sampler(golden, trajectories=2, history_stride=4)


def test_the_first_steps_have_their_weight(golden: EpisodeStore) -> None:
    batch = sampler(golden, trajectories=3, first_steps=2, first_steps_weight=50).batch(0)
    np.testing.assert_array_equal(batch.weight, [[50, 50, 1] * 3])
    every = sampler(golden, trajectories=3, first_steps=20, first_steps_weight=0.5).batch(0)
    np.testing.assert_array_equal(every.weight, [[0.5] * 9])


def test_fixed_contexts_are_the_same_at_every_step(golden: EpisodeStore) -> None:
    settings = {"trajectories": 2, "order": "random"}
    made = sampler(golden, 8, sampling="fixed", **settings)
    first = episode_numbers(made.batch(0))
    assert len({tuple(row) for row in first.tolist()}) > 1, "contexts differ from each other"
    for step in (1, 17):
        np.testing.assert_array_equal(episode_numbers(made.batch(step)), first)
    np.testing.assert_array_equal(episode_numbers(sampler(golden, 3, sampling="fixed", **settings).batch(5)), first[:3])
    other = episode_numbers(sampler(golden, 8, 1, sampling="fixed", **settings).batch(0))
    assert (other != first).any()


def test_real_episodes_line_up(jaco_store: EpisodeStore) -> None:
    """In the environment, the reward of a step is that of its action, one row later in the store."""
    task, episode = "jaco_reach_top_left", 3
    scale = Normalisation(np.zeros(42), np.ones(42), 250)
    config = ContextConfig(trajectories=8, order="history")
    batch = ContextSampler(jaco_store, task, config, scale, 1, 0).batch(0)
    steps = jax.tree.map(lambda x: x[0, 250 * episode : 250 * (episode + 1)], batch)
    rows = jaco_store.episode(episode)
    for t in (0, 1, 100, 249):
        np.testing.assert_array_equal(steps.observation[t], rows["observation"][t])
        np.testing.assert_array_equal(steps.action[t], rows["action"][t + 1])
        assert steps.reward[t] == rows[f"reward/{task}"][t + 1]
    remaining = 250 * steps.return_to_go.astype(np.float64)
    np.testing.assert_allclose(remaining[:-1] - remaining[1:], steps.reward[:-1], atol=1e-5)
    returns = jaco_store.returns(task)
    np.testing.assert_allclose(remaining[0], returns.max(), rtol=1e-6)
    assert set(steps.trajectory.tolist()) == {episode}
    completing = np.flatnonzero(batch.completion[0])
    np.testing.assert_array_equal(completing, 250 * np.flatnonzero(returns == returns.max()) + 249)
