"""The real command line in a real process, which can be met in the middle of its work."""

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
from types import TracebackType
from typing import NamedTuple, Self

RINGRL = Path(sys.executable).with_name("ringrl")
PATIENCE = 120.0  # seconds for a command to come to a moment, or to its end
LOOK = 0.001  # seconds between two looks


class Ended(NamedTuple):
    """How a command ended."""

    code: int  # as a shell has it: 128 + n where signal n ended it
    error: str  # all of stderr

    @property
    def line(self) -> str:
        """What the user sees last: RingRL's own last line if it has one, else the last of any.

        But for progress bars, and for what Python's resource tracker says when a process with workers was killed.
        """
        lines = [line.strip() for line in self.error.splitlines() if not re.search(r"━|resource_tracker|^\s*$", line)]
        own = [line for line in lines if line.startswith("ringrl: ")]
        return (own or lines or [""])[-1]

    @property
    def own_lines(self) -> int:
        """How many lines begin as RingRL's last word does."""
        return sum(line.startswith("ringrl: ") for line in self.error.splitlines())


class Command:
    """A running `ringrl ...`, the first of its own process group, as a context manager that leaves none behind."""

    def __init__(self, arguments: Sequence[str], through: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*through, RINGRL, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"SOURCE_DATE_EPOCH": "0", "JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        )
        self.pid, self._ended = self._process.pid, False

    def wait_for(self, moment: Callable[[], bool]) -> None:
        """Until the moment has come; RuntimeError where the command ends before."""
        deadline = time.monotonic() + PATIENCE
        while not moment():
            if self._process.poll() is not None and not moment():
                raise RuntimeError(f"it ended before it could be met: {self.end().error[-500:]}")
            if time.monotonic() > deadline:
                raise RuntimeError("the moment never came")
            time.sleep(LOOK)

    def send(self, number: signal.Signals, *, to_all: bool = False) -> None:
        """A signal to the command alone, or to all its processes, as a terminal's Ctrl-C goes."""
        if self._process.poll() is not None:
            raise RuntimeError("it ended before it could be met")
        (os.killpg if to_all else os.kill)(self.pid, number)

    def workers(self) -> list[int]:
        """Processes that it started to do the work."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.pid and b"spawn_main" in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
            except (OSError, ValueError):
                continue  # it has just ended
        return found

    def starve(self, spare: int, pid: int | None = None) -> None:
        """Allow a process (the command, or one of its workers) only `spare` bytes more memory than it has by now."""
        pid = pid or self.pid
        status = Path(f"/proc/{pid}/status").read_text()
        (used,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
        resource.prlimit(pid, resource.RLIMIT_DATA, (used + spare, resource.RLIM_INFINITY))

    def end(self) -> Ended:
        """Wait for it."""
        try:
            _, error = self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise RuntimeError("it hangs, or has left a process behind") from None
        self._ended, code = True, self._process.returncode
        return Ended(code if code >= 0 else 128 - code, error.decode(errors="replace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._ended:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.communicate()


def run(arguments: Sequence[str]) -> Ended:
    """A command from its beginning to its end, undisturbed."""
    with Command(arguments) as command:
        return command.end()
