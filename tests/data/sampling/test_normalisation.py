import json

import numpy as np

from ringrl.data.sampling.normalisation import SMALLEST_STD, Normalisation


def test_statistics_are_those_of_all_rows(store, episodes) -> None:
    rows = np.concatenate([episode["observation"] for episode in episodes]).astype(np.float64)
    found = Normalisation.of(store)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-9)
    assert found.episode_length == 50
    scaled = found.observation(rows)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-5)


def test_only_the_given_episodes_are_measured(store, episodes) -> None:
    found = Normalisation.of(store, episodes=np.array([2, 1]))
    rows = np.concatenate([episodes[1]["observation"], episodes[2]["observation"]]).astype(np.float64)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-9)
    assert found.episode_length == 50, "the task's, not the subset's"


def test_normalised_observations_can_be_written_in_place(store, episodes) -> None:
    found, rows = Normalisation.of(store), episodes[0]["observation"]
    out = np.full((2, *rows.shape), 7, np.float32)
    assert np.shares_memory(found.observation(rows[::2], out=out[1, : len(rows[::2])]), out)
    np.testing.assert_array_equal(out[1, : len(rows[::2])], found.observation(rows)[::2])
    assert (out[0] == 7).all()
    expected = (rows - found.mean) / found.std
    np.testing.assert_allclose(found.observation(rows), expected, rtol=1e-5, atol=1e-6)


def test_components_that_never_move_stay_near_zero(tmp_path, random_episode, write_store) -> None:
    episode = random_episode("cartpole", 10, 0)
    episode["observation"][:, 2] = 0.3
    found = Normalisation.of(write_store(tmp_path / "still.h5", "cartpole", [episode]))
    assert found.std[2] == SMALLEST_STD
    assert abs(found.observation(episode["observation"])[:, 2]).max() < 1e-3


def test_returns_are_per_step(store) -> None:
    assert Normalisation.of(store).return_to_go(25.0) == np.float32(0.5)


def test_survives_json(store) -> None:
    found = Normalisation.of(store)
    again = Normalisation.from_json(json.loads(json.dumps(found.to_json() | {"ignored": []})))
    np.testing.assert_array_equal(again.mean, found.mean)
    np.testing.assert_array_equal(again.std, found.std)
    assert again.episode_length == found.episode_length
