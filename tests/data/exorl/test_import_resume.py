"""A resumed import writes the same bytes as an uninterrupted one."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import pytest

from ringrl.cli import main
from ringrl.data import EpisodeStore, import_archive
from ringrl.data.exorl import save_episode
from ringrl.data.store.format import dataset_name
from ringrl.data.store.writer import hidden_name
from ringrl.errors import UserError
from tests.data.conftest import finished_episodes

EPISODES = 12
REMAINS = [".a.h5.partial"]


def overwrite(path: Path, key: str, row: int, content: bytes) -> None:
    """Change bytes of an array in an unfinished store."""
    with h5py.File(path, "r") as file:
        dataset = file[dataset_name(key)]
        place = dataset.id.get_offset() + row * dataset.nbytes // dataset.shape[0]
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


@pytest.fixture(autouse=True)
def same_day(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")


@pytest.fixture
def archive(tmp_path, cartpole_episodes) -> Path:
    """A folder of twelve episodes: four copies of three episodes."""
    folder = tmp_path / "archive" / "buffer"
    folder.mkdir(parents=True)
    originals = list(cartpole_episodes.values())
    for number in range(EPISODES):
        save_episode(folder, number, originals[number % 3])
    return folder


@pytest.fixture
def whole(tmp_path, archive) -> bytes:
    """The bytes of the store that an uninterrupted import writes."""
    return import_archive(archive, tmp_path / "whole.h5", "cartpole").path.read_bytes()


@pytest.fixture
def destination(tmp_path) -> Path:
    (tmp_path / "stores").mkdir()
    return tmp_path / "stores" / "a.h5"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_after(archive: Path, destination: Path, episodes: int, **options) -> None:
    def stop(done: int, total: int) -> None:
        if done == episodes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_archive(archive, destination, "cartpole", progress=stop, **options)
    assert names(destination.parent) == REMAINS


def garble(path: Path) -> None:
    """Replace a file by zeros of the same size and time, so that reading it fails."""
    state = path.stat()
    path.write_bytes(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_the_same_episodes_give_the_same_bytes(archive, destination, whole):
    calls = []
    progress = lambda *call: calls.append(call)  # noqa: E731
    import_archive(archive, destination, "cartpole", progress=progress)
    assert destination.read_bytes() == whole
    assert calls == [(done, EPISODES) for done in range(1, EPISODES + 1)]
    assert names(destination.parent) == ["a.h5"]


def test_finished_episodes_are_not_read_again(archive, destination, whole):
    stop_after(archive, destination, 7)
    for number in range(7):
        garble(archive / f"episode_{number:06d}_1000.npz")
    import_archive(archive, destination, "cartpole")
    assert destination.read_bytes() == whole
    assert names(destination.parent) == ["a.h5"]


def test_rows_that_did_not_reach_the_disk_are_imported_again(archive, destination, whole):
    stop_after(archive, destination, 7)
    overwrite(hidden_name(destination), "physics", 3 * 1001 + 1, bytes(100))
    overwrite(hidden_name(destination), "reward/cartpole_swingup", 5 * 1001 + 500, b"lost")
    import_archive(archive, destination, "cartpole")
    assert destination.read_bytes() == whole


def test_another_import_starts_anew(tmp_path, archive, destination, cartpole_episodes):
    for name, options in (("b", {"max_episodes": 9}), ("c", {"tasks": ["cartpole_swingup"]})):
        stop_after(archive, destination, 7)
        other = import_archive(archive, destination, "cartpole", **options)
        expected = import_archive(archive, tmp_path / f"{name}.h5", "cartpole", **options)
        assert other.path.read_bytes() == expected.path.read_bytes()
        destination.unlink()

    stop_after(archive, destination, 7)
    save_episode(archive, 0, cartpole_episodes[1_000_000])  # changes content and time
    other = import_archive(archive, destination, "cartpole")
    other.verify()
    assert (other.episode(0)["physics"] == cartpole_episodes[1_000_000]["physics"]).all()


def test_a_file_changed_meanwhile_is_read_again(archive, destination):
    stop_after(archive, destination, 7)
    changed = archive / "episode_000002_1000.npz"
    changed.write_bytes(bytes(changed.stat().st_size))
    with pytest.raises(UserError, match=r"episode_000002_1000\.npz cannot be read"):
        import_archive(archive, destination, "cartpole")


def test_the_process_of_a_stopped_import_cannot_spoil_another(archive, destination):
    stop_after(archive, destination, 7)
    orphan = os.open(hidden_name(destination), os.O_RDWR)

    def write_late(done: int, total: int) -> None:
        os.pwrite(orphan, bytes(100_000), 10_000)

    options = {"tasks": ["cartpole_swingup"]}
    import_archive(archive, destination, "cartpole", progress=write_late, **options).verify()
    os.close(orphan)


@pytest.mark.parametrize("damage", [b"", b"\x89HDF"])
def test_damaged_unfinished_store(archive, destination, whole, damage):
    stop_after(archive, destination, 7)
    with hidden_name(destination).open("r+b") as file:
        file.write(damage + bytes(200))
    import_archive(archive, destination, "cartpole")
    assert destination.read_bytes() == whole


def test_stopped_between_the_last_byte_and_the_name(archive, destination, whole):
    import_archive(archive, destination, "cartpole")
    destination.rename(hidden_name(destination))
    stop_after(archive, destination, 7)
    with pytest.raises(UserError, match="not an episode store"):
        EpisodeStore(hidden_name(destination))
    import_archive(archive, destination, "cartpole")
    assert destination.read_bytes() == whole


def test_two_imports_of_one_store(archive, destination, whole):
    def second(done: int, total: int) -> None:
        if done == 3:
            with pytest.raises(UserError, match="another process is writing it"):
                import_archive(archive, destination, "cartpole")

    import_archive(archive, destination, "cartpole", progress=second)
    assert destination.read_bytes() == whole


# Whole processes


IMPORT = """
    import sys
    from ringrl.cli import main

    if __name__ == "__main__":
        main(["data", "import", sys.argv[1], "--domain", "cartpole", "--output", sys.argv[2], *sys.argv[3:]])
