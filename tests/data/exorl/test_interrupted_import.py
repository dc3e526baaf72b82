"""An interrupted import leaves no store, and the same import writes the same bytes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ringrl.cli import main
from ringrl.data import EpisodeStore, import_archive
from ringrl.data.exorl import save_episode
from ringrl.errors import UserError
from tests.data.conftest import written_share

EPISODES = 12
UNFINISHED = ".a.h5.tmp"


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


def test_the_same_episodes_give_the_same_bytes(archive, destination, whole):
    calls = []
    progress = lambda *call: calls.append(call)  # noqa: E731
    import_archive(archive, destination, "cartpole", progress=progress)
    assert destination.read_bytes() == whole
    assert calls == [(done, EPISODES) for done in range(1, EPISODES + 1)]
    assert names(destination.parent) == ["a.h5"]


def test_an_interrupted_import_leaves_nothing(archive, destination, whole):
    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_archive(archive, destination, "cartpole", progress=stop)
    assert names(destination.parent) == []
    import_archive(archive, destination, "cartpole")
    assert destination.read_bytes() == whole


def test_the_process_of_a_killed_import_cannot_spoil_another(archive, destination, whole):
    orphan = os.open(destination.with_name(UNFINISHED), os.O_RDWR | os.O_CREAT)
    os.pwrite(orphan, b"remains" * 100_000, 0)

    def write_late(done: int, total: int) -> None:
        os.pwrite(orphan, bytes(100_000), 10_000)

    import_archive(archive, destination, "cartpole", progress=write_late)
    os.close(orphan)
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
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while written_share(destination.with_name(UNFINISHED)) < 0.2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    return process


@pytest.fixture
def long_archive(archive) -> Path:
    """An archive of 100 episodes, so that a process can be stopped during the import."""
    for number in range(EPISODES, 100):
        (archive / f"episode_{number:06d}_1000.npz").hardlink_to(archive / f"episode_{number % 3:06d}_1000.npz")
    return archive


def test_killed_process(tmp_path, long_archive, destination, capsys):
    """More kills: tests/faults/test_data.py."""
    process = start(tmp_path, long_archive, destination)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert names(destination.parent) == [".a.h5.lock", UNFINISHED]
    with pytest.raises(UserError, match="not an episode store"):
        EpisodeStore(destination.with_name(UNFINISHED))

    expected = import_archive(long_archive, tmp_path / "whole.h5", "cartpole")
    main(["data", "import", str(long_archive), "--domain=cartpole", f"--output={destination}"])
    assert "100 x 1000 steps" in capsys.readouterr().out
    assert destination.read_bytes() == expected.path.read_bytes()
    assert names(destination.parent) == ["a.h5"]


@pytest.mark.slow
def test_interrupted_command(tmp_path, long_archive, destination):
    process = start(tmp_path, long_archive, destination)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "ringrl: stopped; no store was written"
    assert names(destination.parent) == []


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


def test_full_disk(archive, destination):
    arguments = [sys.executable, "-c", textwrap.dedent(DISK_FULL), archive, destination]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "a.h5: the disk, a quota or a limit on file size is full" in run.stdout
    assert names(destination.parent) == []
