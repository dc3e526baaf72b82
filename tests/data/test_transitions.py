"""Transitions against loops over episodes in float64."""

import numpy as np
import pytest

from ringrl.config import ActorCriticConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import eligible_episodes
from ringrl.data.transitions import TransitionSampler
from ringrl.errors import UserError

TASK, JACO = "cartpole_swingup", "jaco_reach_top_left"


def sampler(store: EpisodeStore, task: str, batch_size: int = 64, seed: int = 0, **config: object) -> TransitionSampler:
    size = store.observation_size
    identity = Normalisation(np.zeros(size), np.ones(size), 250)
    return TransitionSampler(store, task, ActorCriticConfig.model_validate(config), identity, batch_size, seed)


def rows_of(store: EpisodeStore, observation: np.ndarray) -> np.ndarray:
    """Return the rows of a store that contain the observations."""
    known = {row.tobytes(): number for number, row in enumerate(store.arrays["observation"])}
    return np.array([known[row.tobytes()] for row in observation])


def by_hand(store: EpisodeStore, row: int, reward: np.ndarray, discount: float, n: int) -> tuple[float, float, int]:
    """Return the n-step return from a row, the discount of the final value, and the final row."""
    end = next(int(offset) - 1 for offset in store.offsets if offset > row)
    total, factor = 0.0, 1.0
    for _ in range(n):
        if row == end:
            break
        row += 1
        total += factor * float(reward[row])
        factor *= discount
    return total, factor, row


@pytest.mark.parametrize("n", [1, 3, 60])
def test_n_steps_equal_a_loop_and_stop_at_the_episodes_end(store: EpisodeStore, n: int) -> None:
    """Episodes of 50, 7 and 1 steps. With n = 60, every transition is cut and its final value still counts."""
    batch = sampler(store, TASK, 300, n_step=n, discount=0.9).batch(0)
    rows = rows_of(store, batch.observation)
    shortened = 0
    for i, row in enumerate(rows):
        total, factor, last = by_hand(store, row, store.arrays[f"reward/{TASK}"], 0.9, n)
        np.testing.assert_allclose(batch.reward[i], total, rtol=1e-5)
        np.testing.assert_allclose(batch.discount[i], factor, rtol=1e-6)
        np.testing.assert_array_equal(batch.following[i], store.arrays["observation"][last])
        np.testing.assert_array_equal(batch.action[i], store.arrays["action"][row + 1])
        shortened += last - row < n
    assert (shortened > 0) == (n > 1)
    assert {array.dtype for array in batch} == {np.dtype(np.float32)}


def test_steps_are_drawn_uniformly(store: EpisodeStore) -> None:
    made = sampler(store, TASK, 5800)
    counts = np.bincount(rows_of(store, made.batch(0).observation), minlength=61)
    assert counts[[50, 58, 60]].tolist() == [0, 0, 0], "the last row of an episode has no action"
    np.testing.assert_allclose(np.delete(counts, [50, 58, 60]), 100, atol=50)


def test_the_best_fraction_keeps_the_best_episodes(store: EpisodeStore) -> None:
    best = int(np.argmax(store.returns(TASK)))
    made = TransitionSampler(store, TASK, ActorCriticConfig(), Normalisation.of(store), 50, 0, best_fraction=0.3)
    rows = store.episode(best)["observation"][:-1]
    expected = {row.tobytes() for row in made.normalisation.observation(rows)}
    assert {row.tobytes() for row in made.batch(0).observation} <= expected


def test_steps_come_from_the_selected_episodes(jaco_store: EpisodeStore) -> None:
    scale = Normalisation(np.zeros(42), np.ones(42), 250)
    batch = TransitionSampler(jaco_store, JACO, ActorCriticConfig(), scale, 500, 4, max_transitions=600).batch(0)
    used = eligible_episodes(jaco_store, JACO, 4, 600)
    assert len(used) == 2
    rows = np.concatenate([jaco_store.episode(int(i))["observation"] for i in used])
    assert {row.tobytes() for row in batch.observation} <= {row.tobytes() for row in rows}


def test_a_batch_depends_on_seed_and_step_only(jaco_store: EpisodeStore) -> None:
    first, again = (sampler(jaco_store, JACO) for _ in range(2))
    later = first.batch(7)
    again.batch(3)
    for a, b in zip(later, again.batch(7), strict=True):
        np.testing.assert_array_equal(a, b)
    for seed, step in ((0, 8), (1, 7), (7, 0)):
        assert not np.array_equal(later.action, sampler(jaco_store, JACO, seed=seed).batch(step).action)


def test_a_task_without_rewards_is_rejected(store: EpisodeStore) -> None:
    with pytest.raises(UserError, match="no rewards for task walker_walk"):
        sampler(store, "walker_walk")
