import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ringrl.data import EpisodeStore, import_archive
from ringrl.data.exorl import save_episode
from ringrl.data.relabel import relabel_all
from ringrl.envs import DOMAINS
from ringrl.errors import UserError

SHARED_ARCHIVES = {
    "cartpole/ddpg": "cartpole_swingup",
    "cheetah/ddpg": "cheetah_run",
    "jaco/ddpg": "jaco_reach_top_left",
    "walker/ddpg": "walker_walk",
    "walker/rnd": "walker_stand",
}


@pytest.fixture(scope="session")
def shared_stores(exorl_folder, tmp_path_factory) -> dict[str, EpisodeStore]:
    """Every shared archive, imported."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        name: import_archive(exorl_folder / f"{name}.zip", folder / f"{name}.h5", name.split("/")[0])
        for name in SHARED_ARCHIVES
    }


@pytest.mark.parametrize(("name", "task"), SHARED_ARCHIVES.items())
def test_relabelled_rewards_equal_the_recorded_ones(shared_stores, name, task):
    store = shared_stores[name]
    assert store.recorded_task == task
    recorded, relabelled = store.arrays["reward"][:, 0], store.arrays[f"reward/{task}"]
    assert recorded.max() > 0.5
    np.testing.assert_allclose(relabelled, recorded, rtol=0, atol=1e-5)
    others = [other for other in store.tasks if not other.startswith("cartpole") and other != task]
    assert all(np.abs(store.arrays[f"reward/{other}"] - recorded).max() > 0.1 for other in others)


@pytest.mark.parametrize(
    ("name", "episodes", "length", "quantiles"),
    [
        ("cartpole/ddpg", 100, 1000, (7, 118, 813, 837, 848)),
        ("cheetah/ddpg", 100, 1000, (4, 66, 351, 468, 484)),
        ("jaco/ddpg", 240, 250, (0, 0, 0, 172, 238)),
        ("walker/ddpg", 100, 1000, (12, 101, 939, 982, 989)),
        ("walker/rnd", 120, 1000, (73, 138, 289, 367, 412)),
    ],
)
def test_shared_archives_arrive_whole(shared_stores, name, episodes, length, quantiles):
    store = shared_stores[name]
    assert store.num_episodes == episodes
    assert (store.lengths == length).all()
    found = np.quantile(store.returns(SHARED_ARCHIVES[name]), [0, 0.05, 0.5, 0.95, 1])
    np.testing.assert_allclose(found, quantiles, atol=0.5)
    store.verify()


def test_an_import_holds_the_archive_in_order_and_relabelled(tmp_path, cartpole_zip, cartpole_episodes):
    store = import_archive(cartpole_zip, tmp_path / "new" / "cartpole.h5", "cartpole")
    assert store.path == tmp_path / "new" / "cartpole.h5"
    assert store.tasks == DOMAINS["cartpole"].tasks
    assert store.recorded_task == "cartpole_swingup"
    assert store.source.endswith("/cartpole.zip")
    for i, number in enumerate(sorted(cartpole_episodes)):
        original, stored = cartpole_episodes[number], store.episode(i)
        for key, array in original.items():
            np.testing.assert_array_equal(stored[key], array, strict=True)
        for task, reward in relabel_all("cartpole", original["physics"], original["action"]).items():
            np.testing.assert_array_equal(stored[f"reward/{task}"], reward, strict=True)
        np.testing.assert_allclose(stored["reward/cartpole_swingup"], original["reward"][:, 0], atol=1e-5)
        np.testing.assert_allclose(store.returns("cartpole_swingup")[i], original["reward"].sum(), rtol=1e-5)


def test_zip_and_folder_have_one_fingerprint(tmp_path, cartpole_zip, cartpole_folder):
    stores = [
        import_archive(source, tmp_path / f"{i}.h5", "cartpole")
        for i, source in enumerate([cartpole_zip, cartpole_folder, cartpole_folder / "buffer"])
    ]
    assert len({store.fingerprint for store in stores}) == 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_progress_counts_the_episodes(tmp_path, cartpole_zip):
    calls = []
    import_archive(cartpole_zip, tmp_path / "a.h5", "cartpole", progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("kind", ["of no task", "all zero"])
def test_recorded_task_is_none_when_the_data_cannot_tell(tmp_path, cartpole_episodes, kind):
    for number, episode in cartpole_episodes.items():
        reward = np.linspace(0, 1, 1001, dtype=np.float32)[:, None] if kind == "of no task" else 0 * episode["reward"]
        save_episode(tmp_path, number, episode | {"reward": reward})
    assert import_archive(tmp_path, tmp_path / "a.h5", "cartpole").recorded_task is None


def test_one_damaged_episode_ends_the_import_and_leaves_nothing(tmp_path, cartpole_folder):
    shutil.copytree(cartpole_folder, tmp_path / "archive")
    damaged = tmp_path / "archive" / "buffer" / "episode_1000002_1000.npz"
    damaged.write_bytes(damaged.read_bytes()[:5_000])
    (tmp_path / "stores").mkdir()
    with pytest.raises(UserError, match=r"episode_1000002_1000\.npz cannot be read, it is damaged or cut short"):
        import_archive(tmp_path / "archive", tmp_path / "stores" / "a.h5", "cartpole")
    assert list((tmp_path / "stores").iterdir()) == []


def test_failed_overwriting_keeps_the_old_store(tmp_path, cartpole_zip):
    path = tmp_path / "a.h5"
    import_archive(cartpole_zip, path, "cartpole")
    with pytest.raises(UserError, match="already exists"):
        import_archive(cartpole_zip, path, "cartpole")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_archive(cartpole_zip, path, "cartpole", overwrite=True, progress=stop)
    EpisodeStore(path).verify()
    assert names(tmp_path) == [".a.h5.partial", ".a.h5.partial.journal", "a.h5"]


def test_wrong_and_unknown_domain(tmp_path, cartpole_zip):
    with pytest.raises(UserError, match="--domain cartpole"):
        import_archive(cartpole_zip, tmp_path / "a.h5", "walker")
    with pytest.raises(UserError, match=r"unknown domain 'cartpol'.*cartpole"):
        import_archive(cartpole_zip, tmp_path / "a.h5", "cartpol")
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_archive(tmp_path, cartpole_episodes):
    """From the tenth episode to the last, the peak of resident memory must not follow the size of the store."""
    (folder := tmp_path / "buffer").mkdir()
    first = save_episode(folder, 0, cartpole_episodes[999_999])
    for number in range(1, 150):
        (folder / f"episode_{number}_1000.npz").hardlink_to(first)
    child = """
        import resource, sys
        from ringrl.data import import_archive
        peaks = []
        import_archive(sys.argv[1], sys.argv[2], "cartpole", progress=lambda done, total:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        print(peaks[-1] - peaks[9])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(child), folder, tmp_path / "a.h5"],
        check=True,
        capture_output=True,
        text=True,
    )
    stored = Path(tmp_path / "a.h5").stat().st_size / 1024
    assert int(run.stdout) < stored / 4
