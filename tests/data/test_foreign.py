"""Your own episodes become stores: arrays, folders of npz files, flat HDF5 files."""

from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

from ringrl.cli import main
from ringrl.data import EpisodeStore, write_episodes
from ringrl.errors import UserError

HOPPER, POLE = "gymnasium:Hopper-v5", "gymnasium:CartPole-v1"


def recorded(name: str, number: int = 4) -> list[dict[str, np.ndarray]]:
    """Episodes of random actions in a real environment."""
    environment, episodes = gymnasium.make(name, max_episode_steps=30), []
    environment.action_space.seed(0)
    for seed in range(number):
        observations, actions, rewards = [environment.reset(seed=seed)[0]], [], []
        while True:
            actions.append(environment.action_space.sample())
            observation, reward, terminated, truncated, _ = environment.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            if terminated or truncated:
                break
        ends = np.zeros(len(rewards), bool)
        ends[-1] = terminated
        episodes.append({
            "observation": np.array(observations), "action": np.array(actions), "reward": np.array(rewards),
            "terminated": ends,
        })  # fmt: skip
    environment.close()
    return episodes


def assert_stored(store: EpisodeStore, episodes: list[dict[str, np.ndarray]], radius: float = 1.0) -> None:
    assert store.lengths.tolist() == [len(episode["reward"]) for episode in episodes]
    for index, episode in enumerate(episodes):
        rows = store.episode(index)
        np.testing.assert_array_equal(rows["observation"], episode["observation"].astype(np.float32))
        np.testing.assert_array_equal(rows["reward"][1:, 0], episode["reward"].astype(np.float32))
        np.testing.assert_array_equal(rows["discount"][1:, 0], 1 - episode["terminated"].astype(np.float32))
        if episode["action"].ndim == 1:
            assert rows["action"][1:].argmax(1).tolist() == episode["action"].tolist()
            assert (rows["action"][1:].sum(1) == 1).all()
        else:
            np.testing.assert_allclose(rows["action"][1:] * radius, episode["action"], rtol=1e-6)
    store.verify()


@pytest.mark.parametrize(("name", "radius"), [("Hopper-v5", 1.0), ("CartPole-v1", 1.0), ("Pendulum-v1", 2.0)])
def test_arrays_become_a_store(name, radius, tmp_path):
    episodes = recorded(name)
    store = write_episodes(tmp_path / "own.h5", episodes, environment=f"gymnasium:{name}")
    assert store.domain == store.recorded_task == f"gymnasium:{name}"
    assert_stored(store, episodes, radius)
    assert sum(episode["terminated"][-1] for episode in episodes) == store.facts.num_terminated


def test_without_an_environment_actions_are_as_they_are(tmp_path):
    episodes = recorded("Hopper-v5")
    assert_stored(write_episodes(tmp_path / "hops 1.h5", episodes), episodes)
    assert EpisodeStore(tmp_path / "hops 1.h5").domain == "hops_1"


def test_a_missing_last_observation_is_the_one_before(tmp_path):
    (episode,) = recorded("Hopper-v5", 1)
    short = episode | {"observation": episode["observation"][:-1]}
    rows = write_episodes(tmp_path / "own.h5", [short]).episode(0)["observation"]
    np.testing.assert_array_equal(rows[-1], rows[-2])


def save(folder: Path, episodes: list[dict[str, np.ndarray]], *, plural: bool = False) -> None:
    folder.mkdir()
    for index, episode in enumerate(episodes):
        names = {"terminated": "terminals"} | ({name: f"{name}s" for name in episode} if plural else {})
        np.savez(folder / f"episode_{index}.npz", **{names.get(name, name): x for name, x in episode.items()})


@pytest.mark.parametrize("plural", [False, True])
def test_a_folder_of_npz_files_in_the_order_of_their_numbers(plural, tmp_path, capsys):
    episodes = recorded("Hopper-v5", 11)
    save(tmp_path / "hops", [{k: v for k, v in e.items() if plural or k != "x"} for e in episodes], plural=False)
    main(["data", "import", str(tmp_path / "hops"), "--format", "npz", "--environment", "Hopper-v5", "--output",
          str(tmp_path / "hops.h5")])  # fmt: skip
    assert_stored(EpisodeStore(tmp_path / "hops.h5"), episodes)
    assert HOPPER in capsys.readouterr().out


@pytest.mark.parametrize("parts", ["all", "no next", "no timeouts", "lower limit"])
def test_a_flat_file(parts, tmp_path):
    episodes = recorded("Hopper-v5", 5)
    joined = {
        "observations": np.concatenate([episode["observation"][:-1] for episode in episodes]),
        "next_observations": np.concatenate([episode["observation"][1:] for episode in episodes]),
        "actions": np.concatenate([episode["action"] for episode in episodes]),
        "rewards": np.concatenate([episode["reward"] for episode in episodes]),
        "terminals": np.concatenate([episode["terminated"] for episode in episodes]),
    }
    last = np.concatenate([np.arange(len(e["reward"])) == len(e["reward"]) - 1 for e in episodes])
    joined["timeouts"] = last & ~joined["terminals"]
    limit = 5 if parts == "lower limit" else 30  # timeouts say where episodes end
    task = f"gymnasium:Hopper-v5(max_episode_steps={limit})"
    for name in {"no next": ["next_observations"], "no timeouts": ["timeouts"]}.get(parts, []):
        del joined[name]
    with h5py.File(tmp_path / "flat.hdf5", "w") as file:
        for name, array in joined.items():
            file[name] = array
    arguments = ["data", "import", str(tmp_path / "flat.hdf5"), "--format", "hdf5", "--output", str(tmp_path / "a.h5")]
    main([*arguments, "--environment", task])
    if parts == "no next":
        for episode in episodes:
            episode["observation"][-1] = episode["observation"][-2]
    assert_stored(EpisodeStore(tmp_path / "a.h5"), episodes)


