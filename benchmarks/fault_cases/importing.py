"""ringrl data import."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_cases.damage import append, cut, flip, lines, names
from fault_cases.disk import Disk
from fault_cases.material import COLLECTED, COPIES, DOMAIN
from fault_cases.means import (
    CTRL_C,
    KILL,
    TERM,
    filled,
    full_from_the_start,
    killed,
    starved,
    undisturbed,
    worker_killed,
    worker_starved,
)
from fault_cases.process import Ended, run
from fault_cases.trial import INTERRUPTED, KILLED, MENDABLE, TERMINATED, WELL, Deed, Fault, Place, Trial

EPISODES, SOME = COLLECTED * COPIES, 30
GOES_ON = "run the same command again"
AGAIN = "(download|record|import) .*again"


class Import(Trial):
    """A folder of 120 episodes into a store, by two processes or one."""

    name = "import"
    workers = 2

    def begin(self, place: Place) -> None:
        self._archive(place).mkdir(parents=True)
        for file in (self.material / "long").iterdir():
            (self._archive(place) / file.name).symlink_to(file.resolve())

    def command(self, place: Place) -> list[str]:
        where = [str(self._archive(place)), "--domain", DOMAIN, "--output", str(self._store(place))]
        return ["data", "import", *where, "--workers", str(self.workers)]

    def kept(self, place: Place) -> str:
        if self._store(place).exists():
            return "the store"
        return f"{max(0, lines(self._journal(place)) - 1)} of {EPISODES} episodes"

    def lost(self, place: Place) -> list[str]:
        found, expected = (names(p.folder / "stores") for p in (place, self.reference))
        if found != expected:
            return [f"there is {', '.join(found) or 'nothing'}"]
        alike = self._store(place).read_bytes() == self._store(self.reference).read_bytes()
        return [] if alike else ["bytes of the store differ"]

    def _archive(self, place: Place) -> Path:
        return place.folder / "archive" / "jaco"  # whose last two names stand in the store

    def _store(self, place: Place) -> Path:
        return place.folder / "stores" / "jaco.h5"

    def _journal(self, place: Place) -> Path:
        return place.folder / "stores" / ".jaco.h5.partial.journal"

    def _part(self, place: Place) -> Path:
        return place.folder / "stores" / ".jaco.h5.partial"

    def _some(self, place: Place) -> bool:
        return lines(self._journal(place)) > SOME

    def faults(self, disk: Disk) -> Iterator[Fault]:
        yield Fault("kill -9 at the start", [KILLED], None, killed(KILL, lambda place: self._part(place).exists()))
        yield Fault("kill -9 after 30 episodes", [KILLED], None, killed(KILL, self._some))
        yield Fault("kill -9 before the last", [KILLED], None,
                    killed(KILL, lambda place: lines(self._journal(place)) >= EPISODES - 2))  # fmt: skip
        yield Fault("kill -9 of a worker", [MENDABLE], GOES_ON, worker_killed(self._some))
        yield Fault("Ctrl-C", [INTERRUPTED], "what was finished is kept", killed(CTRL_C, self._some, to_all=True))
        yield Fault("SIGTERM", [TERMINATED], None, killed(TERM, self._some))
        full = "(free some space|write elsewhere)"
        yield Fault("disk full beforehand", [MENDABLE], full, full_from_the_start(disk), on_disk=True)
        yield Fault("disk half full beforehand", [MENDABLE], full, full_from_the_start(disk, 2**20), on_disk=True)
        yield Fault("disk fills meanwhile", [MENDABLE], full, filled(disk, self._some), on_disk=True)
        begun = lambda place: self._part(place).exists()  # noqa: E731
        yield Fault("no more memory, one process", [MENDABLE], "memory", starved(2**20, begun, "--workers", "1"),
                    accepted="a library that is loaded without memory fails in words of its own")  # fmt: skip
        yield Fault("a worker has no more memory", [MENDABLE], "memory", worker_starved(32 * 2**20))
        yield from self._damaged_archive()
        yield from self._damaged_part()
        yield from self._damaged_store()

    def _damaged_archive(self) -> Iterator[Fault]:
        def episode(place: Place) -> Path:
            return self._archive(place) / f"episode_{EPISODES // 2:06d}_250.npz"

        def put_back(place: Place) -> None:
            episode(place).unlink(missing_ok=True)
            episode(place).symlink_to((self.material / "long" / episode(place).name).resolve())

        for what, deed in (
            ("cut short", lambda place: cut(episode(place))),
            ("with a flipped bit", lambda place: flip(episode(place))),
            ("empty", lambda place: cut(episode(place), 0)),
        ):
            yield Fault(f"an episode {what}", [MENDABLE], AGAIN, undisturbed, put_back, deed)

    def _damaged_part(self) -> Iterator[Fault]:
        """What a killed import left is damaged as well."""

        def stopped(deed: Deed) -> Deed:
            def prepare(place: Place) -> None:
                killed(KILL, self._some)(self, place)
                deed(place)

            return prepare

        for what, deed in (
            ("journal with half a last line", lambda place: append(self._journal(place), '{"episode": 99, "rec')),
            ("journal cut short", lambda place: cut(self._journal(place))),
            ("journal with a flipped bit", lambda place: flip(self._journal(place))),
            ("journal gone", lambda place: self._journal(place).unlink()),
            ("part cut short", lambda place: os.truncate(self._part(place), self._part(place).stat().st_size // 9)),
            ("part with a flipped bit", lambda place: _flip_in_place(self._part(place))),
            ("part gone", lambda place: self._part(place).unlink()),
        ):
            yield Fault(f"killed, and {what}", [WELL], None, undisturbed, prepare=stopped(deed))

    def _damaged_store(self) -> Iterator[Fault]:
        """Asked for with `ringrl data info --verify`, mended by `--overwrite`."""

        def finished(deed: Deed) -> Deed:
            def prepare(place: Place) -> None:
                run(self.command(place))
                deed(place)

            return prepare

        def overwrite(place: Place) -> None:
            run([*self.command(place), "--overwrite"])

        def looked_at(trial: Trial, place: Place) -> Ended:
            return run(["data", "info", str(self._store(place)), "--verify"])

        damages: list[tuple[str, Callable[[Path], None]]] = [
            ("cut short", cut),
            ("cut by a byte", lambda store: cut(store, 1 - 1 / store.stat().st_size)),
            ("empty", lambda store: cut(store, 0)),
            *((f"with a flipped bit at {share:.1%}", lambda store, share=share: flip(store, share))
              for share in (0.0001, 0.001, 0.25, 0.5, 0.75, 0.999)),
        ]  # fmt: skip
        for what, damage in damages:
            deed: Deed = lambda place, damage=damage: damage(self._store(place))  # noqa: E731
            yield Fault(f"store {what}: data info --verify", [MENDABLE], AGAIN, looked_at, overwrite, finished(deed))


def _flip_in_place(path: Path) -> None:
    """Of a file that is known by its descriptor."""
    with path.open("r+b") as file:
        file.seek(2_000_000)
        (byte,) = file.read(1)
        file.seek(2_000_000)
        file.write(bytes([byte ^ 16]))
