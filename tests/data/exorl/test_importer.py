import errno
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
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
    """The stores of all shared archives."""
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


def test_an_import_has_the_archive_in_order_and_relabelled(tmp_path, cartpole_zip, cartpole_episodes):
    store = import_archive(cartpole_zip, tmp_path / "new" / "cartpole.h5", "cartpole")
    assert store.path == tmp_path / "new" / "cartpole.h5"
    assert store.tasks == DOMAINS["cartpole"].tasks
    assert store.recorded_task == "cartpole_swingup"
    assert store.provenance.source.endswith("/cartpole.zip")
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


def test_a_task_with_the_same_rewards_is_not_taken_for_the_recorded_one(tmp_path, cartpole_folder):
    """Balancing and swinging up have one reward. These episodes start as those of swinging up."""

    def recorded(*tasks: str) -> str | None:
        store = import_archive(cartpole_folder, tmp_path / "a.h5", "cartpole", tasks=tasks, overwrite=True)
        assert store.tasks == tasks
        return store.recorded_task

    assert recorded("cartpole_balance") is None
    assert recorded("cartpole_balance", "cartpole_swingup") == "cartpole_swingup"
    assert recorded("cartpole_swingup") == "cartpole_swingup"


def test_one_damaged_episode_ends_the_import_and_leaves_nothing(tmp_path, cartpole_folder):
    shutil.copytree(cartpole_folder, tmp_path / "archive")
    damaged = tmp_path / "archive" / "buffer" / "episode_1000002_1000.npz"
    damaged.write_bytes(damaged.read_bytes()[:5_000])
    (tmp_path / "stores").mkdir()
    with pytest.raises(UserError, match=r"episode_1000002_1000\.npz cannot be read, it is missing, damaged or cut"):
        import_archive(tmp_path / "archive", tmp_path / "stores" / "a.h5", "cartpole")
    assert list((tmp_path / "stores").iterdir()) == []


def test_failed_overwriting_keeps_the_old_store(tmp_path, cartpole_zip):
    path = tmp_path / "a.h5"
    import_archive(cartpole_zip, path, "cartpole")
    with pytest.raises(UserError, match="already exists"):
        import_archive(cartpole_zip, path, "cartpole", max_episodes=1)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_archive(cartpole_zip, path, "cartpole", overwrite=True, progress=stop)
    EpisodeStore(path).verify()
    assert names(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("kind", ["cartpole_zip", "cartpole_folder"])
def test_a_finished_import_is_kept(tmp_path, request, kind):
    source, path = tmp_path / "copy", tmp_path / "stores" / "a.h5"
    original = request.getfixturevalue(kind)
    (shutil.copytree if original.is_dir() else shutil.copy)(original, source)
    before = import_archive(source, path, "cartpole").path.read_bytes()
    import_archive(source, path, "cartpole", progress=lambda *_: pytest.fail("imported again"))
    assert path.read_bytes() == before
    assert names(path.parent) == ["a.h5"]
    others = [{"subset": "last", "max_episodes": 1}, {"tasks": ["cartpole_swingup"]}]
    if kind == "cartpole_folder":
        next(source.glob("buffer/*")).touch()
        others.append({})
    for other in others:
        with pytest.raises(UserError, match="already exists"):
            import_archive(source, path, "cartpole", **other)


def test_wrong_and_unknown_domain(tmp_path, cartpole_zip):
    with pytest.raises(UserError, match="is it the right --domain"):
        import_archive(cartpole_zip, tmp_path / "a.h5", "walker")
    with pytest.raises(UserError, match=r"unknown domain 'cartpol'.*cartpole"):
        import_archive(cartpole_zip, tmp_path / "a.h5", "cartpol")
    assert list(tmp_path.iterdir()) == []


def test_a_subset_has_the_chosen_episodes_and_its_description(tmp_path, cartpole_zip, cartpole_episodes):
    store = import_archive(cartpole_zip, tmp_path / "a.h5", "cartpole", subset="last", max_episodes=2)
    assert store.provenance.subset == "2 of 3 episodes, the last ones"
    for i, number in enumerate([1_000_000, 1_000_002]):
        np.testing.assert_array_equal(store.episode(i)["physics"], cartpole_episodes[number]["physics"])
    whole = import_archive(cartpole_zip, tmp_path / "b.h5", "cartpole")
    assert whole.fingerprint != store.fingerprint


@pytest.fixture
def other_folder(tmp_path, cartpole_episodes) -> Path:
    """A folder of two further episodes."""
    folder = tmp_path / "other"
    folder.mkdir()
    for number, episode in enumerate(list(cartpole_episodes.values())[:2]):
        save_episode(folder, number, episode | {"physics": episode["physics"] + 0.1})
    return folder


def test_several_archives_become_one_store_in_order(tmp_path, cartpole_zip, other_folder):
    sources = [other_folder, cartpole_zip]
    parts = [import_archive(source, tmp_path / f"{i}.h5", "cartpole") for i, source in enumerate(sources)]
    store = import_archive(sources, tmp_path / "both.h5", "cartpole")
    store.verify()
    originals = [part.episode(index) for part in parts for index in range(len(part))]
    assert len(store) == len(originals) == 5
    for index, original in enumerate(originals):
        for key, values in store.episode(index).items():
            np.testing.assert_array_equal(values, original[key], err_msg=key)
    assert store.provenance.source == " + ".join(part.provenance.source for part in parts)
    assert store.provenance.subset == "all 2 episodes; all 3 episodes"
    last = import_archive(sources, tmp_path / "last.h5", "cartpole", subset="last", max_episodes=1)
    np.testing.assert_array_equal(last.recorded_digests, store.recorded_digests[[1, 4]])


def test_an_episode_in_two_archives_is_named(tmp_path, cartpole_zip, cartpole_folder, other_folder):
    """Otherwise a context of distinct trajectories could contain an episode twice."""
    with pytest.raises(UserError, match=r"_999999_1000\.npz is also in .*cartpole\.zip: leave it out") as found:
        import_archive([cartpole_zip, other_folder, cartpole_folder], tmp_path / "a.h5", "cartpole")
    assert str(found.value).startswith(str(cartpole_folder))
    assert names(tmp_path) == ["other"]
    with pytest.raises(UserError, match="one archive is named twice"):
        import_archive([other_folder, tmp_path / "." / "other"], tmp_path / "a.h5", "cartpole")


def test_skills_are_ignored(tmp_path, cartpole_folder, cartpole_episodes):
    for number, episode in cartpole_episodes.items():
        skill = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (1001, 1))
        save_episode(tmp_path, number, episode | {"skill": skill, "z": skill[:, :10]})
    with_skills = import_archive(tmp_path, tmp_path / "a.h5", "cartpole")
    assert with_skills.fingerprint == import_archive(cartpole_folder, tmp_path / "b.h5", "cartpole").fingerprint


