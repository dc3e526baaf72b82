"""Transitions against loops over episodes in float64, and hindsight goals against the data."""

import numpy as np
import pytest

from ringrl.config import ActorCriticConfig
from ringrl.context import Transitions
from ringrl.data import EpisodeStore, relabel
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import subset
from ringrl.data.transitions import TransitionSampler
from ringrl.envs import DOMAINS
from ringrl.errors import UserError

TASK, JACO = "cartpole_swingup", "jaco_reach_top_left"
GOAL = np.array([-0.09, 0.09, 0.001])


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
    assert batch.goal.shape == (300, 0)
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


def test_steps_and_goals_come_from_the_selected_episodes(jaco_store: EpisodeStore) -> None:
    config = ActorCriticConfig.model_validate({"hindsight": {"nearby": 1.0, "radius": 0.5}})
    scale = Normalisation(np.zeros(42), np.ones(42), 250)
    batch = TransitionSampler(jaco_store, JACO, config, scale, 500, 4, max_transitions=600).batch(0)
    used = subset(jaco_store, 4, 600)
    assert len(used) == 2
    rows = np.concatenate([jaco_store.episode(int(i))["observation"] for i in used])
    assert {row.tobytes() for row in batch.observation} <= {row.tobytes() for row in rows}
    places = rows[:, DOMAINS["jaco"].goals.observation]
    assert {row.tobytes() for row in batch.goal} <= {row.tobytes() for row in places}


def test_a_batch_depends_on_seed_and_step_only(jaco_store: EpisodeStore) -> None:
    settings = {"hindsight": {"later": 0.3, "nearby": 0.3, "radius": 0.5}}
    first, again = (sampler(jaco_store, JACO, **settings) for _ in range(2))
    later = first.batch(7)
    again.batch(3)
    for a, b in zip(later, again.batch(7), strict=True):
        np.testing.assert_array_equal(a, b)
    for seed, step in ((0, 8), (1, 7), (7, 0)):
        assert not np.array_equal(later.action, sampler(jaco_store, JACO, seed=seed, **settings).batch(step).action)


@pytest.mark.parametrize("task", ["top_left", "top_right", "bottom_left", "bottom_right"])
def test_rewards_for_the_task_goal_equal_relabelling(jaco_store: EpisodeStore, task: str) -> None:
    """Transitions read positions from observations, relabelling from the physics state."""
    task = f"jaco_reach_{task}"
    batch = sampler(jaco_store, task, 2000).batch(0)
    rows = rows_of(jaco_store, batch.observation)
    episodes = [jaco_store.episode(i) for i in range(len(jaco_store))]
    rewards = np.concatenate([relabel(task, episode["physics"], episode["action"]) for episode in episodes])
    np.testing.assert_allclose(batch.reward, rewards[rows + 1], atol=1e-5)
    np.testing.assert_allclose(batch.goal, np.tile(DOMAINS["jaco"].goals.goals[task], (2000, 1)), rtol=1e-6)


def test_rewards_for_other_goals_equal_a_loop(jaco_store: EpisodeStore) -> None:
    hindsight = {"later": 1.0, "steps_ahead": 2.0, "distance_cost": 0.5}
    batch = sampler(jaco_store, JACO, 300, n_step=3, discount=0.9, hindsight=hindsight).batch(0)
    positions = jaco_store.arrays["observation"][:, 30:33].astype(np.float64)
    for i, row in enumerate(rows_of(jaco_store, batch.observation)):
        distance = np.linalg.norm(positions - batch.goal[i], axis=-1)
        reward = 0.1 ** np.square(np.maximum(distance - 0.05, 0) / 0.05) - 0.5 * np.minimum(distance, 1)
        total, factor, _ = by_hand(jaco_store, row, reward, 0.9, 3)
        np.testing.assert_allclose([batch.reward[i], batch.discount[i]], [total, factor], rtol=1e-5, atol=1e-6)
    assert batch.reward.max() > 0.9, "some goals are reached"


def steps_until(store: EpisodeStore, batch: Transitions) -> np.ndarray:
    """Return the steps from each transition until its episode reaches its goal."""
    positions = {row.tobytes(): i for i, row in enumerate(store.arrays["observation"][:, 30:33])}
    return np.array([positions[goal.tobytes()] for goal in batch.goal]) - rows_of(store, batch.observation)


def test_later_goals_are_geometrically_ahead_in_the_same_episode(jaco_store: EpisodeStore) -> None:
    batch = sampler(jaco_store, JACO, 4000, hindsight={"later": 1.0, "steps_ahead": 4.0}).batch(0)
    ahead, rows = steps_until(jaco_store, batch), rows_of(jaco_store, batch.observation)
    assert ahead.min() >= 1
    assert (rows // 251 == (rows + ahead) // 251).all()
    assert ahead.mean() == pytest.approx(4.0, abs=0.3)
    assert (ahead == 1).mean() == pytest.approx(0.25, abs=0.03)


def test_nearby_goals_are_positions_of_the_data_within_the_radius(jaco_store: EpisodeStore) -> None:
    batch = sampler(jaco_store, JACO, 500, hindsight={"nearby": 1.0, "radius": 0.3}).batch(0)
    steps_until(jaco_store, batch)  # raises KeyError if a goal is not in the data
    distance = np.linalg.norm(batch.goal - GOAL, axis=-1)
    assert distance.max() < 0.3
    assert len(np.unique(distance)) > 100


def test_goals_have_the_configured_shares(jaco_store: EpisodeStore) -> None:
    hindsight = {"later": 0.2, "nearby": 0.3, "radius": 0.3}
    batch = sampler(jaco_store, JACO, 5000, hindsight=hindsight).batch(0)
    own = (np.linalg.norm(batch.goal - GOAL, axis=-1) < 1e-6).mean()
    assert own == pytest.approx(0.5, abs=0.03)
    outside = np.linalg.norm(batch.goal - GOAL, axis=-1) >= 0.3
    assert 0 < outside.mean() <= 0.23, "only later goals may be outside the radius"


def test_invalid_settings_are_rejected(store: EpisodeStore, jaco_store: EpisodeStore) -> None:
    with pytest.raises(UserError, match=r"actor_critic\.hindsight: cartpole_swingup has no goal position"):
        sampler(store, TASK, hindsight={"later": 0.5})
    with pytest.raises(UserError, match=r"hindsight\.radius: .* has no position within 0\.0001 m"):
        sampler(jaco_store, JACO, hindsight={"nearby": 0.5, "radius": 1e-4})
    blind = Normalisation.of(jaco_store, [31])
    with pytest.raises(UserError, match=r"ignored_observations: .* keep 30 to 32"):
        TransitionSampler(jaco_store, JACO, ActorCriticConfig(), blind, 1, 0)
    with pytest.raises(UserError, match="no rewards for walker_walk"):
        sampler(store, "walker_walk")
    with pytest.raises(ValueError, match="add up to more than 1"):
        ActorCriticConfig.model_validate({"hindsight": {"later": 0.6, "nearby": 0.6}})