def bad(**changes: object) -> list[dict[str, np.ndarray]]:
    (episode,) = recorded("Hopper-v5", 1)
    return [{name: x for name, x in (episode | changes).items() if x is not None}]


@pytest.mark.parametrize(
    ("change", "environment", "message"),
    [
        ({"reward": None}, None, "episode 0: has no array reward"),
        ({"action": np.zeros((2, 3))}, None, "2 actions and"),
        ({"reward": np.zeros(0)}, None, "with T at least 1"),
        ({name: np.zeros((0, 3)) for name in ("observation", "action", "reward")}, None, "with T at least 1"),
        ({"observation": np.float64(5)}, None, "has 1 observations"),
        ({"terminated": np.zeros(0, bool)}, None, r"has terminations of shape \(0,\); expected \(\d+,\) or one bool"),
        ({"terminated": lambda x: np.append(x, [False, True])}, None, "has terminations of shape"),
        ({"terminated": lambda x: np.stack([x, x], axis=1)}, None, r"has terminations of shape \(\d+, 2\)"),
        ({"observation": lambda x: x + 1e300}, None, "has a value in row 0 of observations that is not finite"),
        ({"reward": lambda x: x * np.nan}, None, "has a value in row 0 of rewards that is not finite"),
        ({"action": lambda x: x.astype(str)}, None, "has actions that are not numbers"),
        ({"terminated": lambda x: ~x}, None, "terminates before its last step .step 0."),
        ({"action": lambda x: 3 * x}, None, r"its actions reach .* name it \(--environment\)"),
        ({"action": lambda x: 3 * x}, HOPPER, "the action of step 0 is outside the action space"),
        ({}, POLE, "11 and 3 numbers, those of gymnasium:CartPole-v1 have 4 and 1"),
        ({}, "gymnasium:Nope-v0", "no installed package has this environment"),
        ({"observation": np.zeros((3, 8, 8), np.uint8), "action": np.zeros((2, 3)), "reward": np.zeros(2),
          "terminated": False}, None, "images"),
        ({"reward": lambda x: x * 0 + 3e38}, None, "the return is too large"),
    ],
)  # fmt: skip
def test_bad_episodes_are_named_and_nothing_is_written(change, environment, message, tmp_path):
    episodes = bad()
    for name, value in change.items():
        episodes = (
            bad(**{name: value(episodes[0][name]) if callable(value) else value})
            if len(change) == 1
            else [episodes[0] | change]
        )
    with pytest.raises(UserError, match=message) as error:
        write_episodes(tmp_path / "own.h5", episodes, environment=environment)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_episode_of_another_size_is_named(tmp_path):
    (one,), (other,) = bad(), bad(action=np.zeros((len(bad()[0]["reward"]), 2)))
    message = "arrays, episode 1: observations and actions have 11 and 2 numbers, those of episode 0 have 11 and 3"
    with pytest.raises(UserError, match=message):
        write_episodes(tmp_path / "own.h5", [one, other])


@pytest.mark.parametrize("name", ["terminated", "termination", "terminals"])
def test_the_end_of_an_episode_has_several_names(name, tmp_path):
    (episode,) = bad()
    ends = episode.pop("terminated")
    found = [
        write_episodes(tmp_path / f"{number}.h5", [episode | {name: given}]).facts.num_terminated
        for number, given in enumerate((ends * False, ends * False | (np.arange(len(ends)) == len(ends) - 1), True))
    ]
    assert found == [0, 1, 1]
    with pytest.raises(UserError, match="has an array done; name it terminated, and set it to False"):
        write_episodes(tmp_path / "done.h5", [episode | {"done": ends}])


def test_bad_files_are_named(tmp_path):
    from ringrl.data.foreign import import_episodes

    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(UserError, match="has no npz files"):
        import_episodes(folder, tmp_path / "a.h5", "npz")
    np.savez(folder / "0.npz", observation=np.array([{"a": 1}], object), action=np.zeros(1), reward=np.zeros(1))
    with pytest.raises(UserError, match=r"0\.npz cannot be read"):
        import_episodes(folder, tmp_path / "a.h5", "npz")  # a pickle
    np.savez_compressed(folder / "0.npz", observation=np.zeros((10**7, 1)), action=np.zeros((1, 1)), reward=np.zeros(1))
    with pytest.raises(UserError, match="far more than it stores"):
        import_episodes(folder, tmp_path / "a.h5", "npz")
    (folder / "0.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"0\.npz cannot be read"):
        import_episodes(folder, tmp_path / "a.h5", "npz")
    with pytest.raises(UserError, match="is no file"):
        import_episodes(folder, tmp_path / "a.h5", "hdf5")
    (tmp_path / "flat.h5").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"flat\.h5: .*cannot be read"):
        import_episodes(tmp_path / "flat.h5", tmp_path / "a.h5", "hdf5")
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["observations"] = file["actions"] = file["terminals"] = np.zeros((3, 1))
        file["rewards"] = h5py.ExternalLink("other.h5", "rewards")
    with h5py.File(tmp_path / "ends.h5", "w") as file:
        file["observations"] = file["actions"] = file["rewards"] = np.zeros((3, 1))
        file["terminals"] = np.zeros((3, 2))
    with pytest.raises(UserError, match=r"ends\.h5: has terminals of shape \(3, 2\); expected \(3,\)"):
        import_episodes(tmp_path / "ends.h5", tmp_path / "a.h5", "hdf5")
    with pytest.raises(UserError, match=r"flat\.h5: has a link in place of rewards"):
        import_episodes(tmp_path / "flat.h5", tmp_path / "a.h5", "hdf5")
