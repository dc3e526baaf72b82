"""Contexts of several tasks have the rewards, returns and order of their own task."""

from pathlib import Path

import numpy as np
import pytest

from ringrl.config import ContextConfig, TrainConfig
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler, eligible_episodes
from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

TASKS = ("cartpole_swingup", "cartpole_balance")
LENGTH, EPISODES = 6, 5


@pytest.fixture
def store(tmp_path: Path, random_episode, write_store) -> EpisodeStore:
    """A store whose observations are the episode number. The order of returns differs between the tasks."""
    episodes = []
    for number in range(EPISODES):
        episode = random_episode("cartpole", LENGTH, number)
        episode["observation"][:] = number
        episode[f"reward/{TASKS[0]}"] = np.r_[0, np.full(LENGTH, 0.1 * (number + 1))].astype(np.float32)
        episode[f"reward/{TASKS[1]}"] = np.r_[0, np.full(LENGTH, 0.9 - 0.1 * number)].astype(np.float32)
        episodes.append(episode)
    return write_store(tmp_path / "two.h5", "cartpole", episodes)


def sampler(store: EpisodeStore, task: str = TASKS[0], batch_size: int = 6, **config: object) -> ContextSampler:
    identity = Normalisation(np.zeros(5), np.ones(5), LENGTH)
    return ContextSampler(store, task, ContextConfig(trajectories=3, **config), identity, batch_size, 0)


def test_each_context_has_one_task(store: EpisodeStore) -> None:
    several = sampler(store, other_tasks=TASKS[1:])
    draw, batch = several.draw(0), several.batch(0)
    assert set(draw.tasks) == set(TASKS), "both in six draws"
    for row, task in enumerate(draw.tasks):
        chosen = draw.episodes[row]
        returns = store.returns(task)[chosen]
        assert list(returns) == sorted(returns), "ascending in its own task"
        assert draw.targets[row] == pytest.approx(returns.max())
        rows = [slice(store.offsets[i] + 1, store.offsets[i + 1]) for i in chosen]
        rewards = np.concatenate([store.arrays[f"reward/{task}"][span] for span in rows])
        np.testing.assert_allclose(batch.reward[row], rewards, rtol=1e-6)
        np.testing.assert_allclose(batch.previous.reward[row, LENGTH], rewards[LENGTH - 1], rtol=1e-6)
        np.testing.assert_allclose(batch.previous.reward[row, 1:LENGTH], rewards[: LENGTH - 1], rtol=1e-6)
        left = returns.max() - np.cumsum(rewards[-LENGTH:]) + rewards[-LENGTH:]
        np.testing.assert_allclose(batch.return_to_go[row, -LENGTH:], left / LENGTH, rtol=1e-5)
        np.testing.assert_array_equal(batch.completion[row, LENGTH - 1 :: LENGTH], [0, 0, 1])


def test_all_tasks_are_equally_likely_and_any_part_reads_equally(store: EpisodeStore) -> None:
    several = sampler(store, batch_size=400, other_tasks=TASKS[1:])
    draw = several.draw(3)
    assert abs((draw.tasks == TASKS[0]).mean() - 0.5) < 0.1
    whole, times = several.read(draw, slice(None), np.arange(several.time)), np.array([2, 3, 9, 17])
    part = several.read(draw, slice(5, 60), times)
    np.testing.assert_array_equal(part.reward, np.asarray(whole.reward)[5:60][:, times])
    np.testing.assert_array_equal(part.return_to_go, np.asarray(whole.return_to_go)[5:60][:, times])


def test_stratified_sampling_uses_the_returns_of_each_task(store: EpisodeStore) -> None:
    several = sampler(store, other_tasks=TASKS[1:], sampling="return_stratified")
    alone = sampler(store, TASKS[1], sampling="return_stratified")
    np.testing.assert_array_equal(several._weights[TASKS[1]], alone._weights[TASKS[1]])


def test_each_task_keeps_its_own_best_episodes(store: EpisodeStore) -> None:
    several = sampler(store, batch_size=100, other_tasks=TASKS[1:], best_fraction=0.6, sampling="return_stratified")
    assert {task: found.tolist() for task, found in several.eligible.items()} == {
        TASKS[0]: [2, 3, 4],  # returns grow with the number of the episode in this task, and fall in the other
        TASKS[1]: [0, 1, 2],
    }
    draw = several.draw(0)
    assert {(str(task), tuple(row)) for task, row in zip(draw.tasks, draw.episodes.tolist(), strict=True)} == {
        (TASKS[0], (2, 3, 4)),
        (TASKS[1], (2, 1, 0)),
    }
    limited = sampler(store, other_tasks=TASKS[1:], max_transitions=4 * LENGTH, best_fraction=0.75)
    first, second = limited.eligible.values()
    shared = eligible_episodes(store, TASKS[0], 0, 4 * LENGTH)
    assert (first.tolist(), second.tolist()) == (shared[1:].tolist(), shared[:-1].tolist())


def test_draws_without_other_tasks_are_unchanged(store: EpisodeStore) -> None:
    """Ascending in return is ascending in number, so what a seed drew before there were other tasks can be message."""
    drawn = [np.sort(np.random.default_rng([0, 7, row]).choice(EPISODES, 3, replace=False)) for row in range(6)]
    np.testing.assert_array_equal(sampler(store).draw(7).episodes, drawn)


def test_invalid_settings_are_rejected(store: EpisodeStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rewards for task walker_walk"):
        sampler(store, other_tasks=("walker_walk",))
    run = {"data": store.path, "task": TASKS[0], "run": tmp_path / "run"}
    for context, model, message in (
        ({"other_tasks": [TASKS[0]]}, {}, "names a task twice"),
        ({"other_tasks": [TASKS[1]]}, {"kind": "behaviour_cloning"}, "no context that could identify"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**run, context=context, model=model)
