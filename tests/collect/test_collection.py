import multiprocessing
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ringrl.collect import collect
from ringrl.data import EpisodeStore, import_archive
from ringrl.data.exorl import Archive
from ringrl.envs import DOMAINS
from ringrl.errors import UserError

TASK = "cartpole_swingup"


def _contents(folder: Path) -> list[dict[str, np.ndarray]]:
    with Archive(folder, DOMAINS["cartpole"]) as archive:
        return [archive.read(member) for member in archive.members]


def _same(one: Path, other: Path) -> bool:
    pairs = zip(_contents(one), _contents(other), strict=True)
    return all(np.array_equal(a[key], b[key]) for a, b in pairs for key in a)


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    return collect(TASK, tmp_path_factory.mktemp("collect") / "new" / "cartpole", episodes=80, seed=1, workers=1)


def test_the_layout_is_that_of_exorl(collected):
    assert sorted(path.name for path in collected.iterdir()) == ["buffer", "collection.json"]
    names = sorted(path.name for path in (collected / "buffer").iterdir())
    assert names == [f"episode_{number:06d}_1000.npz" for number in range(80)]
    with np.load(collected / "buffer" / names[7], allow_pickle=False) as file:
        episode = dict(file)
    widths = {"observation": 5, "action": 1, "reward": 1, "discount": 1, "physics": 4}
    assert {key: array.shape for key, array in episode.items()} == {key: (1001, width) for key, width in widths.items()}
    assert all(array.dtype == (np.float64 if key == "physics" else np.float32) for key, array in episode.items())
    assert not episode["action"][0].any()
    assert not episode["reward"][0].any()
    assert (episode["discount"] == 1).all()
    assert np.abs(episode["action"]).max() <= 1


def test_a_collection_can_be_imported_and_its_task_is_recognised(collected, tmp_path):
    store = import_archive(collected, tmp_path / "store.h5", "cartpole")
    assert (store.num_episodes, store.recorded_task) == (80, TASK)
    np.testing.assert_array_equal(store.episode(3)["reward"][:, 0], store.episode(3)[f"reward/{TASK}"])


def test_a_collection_in_the_maze_records_all_tasks_and_can_be_imported(tmp_path):
    tasks = DOMAINS["point_mass_maze"].tasks
    folder = collect(tasks[1], tmp_path / "maze", episodes=4, seed=0, workers=1)
    store = import_archive(folder, tmp_path / "maze.h5", "point_mass_maze")
    assert (store.num_episodes, store.recorded_task) == (4, None)
    assert store.episode(0)["reward"].shape == (1001, 4)
    for column, task in enumerate(tasks):
        np.testing.assert_allclose(store.arrays["reward"][:, column], store.arrays[f"reward/{task}"], atol=1e-7)


def test_a_collection_with_a_goal_of_its_own_reaches_it_and_is_relabelled_for_chosen_tasks(tmp_path):
    own, elsewhere = "point_mass_maze_reach(0.2,-0.08)", "point_mass_maze_reach(-0.2,0.08)"
    folder = collect(own, tmp_path / "maze", episodes=6, seed=0, workers=1)
    tasks = (own, elsewhere, "point_mass_maze_reach_bottom_right")
    store = import_archive(folder, tmp_path / "maze.h5", "point_mass_maze", tasks=tasks)
    assert store.tasks == EpisodeStore(store.path).tasks == tasks
    assert store.episode(0)["reward"].shape == (1001, 4)
    returns = np.array([store.returns(task) for task in tasks])
    assert (returns[0] > 200).sum() >= 3
    assert (returns[1] < 1e-6).all()
    assert import_archive(folder, store.path, "point_mass_maze", tasks=tasks).path == store.path
    with pytest.raises(UserError, match="exists"):
        import_archive(folder, store.path, "point_mass_maze", tasks=tasks[:2])
    with pytest.raises(UserError, match="walker_walk is not a task of point_mass_maze"):
        import_archive(folder, tmp_path / "b.h5", "point_mass_maze", tasks=("walker_walk",))
    with pytest.raises(UserError, match="method td3 does not record this task: use scripted"):
        collect(own, tmp_path / "td3", episodes=2, seed=0, method="td3")


