"""Errors of worker processes name their cause."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from ringrl.errors import UserError
from ringrl.processes import worker_processes

SCRIPT = """
from ringrl.processes import worker_processes

with worker_processes(2, print, (), "import") as pool:
    print(list(pool.map(abs, [-1, -2])))
"""


def run(arguments: list[str | Path], content: str, timeout: float = 120) -> tuple[str, str]:
    """Return the output and the errors of a Python process, to which its workers may write last."""
    done = subprocess.run(
        [sys.executable, *arguments], input=content, capture_output=True, text=True, check=False, timeout=timeout
    )
    return done.stdout, done.stderr


def test_a_script_from_standard_input() -> None:
    assert (
        "could not import your script. Use one worker (--workers 1), or save the script as a file"
        in run(["-"], SCRIPT)[1]
    )


def test_a_script_without_its_guard(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert "or save the script as a file and start the import under `if" in run([tmp_path / "script.py"], "")[1]
    guarded = SCRIPT.replace("\nwith", "\nif __name__ == '__main__':\n  with").replace("    print", "      print")
    (tmp_path / "script.py").write_text(guarded)
    assert "[1, 2]" in run([tmp_path / "script.py"], "")[0]


def fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number), "a.h5")


def test_a_failure_of_the_start_is_reported() -> None:
    with (
        pytest.raises(UserError, match=r"process of the import could not start: a\.h5: Too many open files"),
        worker_processes(1, fail, (errno.EMFILE,), "import") as pool,
    ):
        list(pool.map(abs, [1]))


KILLED = """
import os, pathlib, signal, time
from ringrl.processes import worker_processes

waiting = pathlib.Path(__file__).with_name("waiting")

def die_or_wait(number):
    if number:
        waiting.touch()
        time.sleep(60)
    while not waiting.exists():  # the other process has started
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with worker_processes(2, print, (), "import") as pool:
        list(pool.map(die_or_wait, range(20)))  # more than the executor's queue holds
"""


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(KILLED)
    assert "a worker process of the import died" in run([tmp_path / "script.py"], "", timeout=50)[1]


@pytest.mark.parametrize("name", ["ProcessPoolExecutor", "ProcessPoolExecutor.submit"])
def test_missing_shared_memory_or_processes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*arguments: object, **keywords: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ringrl.processes.{name}", full)
    expected = r"cannot start \(No space left on device\): check /dev/shm.*--workers 1"
    with pytest.raises(UserError, match=expected), worker_processes(2, print, (), "import"):
        pytest.fail("started")
