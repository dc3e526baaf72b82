import json

import numpy as np
import pytest

from ringrl.data.sampling.normalisation import SMALLEST_STD, Normalisation
from ringrl.errors import UserError


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
    found, rows = Normalisation.of(store, [1]), episodes[0]["observation"]
    out = np.full((2, *rows.shape), 7, np.float32)
    assert np.shares_memory(found.observation(rows[::2], out=out[1, : len(rows[::2])]), out)
    np.testing.assert_array_equal(out[1, : len(rows[::2])], found.observation(rows)[::2])
    assert (out[0] == 7).all()
    expected = (rows - found.mean) / found.std
    expected[:, 1] = 0
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
    found = Normalisation.of(store, [3])
    again = Normalisation.from_json(json.loads(json.dumps(found.to_json())))
    np.testing.assert_array_equal(again.mean, found.mean)
    np.testing.assert_array_equal(again.std, found.std)
    assert again.episode_length == found.episode_length
    assert again.ignored == found.ignored == (3,)


def test_ignored_components_are_zero_and_the_others_as_before(store, episodes) -> None:
    rows = episodes[0]["observation"]
    found, plain = Normalisation.of(store, (1, 4)).observation(rows), Normalisation.of(store).observation(rows)
    assert not found[:, [1, 4]].any()
    np.testing.assert_array_equal(found[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    assert plain[:, [1, 4]].all()
    with pytest.raises(UserError, match="ignored_observations: 5 is none of the 5 numbers"):
        Normalisation.of(store, [5])
