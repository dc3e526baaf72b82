"""The real `ringrl` command in a process that a test can interrupt."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

RINGRL = Path(sys.executable).with_name("ringrl")
TIMEOUT = 600.0  # seconds; a busy machine is no failure
KILL, CTRL_C, TERM = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
Moment = Callable[[], object]


class Ended(NamedTuple):
    """The end of a command."""

    code: int  # as in a shell: 128 + n after signal n
    error: str  # all of stderr

    @property
    def line(self) -> str:
        """RingRL's own last line, or else the last line of any."""
        lines = [line.strip() for line in self.error.splitlines() if not re.search(r"━|resource_tracker|^\s*$", line)]
        return ([line for line in lines if line.startswith("ringrl: ")] or lines or [""])[-1]

    def expect(self, code: int, message: str = "") -> None:
        """Check the exit code, that the last line matches, that code 2 comes with one line, and no traceback."""
        assert self.code == code, self.error[-2000:]
        assert "Traceback" not in self.error
        assert re.search(message, self.line), self.error[-2000:]
        if code == 2:
            assert self.error.count("ringrl: ") == 1, self.error


class Command:
    """A running `ringrl ...` in a process group of its own. The context manager kills what is left of it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [RINGRL, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"SOURCE_DATE_EPOCH": "0", "JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        )
        self.pid = self._process.pid

    def wait_for(self, moment: Moment) -> None:
        """Wait until the moment has come."""
        deadline = time.monotonic() + TIMEOUT
        while not moment():
            if self._process.poll() is not None and not moment():
                raise AssertionError(f"the command ended too early: {self.end().error[-2000:]}")
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command. Ctrl-C goes to its whole process group, as in a terminal."""
        assert self._process.poll() is None, "the command ended too early"
        (os.killpg if number == CTRL_C else os.kill)(self.pid, number)

    def worker(self) -> int:
        """Wait for a worker process and return its pid."""
        self.wait_for(self._workers)
        return self._workers()[0]

    def _workers(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):  # it has just ended
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.pid and b"spawn_main" in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
        return found

    def starve(self, spare: int, pid: int | None = None) -> None:
        """Limit a process (the command, or one of its workers) to `spare` bytes more memory than it uses now."""
        pid = pid or self.pid
        (used,) = re.findall(r"VmData:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
        resource.prlimit(pid, resource.RLIMIT_DATA, (int(used) * 1024 + spare, resource.RLIM_INFINITY))

    def end(self) -> Ended:
        """Wait for the command to end."""
        _, error = self._process.communicate(timeout=TIMEOUT)
        code = self._process.returncode
        return Ended(code if code >= 0 else 128 - code, error.decode(errors="replace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def run(arguments: Sequence[str]) -> Ended:
    """Run a command to its end."""
    return during(arguments, lambda: True, lambda command: None)


def during(arguments: Sequence[str], moment: Moment, act: Callable[[Command], object]) -> Ended:
    """Run a command and act at a moment."""
    with Command(arguments) as command:
        command.wait_for(moment)
        act(command)
        return command.end()


def stop(arguments: Sequence[str], moment: Moment, number: signal.Signals = KILL) -> Ended:
    """Run a command and send it a signal at a moment. Its exit code is then 128 + number, unless it handles that."""
    return during(arguments, moment, lambda command: command.send(number))


def lines(path: Path) -> int:
    """Return the number of whole lines of a file; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def names(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
