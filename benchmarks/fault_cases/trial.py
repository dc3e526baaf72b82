"""What is tried with every command, and how it is judged."""

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from fault_cases.disk import Disk
from fault_cases.process import Ended, run
from fault_cases.site import Site

KILLED, INTERRUPTED, TERMINATED, MENDABLE, WELL = 137, 130, 143, 2, 0


@dataclass
class Place:
    """The folder of one case, and the server that it may ask."""

    folder: Path
    site: Site | None = None


Moment = Callable[[Place], bool]
Deed = Callable[[Place], object]


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        name: what, in the words of the table.
        codes: exit codes that are right.
        says: a regular expression that the last line must match; none where nothing can be said.
        strike: runs the command and lets it happen.
        mend: what the user does about it before giving the command again.
        prepare: what is there before.
        on_disk: whether it happens on the disk that can be filled.
        accepted: why what fails here is as it is, where it is known and told.
    """

    name: str
    codes: Sequence[int]
    says: str | None
    strike: Callable[["Trial", Place], Ended]
    mend: Deed = lambda place: None
    prepare: Deed = lambda place: None
    on_disk: bool = False
    accepted: str | None = None


class Trial(ABC):
    """A command, what it makes when nothing goes wrong, and all that is to go wrong."""

    name: ClassVar[str]
    again_with: ClassVar[tuple[str, ...]] = ()  # what a second run is given besides

    def __init__(self, material: Path, reference: Path) -> None:
        self.material, self.reference = material, Place(reference)
        reference.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def command(self, place: Place) -> list[str]:
        """Its arguments."""

    @abstractmethod
    def faults(self, disk: Disk) -> Iterator[Fault]:
        """What is to happen to it."""

    @abstractmethod
    def kept(self, place: Place) -> str:
        """How much is there, in a word."""

    @abstractmethod
    def lost(self, place: Place) -> list[str]:
        """What is not as the undisturbed run has made it."""

    def begin(self, place: Place) -> None:  # noqa: B027
        """Make what a command finds."""

    def end(self, place: Place) -> None:  # noqa: B027
        """And what it leaves that is no file."""

    def again(self, place: Place) -> list[str]:
        """The arguments that go on."""
        return [*self.command(place), *self.again_with]

    def run_undisturbed(self) -> None:
        """Make the reference, unless it is there. RuntimeError where even that fails."""
        made = self.reference.folder.with_suffix(".made")
        if made.exists():
            return
        shutil.rmtree(self.reference.folder)
        self.reference.folder.mkdir()
        self.begin(self.reference)
        ended = run(self.command(self.reference))
        self.end(self.reference)
        if ended.code:
            raise RuntimeError(f"{self.name}, undisturbed: {ended.error}")
        made.touch()


@dataclass(frozen=True)
class Outcome:
    """A line of the table."""

    command: str
    fault: str
    code: int
    line: str
    kept: str
    next: str
    lost: list[str]
    problems: list[str]
    accepted: str | None
    said: str  # the end of stderr

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def play(trial: Trial, fault: Fault, folder: Path, disk: Disk) -> Outcome:
    """Let one fault happen, do what it asks for, give the command again, and compare."""
    place = Place((disk.folder if fault.on_disk else folder) / "case")
    shutil.rmtree(place.folder, ignore_errors=True)  # of a run that was cut short
    place.folder.mkdir(parents=True)
    trial.begin(place)
    try:
        fault.prepare(place)
        try:
            ended = fault.strike(trial, place)
        except RuntimeError as missed:
            ended = Ended(-1, f"{missed}")
        kept, following = trial.kept(place), "-"
        disk.free()
        problems = _judge(fault, ended)
        if lost := trial.lost(place):
            fault.mend(place)
            following = "as told"
            if lost := trial.lost(place):
                following = " ".join(["the same", *trial.again_with])
                second = run(trial.again(place))
                lost = trial.lost(place)
                if second.code:
                    problems.append(f"again: exit code {second.code}, {second.line}")
    finally:
        trial.end(place)
        disk.free()
        with suppress(OSError):
            shutil.rmtree(place.folder)
    line = ended.line.replace(str(place.folder), "...").replace(str(trial.material), "...")
    return Outcome(
        trial.name, fault.name, ended.code, line, kept, following, lost, problems, fault.accepted, ended.error[-4000:]
    )


def _judge(fault: Fault, ended: Ended) -> list[str]:
    problems = []
    if ended.code not in fault.codes:
        problems.append(f"exit code {ended.code}, not {' or '.join(map(str, fault.codes))}")
    if "Traceback" in ended.error:
        problems.append("a traceback")
    if ended.code == MENDABLE and ended.own_lines != 1:
        problems.append(f"{ended.own_lines} lines in place of one")
    if fault.says is not None and not re.search(fault.says, ended.line):
        problems.append(f"does not say {fault.says!r}")
    return problems
