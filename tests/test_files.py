"""Files that appear whole or not at all, and locks between processes."""

import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ringrl.errors import UserError
from ringrl.files import lock, raise_unreadable, write_aside, write_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from ringrl.files import write_whole

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), "new", alone=sys.argv[2] == "alone")
"""

HOLDER = """
import sys, time
from pathlib import Path
from ringrl.files import lock

with lock(Path(sys.argv[1]), "is writing it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("alone", [True, False])
def test_text_and_bytes_replace_the_old_file(tmp_path: Path, alone: bool) -> None:
    path = tmp_path / "file.json"
    for content in ("ä\n", b"\xff\x00", ""):
        write_whole(path, content, alone=alone)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("alone", [True, False])
def test_the_content_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    seen: list[str] = []

    def stopped(descriptor: int) -> None:
        seen.append(path.read_text())
        assert os.fstat(descriptor).st_size == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new", alone=alone)
    assert seen == ["old"]
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"], "no temporary file is left"


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit on file size acts as the full disk."""
    path = tmp_path / "file"
    write_whole(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "no" / "file", "")


@pytest.mark.parametrize("how", ["alone", "together"])
def test_a_kill_keeps_the_old_file(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), how], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".file.")
    write_whole(path, "newer")
    assert path.read_text() == "newer"
    assert left.exists() == (how == "together"), "the next writer of the same hidden name removes the file"


def test_a_folder_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino) or fsync(descriptor))
    target = tmp_path / "folder"
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "old").touch()  # left by a kill
    with write_aside(target) as growing:
        (growing / "inner").mkdir(parents=True)
        (growing / "inner" / "file").write_text("whole")
        assert not target.exists()
    assert [file.name for file in target.rglob("*")] == ["inner", "file"]
    assert (target / "inner" / "file").stat().st_ino in synced
    with pytest.raises(RuntimeError), write_aside(tmp_path / "other") as growing:
        fail_in(growing)
    assert list(tmp_path.iterdir()) == [target]


def fail_in(folder: Path) -> None:
    folder.mkdir()
    raise RuntimeError


def no_flock(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("flock", [True, False])
def test_one_holder_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool) -> None:
    if not flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    path = tmp_path / "folder" / "store.h5"
    for _ in range(2):
        with lock(path, "is writing it"):
            with pytest.raises(UserError) as error, lock(path, "is writing it"):
                pytest.fail("two holders")
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            remedy = "" if flock else f", or delete {path.parent}/.store.h5.lock.soft if that process was killed"
            assert str(error.value) == f"{path}: another process is writing it ({holder}); wait for it{remedy}"
            with lock(tmp_path / "folder" / "other.h5", "is writing it"):
                pass
        assert list(path.parent.iterdir()) == []


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "store.h5"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"), lock(path, "is writing it"):
            pytest.fail("two holders")
        process.kill()
    with lock(path, "is writing it"):
        pass


def test_waiting_for_the_holder(tmp_path: Path) -> None:
    path, order = tmp_path / "results.jsonl", []
    waits = threading.Event()

    def second() -> None:
        waits.set()
        with lock(path, "is appending", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with lock(path, "is appending", file=tmp_path / "own"):
        assert (tmp_path / "own").exists()
    with lock(path, "is appending"):
        thread.start()
        waits.wait()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_of_the_next_holder_is_kept(tmp_path: Path) -> None:
    """A folder that is deleted together with its lock file may be created again by another process."""
    file = tmp_path / "lock"
    with lock(tmp_path, "is running", file=file):
        file.unlink()
        with lock(tmp_path, "is running", file=file):
            pass
        file.touch()
    assert file.exists()


def test_marker_files_replace_missing_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, marker = tmp_path / "store.h5", tmp_path / ".store.h5.lock.soft"
    code = (
        f"import errno, fcntl\ndef fail(*_): raise OSError(errno.ENOSYS, 'no such call')\nfcntl.flock = fail\n{HOLDER}"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        assert capfd.readouterr().err.count("no file locks (no such call)") == 1
        monkeypatch.setattr(fcntl, "flock", no_flock)
        with pytest.raises(UserError, match=f"process {process.pid} on .*delete .*soft"), lock(path, "is writing it"):
            pytest.fail("two holders")
        process.kill()
    assert marker.exists()
    for _ in range(2):
        with lock(path, "is writing it"):
            assert marker.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_written_and_locked(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "scratch" / "file", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to("scratch/file")
    with lock(target, "is writing it"), pytest.raises(UserError), lock(link, "is writing it"):
        pytest.fail("two holders")
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.EMFILE, "Unable to synchronously open file (errno = 24)"), "Too many open files.*ulimit -n"),
        (PermissionError(errno.EACCES, "denied"), "ask its owner"),
        (OSError(errno.ESTALE, "stale"), "try again"),
        (OSError("file is already open for write (may use <h5clear file>)"), "open for writing in another .*h5clear"),
    ],
)
def test_failures_of_the_system_are_not_called_damage(error: OSError, advice: str) -> None:
    with pytest.raises(UserError, match=rf"a\.h5: .*{advice}"):
        raise_unreadable("a.h5", error)


def test_missing_memory_is_not_called_damage() -> None:
    with pytest.raises(MemoryError):
        raise_unreadable("a.h5", OSError(errno.ENOMEM, "mmap"))
    raise_unreadable("a.h5", OSError("truncated file"))
    raise_unreadable("a.h5", OSError(errno.EIO, "bad sector"))