def test_provenance(tmp_path, cartpole_zip, cartpole_folder, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made = import_archive(cartpole_zip, tmp_path / "a.h5", "cartpole").provenance
    assert made.source.endswith("/cartpole.zip")
    assert made.source_bytes == cartpole_zip.stat().st_size
    assert made.created == "2023-11-14"
    assert re.fullmatch(r"ringrl [0-9.]+, mujoco 3[0-9.]+", made.created_by)
    of_folder = import_archive(cartpole_folder, tmp_path / "b.h5", "cartpole").provenance
    assert of_folder.source_bytes == sum(path.stat().st_size for path in (cartpole_folder / "buffer").iterdir())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH: today is not a number of seconds"):
        import_archive(cartpole_zip, tmp_path / "c.h5", "cartpole")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    copied = tmp_path / "cartpole.zip"
    with zipfile.ZipFile(cartpole_zip) as old, zipfile.ZipFile(copied, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content if "1000002" not in name else old.read(old.namelist()[0]))
    other = import_archive(copied, tmp_path / "c.h5", "cartpole").provenance
    assert len({made.source_sha256, of_folder.source_sha256, other.source_sha256}) == 3


def test_at_least_one_episode_is_imported(tmp_path, cartpole_zip):
    with pytest.raises(UserError, match="--max-episodes: 0 is too small"):
        import_archive(cartpole_zip, tmp_path / "a.h5", "cartpole", max_episodes=0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_archive(tmp_path, cartpole_episodes):
    """The peak of resident memory does not grow with the number of episodes."""
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


def test_an_episode_that_the_system_cannot_open(tmp_path, cartpole_folder, monkeypatch):
    def fail(path):
        raise OSError(errno.EMFILE, "no more")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=r"Too many open files\): close other files or raise the limit"):
        import_archive(cartpole_folder, tmp_path / "a.h5", "cartpole")
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_reserved_before_an_episode_is_whole(tmp_path, monkeypatch):
    """60,000 false names would reserve 4.8 GB."""
    monkeypatch.setattr("ringrl.data.store.writer.reserve", lambda *_: pytest.fail("reserved"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(60):
            archive.writestr(f"buffer/episode_{number}_1000.npz", b"x")
    with pytest.raises(UserError, match=r"episode_0_1000\.npz cannot be read"):
        import_archive(tmp_path / "a.zip", tmp_path / "a.h5", "cartpole")
    assert names(tmp_path) == ["a.zip"]
