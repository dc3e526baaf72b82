"""Exported Minari datasets, read by the Minari library and imported again."""

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ringrl.cli import main
from ringrl.data import EpisodeStore
from ringrl.data.minari import export_minari, import_minari
from ringrl.envs import make
from ringrl.errors import UserError
from ringrl.files import lock

minari = pytest.importorskip("minari", reason="Minari is not installed (pip install 'ringrl[minari]')")

pytestmark = pytest.mark.filterwarnings("ignore")  # Minari asks for authors, addresses and the like
TASK, NAME = "jaco_reach_top_left", "exorl/jaco-random-v0"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for Minari's datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def test_minari_opens_an_export(jaco_store: EpisodeStore, root: Path) -> None:
    assert export_minari(jaco_store, NAME) == root / NAME
    assert list(minari.list_local_datasets()) == [NAME]
    assert minari.namespace.list_local_namespaces() == ["exorl"]
    dataset = minari.load_dataset(NAME)
    assert (len(dataset), dataset.total_steps) == (8, 2000)
    for episode, rows in zip(dataset, map(jaco_store.episode, range(8)), strict=True):
        np.testing.assert_array_equal(episode.observations, rows["observation"], strict=True)
        np.testing.assert_array_equal(episode.actions, rows["action"][1:], strict=True)
        np.testing.assert_array_equal(episode.rewards, rows[f"reward/{TASK}"][1:], strict=True)
        assert not episode.terminations.any()
        assert np.flatnonzero(episode.truncations).tolist() == [249]
        np.testing.assert_array_equal(episode.infos["physics"], rows["physics"], strict=True)
        assert sorted(episode.infos["rewards"]) == sorted(set(jaco_store.tasks) - {TASK})
        for task, reward in episode.infos["rewards"].items():
            np.testing.assert_array_equal(reward, rows[f"reward/{task}"], strict=True)
        assert all(dataset.observation_space.contains(row) for row in episode.observations)
        assert all(dataset.action_space.contains(row) for row in episode.actions)
    metadata = dataset.storage.metadata
    assert jaco_store.provenance.source in metadata["description"]
    assert metadata["ringrl"]["fingerprint"] == jaco_store.fingerprint
    assert (metadata["ringrl"]["task"], metadata["ringrl"]["provenance"]["relabelling"]) == (TASK, "control_aware")
    environment = dataset.recover_environment()
    assert environment.observation_space == dataset.observation_space
    assert environment.action_space == dataset.action_space
    assert len(minari.combine_datasets([dataset, dataset], "both-v0")) == 16
    assert dataset.sample_episodes(1)[0].rewards.shape == (250,)


def test_an_export_is_a_dataset_of_its_task(jaco_store: EpisodeStore, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    other = "jaco_reach_bottom_right"
    export_minari(jaco_store, NAME, task=other, progress=lambda *numbers: done.append(numbers))
    assert done == [(i, 8) for i in range(1, 9)]
    back = import_minari(NAME, tmp_path / "back.h5")
    assert back.tasks == (f"gymnasium:ringrl/{other}-v0",)
    for key in ("observation", "action", "discount"):
        np.testing.assert_array_equal(back.arrays[key], jaco_store.arrays[key], strict=True)
    np.testing.assert_array_equal(back.returns(*back.tasks), jaco_store.returns(other))
    observation, _ = make(*back.tasks, seed=0).reset()
    np.testing.assert_array_equal(observation, make(other, seed=0).reset(seed=0)[0])


def test_a_store_of_all_tasks_is_exported_for_one(tmp_path: Path, write_store: Callable, random_episode) -> None:
    episodes = [random_episode("point_mass_maze", length, length) for length in (7, 3)]
    for episode in episodes:
        episode["action"][0] = 0
    store = write_store(tmp_path / "maze.h5", "point_mass_maze", episodes)
    with pytest.raises(UserError, match=r"recorded for no single task, choose one \(--task point_mass_maze_reach_top"):
        export_minari(store, "maze-v0")


def test_the_commands(jaco_store: EpisodeStore, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main(["data", "export", str(jaco_store.path), "--name", NAME])
    assert "minari.load_dataset" in capsys.readouterr().out
    main(["data", "import", NAME, "--format", "minari"])
    assert "gymnasium:ringrl/jaco_reach_top_left-v0" in capsys.readouterr().out
    (tmp_path / "jaco-random-v0.h5").write_bytes(b"other")
    wrong = {
        (
            "--format",
            "minari",
            "--domain",
            "jaco",
            "--max-episodes",
            "3",
        ): "--domain, --max-episodes: has no effect with --format minari",
        ("--format", "minari"): "already exists",
        (): "--domain: give the domain",
    }
    for flags, message in wrong.items():
        with pytest.raises(SystemExit):
            main(["data", "import", NAME, *flags])
        assert message in capsys.readouterr().err


def test_an_interrupted_export_leaves_nothing(jaco_store: EpisodeStore, root: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            assert not (root / NAME).exists()
            assert minari.list_local_datasets() == {}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_minari(jaco_store, NAME, progress=stop)
    assert list((root / "exorl").iterdir()) == []
    remains = root / "exorl" / ".jaco-random-v0.tmp" / "data"  # left by a killed export
    remains.mkdir(parents=True)
    (remains / "metadata.json").write_text("{}")
    export_minari(jaco_store, NAME)
    assert sorted(path.name for path in (root / "exorl").iterdir()) == ["jaco-random-v0", "namespace_metadata.json"]
    assert len(minari.load_dataset(NAME)) == 8


@pytest.mark.parametrize("name", ["", "jaco", "jaco-v", "../up-v0", "/etc/jaco-v0", "a b-v0", "jäco-v0", "jaco-v0/"])
def test_bad_names(name: str, jaco_store: EpisodeStore, root: Path) -> None:
    with pytest.raises(UserError, match=r"is not a name of a Minari dataset|use letters, digits"):
        export_minari(jaco_store, name)
    assert not list(root.glob("**/*.hdf5"))


def test_impossible_exports(jaco_store: EpisodeStore, store: EpisodeStore, root: Path) -> None:
    with pytest.raises(UserError, match=r"no rewards for task walker_walk .domain jaco.. Tasks: jaco"):
        export_minari(jaco_store, NAME, task="walker_walk")
    with pytest.raises(UserError, match="episode 0 has an action in its reset row"):
        export_minari(store, NAME, task="cartpole_balance")
    (root / NAME).mkdir(parents=True)
    with pytest.raises(UserError, match="already exists, choose another --name"):
        export_minari(jaco_store, NAME)
    busy = pytest.raises(UserError, match="another process is writing it")
    with lock(root / "exorl" / "busy-v0", "is writing it"), busy:
        export_minari(jaco_store, "exorl/busy-v0")


def test_a_full_disk_shows_before_the_work(jaco_store: EpisodeStore, root: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"jaco-random-v0: the disk, a quota or a limit .* is full .*MB are needed"):
            export_minari(jaco_store, NAME, progress=lambda done, total: pytest.fail("has begun"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((root / "exorl").iterdir()) == []