def test_returns_improve(collected):
    returns = np.array([episode["reward"].sum() for episode in _contents(collected)])
    poor, good = returns[:20], returns[-20:]
    assert good.mean() > 1.4 * poor.mean()
    assert np.quantile(returns, 0.1) < 300
    assert returns.max() > 700
    assert 350 < returns.mean() < 650


def test_arrays_depend_on_the_seed_and_not_on_the_workers(tmp_path):
    # more than one generation, so that updates of the search are compared
    for name, seed, workers, episodes in (("one", 5, 1, 12), ("two", 5, 2, 12), ("other", 6, 1, 1)):
        collect(TASK, tmp_path / name, episodes=episodes, seed=seed, workers=workers)
    assert _same(tmp_path / "one", tmp_path / "two")
    starts = [_contents(tmp_path / name)[0]["physics"][0] for name in ("one", "other")]
    assert not np.array_equal(*starts)


def test_progress_is_called_after_every_episode(tmp_path):
    calls: list[tuple[int, int]] = []
    collect(TASK, tmp_path / "new", episodes=3, seed=0, workers=1, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "cartpole_swingupp"}, "cartpole_swingup"),
        ({"episodes": 0}, "--episodes: 0 is too small; give at least 1"),
        ({"seed": -1}, "--seed: -1 is too small; give at least 0"),
        ({"workers": 0}, "--workers: 0 is too small; give at least 1"),
        ({"method": "ddpg"}, "no method 'ddpg'; methods are scripted, td3"),
        ({"method": "td3", "workers": 2}, "workers is 2, but method td3 learns in one process"),
    ],
)
def test_bad_arguments_are_rejected_before_any_file_is_written(tmp_path, changes, message):
    arguments = {"task": TASK, "episodes": 1, "seed": 0, "workers": 1} | changes
    with pytest.raises(UserError, match=message):
        collect(arguments.pop("task"), tmp_path / "new", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_existing_destination_is_kept_unless_it_is_empty(tmp_path):
    taken, file, empty = tmp_path / "taken", tmp_path / "file", tmp_path / "empty"
    taken.mkdir()
    empty.mkdir()
    (taken / "precious").write_text("data")
    file.write_text("data")
    for destination in (taken, file):
        with pytest.raises(UserError, match=f"{destination}: exists and is neither an empty folder nor"):
            collect(TASK, destination, episodes=1, seed=0, workers=1)
    assert (taken / "precious").read_text() == file.read_text() == "data"
    assert len(_contents(collect(TASK, empty, episodes=1, seed=0, workers=1))) == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted collection."""
    return collect(TASK, tmp_path_factory.mktemp("whole") / "new", episodes=22, seed=0, workers=1)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_interrupted_collection_continues_to_the_same_episodes(whole, tmp_path, workers):
    def interrupt(done: int, total: int) -> None:
        if done == 13:  # in the second generation
            assert not (tmp_path / "new").exists()  # not under its final name yet
            raise KeyboardInterrupt

    arguments = {"episodes": 22, "seed": 0, "workers": workers}
    with pytest.raises(KeyboardInterrupt):
        collect(TASK, tmp_path / "new", **arguments, progress=interrupt)
    assert not multiprocessing.active_children()
    finished = list(tmp_path.glob(".new.partial/buffer/*.npz"))
    assert 13 <= len(finished) < 22
    times = {path.name: path.stat().st_mtime_ns for path in finished}
    assert len(_contents(tmp_path / ".new.partial")) == len(finished)  # readable before the collection is complete
    collect(TASK, tmp_path / "new", **arguments | {"workers": 1})
    assert all((tmp_path / "new" / "buffer" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert _same(tmp_path / "new", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_finished_collection_is_kept(tmp_path):
    collect(TASK, tmp_path / "new", episodes=2, seed=0, workers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / ".new.lock").touch()  # left by a kill after the rename
    assert collect(TASK, tmp_path / "new", episodes=2, seed=0, workers=1) == tmp_path / "new"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(UserError, match="nor this collection"):
        collect(TASK, tmp_path / "new", episodes=2, seed=1, workers=1)
    next(tmp_path.glob("new/buffer/*")).unlink()
    with pytest.raises(UserError, match="nor this collection"):
        collect(TASK, tmp_path / "new", episodes=2, seed=0, workers=1)


def test_a_collection_does_not_continue_another_one(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    arguments = {"episodes": 4, "seed": 0, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        collect(TASK, tmp_path / "new", **arguments, progress=interrupt)
    for change in ({"episodes": 5}, {"seed": 1}, {"method": "td3"}):
        with pytest.raises(UserError, match=r"\.new\.partial contains part of another collection"):
            collect(TASK, tmp_path / "new", **arguments | change)
    with pytest.raises(UserError, match="part of another collection"):
        collect("cartpole_balance", tmp_path / "new", **arguments)
    assert len(list(tmp_path.glob(".new.partial/buffer/*.npz"))) == 2
    damaged = tmp_path / ".new.partial" / "buffer" / "episode_000001_1000.npz"
    damaged.write_bytes(b"x")
    with pytest.raises(UserError, match=r"episode_000001_1000\.npz cannot be read"):
        collect(TASK, tmp_path / "new", **arguments)


def test_an_interruption_before_the_first_episode_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("ringrl.collect.scripted.save_episode", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(TASK, tmp_path / "new", episodes=2, seed=0, workers=1)
    assert not list(tmp_path.iterdir())


def _interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_leaves_no_files(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(UserError, match=r"new: the disk, a quota or a limit on file size is full .*: free"):
            collect(TASK, tmp_path / "new", episodes=2, seed=0, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_destination_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("data")
    with pytest.raises(UserError, match="cannot be written"):
        collect(TASK, tmp_path / "file" / "new", episodes=1, seed=0, workers=1)


@pytest.mark.slow
def test_a_dead_worker_keeps_the_finished_episodes(tmp_path):
    def kill_the_workers(done: int, total: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(UserError, match="--workers 1"):
        collect(TASK, tmp_path / "new", episodes=200, seed=0, workers=2, progress=kill_the_workers)
    assert [path.name for path in tmp_path.iterdir()] == [".new.partial"]


def test_two_collections_do_not_share_a_destination(tmp_path):
    def collect_the_same(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another process is collecting into it"):
            collect(TASK, tmp_path / "new", episodes=1, seed=0, workers=1)

    folder = collect(TASK, tmp_path / "new", episodes=2, seed=0, workers=1, progress=collect_the_same)
    assert len(_contents(folder)) == 2


_ENDLESS = """
import multiprocessing, sys
from pathlib import Path
from ringrl.collect import collect
if __name__ == "__main__":
    tell = lambda done, total: print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    collect("cartpole_swingup", Path(sys.argv[1]), episodes=100_000, seed=0, workers=2, progress=tell)
"""


def _is_running(process: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
def test_a_kill_ends_all_processes_and_keeps_the_finished_episodes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_ENDLESS)
    with subprocess.Popen([sys.executable, script, tmp_path / "new"], stdout=subprocess.PIPE, text=True) as process:
        workers = process.stdout.readline().split()
        process.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    patience = time.monotonic() + 10
    while any(map(_is_running, workers)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(_is_running, workers))
    assert list(tmp_path.glob(".new.partial/buffer/*.npz"))
    assert not (tmp_path / "new").exists()
    import_archive(tmp_path / ".new.partial", tmp_path / "store.h5", "cartpole")
