"""Files that are there whole or not at all."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ringrl.files import write_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from ringrl.files import write_whole

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), "new", alone=sys.argv[2] == "alone")
"""


@pytest.mark.parametrize("alone", [True, False])
def test_text_and_bytes_take_the_place_of_what_was_there(tmp_path: Path, alone: bool) -> None:
    path = tmp_path / "file.json"
    for content in ("ä\n", b"\xff\x00", ""):
        write_whole(path, content, alone=alone)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("alone", [True, False])
def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
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
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"], "and nothing is left"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on file size stands for it."""
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
def test_a_kill_leaves_what_was_there(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), how], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".file.")
    write_whole(path, "newer")
    assert path.read_text() == "newer"
    assert left.exists() == (how == "together"), "one name, which the next try takes away"