"""


def start(tmp_path: Path, archive: Path, destination: Path) -> subprocess.Popen:
    (script := tmp_path / "script.py").write_text(textwrap.dedent(IMPORT))
    arguments = [sys.executable, script, archive, destination]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_episodes(destination: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while finished_episodes(hidden_name(destination)) < number:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)


@pytest.fixture
def long_archive(archive) -> Path:
    """An archive of 100 episodes, so that a process can be stopped during the import."""
    for number in range(EPISODES, 100):
        (archive / f"episode_{number:06d}_1000.npz").hardlink_to(archive / f"episode_{number % 3:06d}_1000.npz")
    return archive


def test_killed_process(tmp_path, long_archive, destination, capsys):
    """More kills: tests/faults/test_data.py."""
    process = start(tmp_path, long_archive, destination)
    wait_for_episodes(destination, 20, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert names(destination.parent) == sorted([*REMAINS, ".a.h5.lock"])
    assert finished_episodes(hidden_name(destination)) < 100
    with pytest.raises(UserError, match="not an episode store"):
        EpisodeStore(hidden_name(destination))

    expected = import_archive(long_archive, tmp_path / "whole.h5", "cartpole")
    main(["data", "import", str(long_archive), "--domain=cartpole", f"--output={destination}"])
    assert "100 x 1000 steps" in capsys.readouterr().out
    assert destination.read_bytes() == expected.path.read_bytes()
    assert names(destination.parent) == ["a.h5"]


@pytest.mark.slow
def test_interrupted_command(tmp_path, long_archive, destination):
    process = start(tmp_path, long_archive, destination)
    wait_for_episodes(destination, 20, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "run the same command again" in errors
    assert names(destination.parent) == REMAINS
    import_archive(long_archive, destination, "cartpole").verify()


DISK_FULL = """
    import resource, sys
    from ringrl.data import import_archive
    from ringrl.errors import UserError

    def fill(done, total):
        if done == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    try:
        import_archive(sys.argv[1], sys.argv[2], "cartpole", progress=fill)
    except UserError as error:
        print(error)
"""


def test_full_disk(archive, destination, whole):
    arguments = [sys.executable, "-c", textwrap.dedent(DISK_FULL), archive, destination]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "a.h5: the disk, a quota or a limit on file size is full" in run.stdout
    assert run.stdout.endswith("finished episodes are kept: run the same command again to resume\n")
    assert names(destination.parent) == REMAINS
    import_archive(archive, destination, "cartpole")
    assert destination.read_bytes() == whole
