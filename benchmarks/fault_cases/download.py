"""ringrl data download."""

from collections.abc import Iterator
from pathlib import Path

from fault_cases.damage import append, cut, flip, names
from fault_cases.disk import Disk
from fault_cases.means import CTRL_C, KILL, TERM, filled, full_from_the_start, killed, undisturbed
from fault_cases.process import Command, Ended
from fault_cases.site import Answer, Site
from fault_cases.trial import INTERRUPTED, KILLED, MENDABLE, TERMINATED, WELL, Deed, Fault, Place, Trial

GOES_ON = "run the same command again, it goes on where it stopped"
FULL = "(free some space|write elsewhere)"


class Download(Trial):
    """An archive over HTTP from a server on this machine."""

    name = "download"

    def begin(self, place: Place) -> None:
        place.site = Site((self.material / "rnd.zip").read_bytes())

    def end(self, place: Place) -> None:
        if place.site is not None:
            place.site.close()

    def command(self, place: Place) -> list[str]:
        assert place.site is not None
        where = ["--output", str(place.folder), "--url", place.site.url, "--timeout", "1"]
        return ["data", "download", "jaco", "rnd", *where]

    def kept(self, place: Place) -> str:
        here = [path for path in (self._file(place), self._part(place)) if path.exists()]
        return f"{here[0].stat().st_size / self.size:.0%} of the bytes" if here else "nothing had come"

    def lost(self, place: Place) -> list[str]:
        expected = names(self.reference.folder)
        if names(place.folder) != expected:
            return [f"there is {', '.join(names(place.folder)) or 'nothing'}"]
        alike = self._file(place).read_bytes() == self._file(self.reference).read_bytes()
        return [] if alike else ["bytes of the archive differ"]

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return (self.material / "rnd.zip").stat().st_size

    def _file(self, place: Place) -> Path:
        return place.folder / "jaco" / "rnd.zip"

    def _part(self, place: Place) -> Path:
        return place.folder / "jaco" / ".rnd.zip.partial"

    def _half(self, place: Place) -> bool:
        return self._part(place).exists() and self._part(place).stat().st_size >= self.size // 2

    def _answers(self, *answers: Answer, last: Answer | None = None) -> Deed:
        def prepare(place: Place) -> None:
            assert place.site is not None
            place.site.answers = list(answers)
            place.site.last = last or Answer()

        return prepare

    def faults(self, disk: Disk) -> Iterator[Fault]:
        half = self._answers(Answer(cut=0.5, stalls=True))
        yield Fault("kill -9 at half", [KILLED], None, killed(KILL, self._half), prepare=half)
        yield Fault("Ctrl-C at half", [INTERRUPTED], "what was finished is kept",
                    killed(CTRL_C, self._half, to_all=True), prepare=half)  # fmt: skip
        yield Fault("SIGTERM at half", [TERMINATED], None, killed(TERM, self._half), prepare=half)
        yield from self._network()
        yield from self._lies()
        yield Fault("disk full beforehand", [MENDABLE], FULL, full_from_the_start(disk, 100_000), on_disk=True)
        yield Fault("disk fills at half", [MENDABLE], FULL, filled(disk, self._half), prepare=half, on_disk=True)
        yield Fault("no more memory from half on", [WELL], None, self._starved, prepare=half)
        yield from self._damage()

    def _network(self) -> Iterator[Fault]:
        cut_once = Answer(cut=0.5)
        yield Fault("line cut once", [WELL], None, undisturbed, prepare=self._answers(cut_once))
        stalled = Answer(cut=0.5, stalls=True)
        yield Fault("server silent once", [WELL], None, undisturbed, prepare=self._answers(stalled))
        yield Fault("server busy once (503)", [WELL], None, undisturbed, prepare=self._answers(Answer(status=503)))
        cut_always = self._answers(last=Answer(cut=0.01))
        yield Fault("line cut again and again", [MENDABLE], GOES_ON, undisturbed, self._mend, cut_always)
        silent = self._answers(last=Answer(cut=0.01, stalls=True))
        yield Fault("server silent for ever", [MENDABLE], GOES_ON, undisturbed, self._mend, silent)
        yield Fault("no server there", [MENDABLE], GOES_ON, self._nobody)
        yield Fault("file not there (404)", [MENDABLE], "check --url", undisturbed, self._mend,
                    self._answers(last=Answer(status=404)))  # fmt: skip

    def _lies(self) -> Iterator[Fault]:
        half, retry = Answer(cut=0.5), "try again later or another address"
        page = self._answers(last=Answer(content=b"<html>Please log in.</html>"))
        yield Fault(
            "server sends a page instead", [MENDABLE], "of no use, it was removed", undisturbed, self._mend, page
        )
        short = self._answers(last=Answer(excess=-100_000))
        yield Fault("server announces too little", [MENDABLE], "of no use|sends more", undisturbed, self._mend, short)
        long = self._answers(last=Answer(excess=1000))
        yield Fault("server announces too much", [MENDABLE], GOES_ON, undisturbed, self._mend, long)
        ranged = self._answers(half, last=Answer(ranged="bytes 5-9/10"))
        yield Fault("server sends another part", [MENDABLE], retry, undisturbed, self._mend, ranged)
        away = self._answers(last=Answer(location="file:///etc/passwd"))
        yield Fault("server redirects to a file", [MENDABLE], retry, undisturbed, self._mend, away)
        other = self._answers(Answer(content=bytes(300_000), cut=0.5))
        yield Fault("file changes meanwhile", [WELL], None, undisturbed, prepare=other)

    def _damage(self) -> Iterator[Fault]:
        def state(place: Place) -> Path:
            return self._part(place).with_name(".rnd.zip.partial.json")

        def stopped(then: Deed) -> Deed:
            def prepare(place: Place) -> None:
                self._answers(Answer(cut=0.5, stalls=True))(place)
                killed(KILL, self._half)(self, place)
                then(place)

            return prepare

        for what, deed in (
            ("note of the version cut short", lambda place: cut(state(place))),
            ("note of the version gone", lambda place: state(place).unlink()),
            ("note of the version followed by half a line", lambda place: append(state(place), '{"url": "ht')),
            ("part cut short", lambda place: cut(self._part(place))),
            ("part gone", lambda place: self._part(place).unlink()),
        ):
            yield Fault(f"half fetched, {what}", [WELL], None, undisturbed, prepare=stopped(deed))
        later = "found by the import, which compares every byte with its checksum; then remove the archive"
        flipped = stopped(lambda place: flip(self._part(place)))
        yield Fault("half fetched, a bit of the part flipped", [MENDABLE], None, undisturbed, self._remove, flipped,
                    accepted=later)  # fmt: skip

    def _mend(self, place: Place) -> None:
        """The server behaves again."""
        self._answers()(place)

    def _remove(self, place: Place) -> None:
        self._file(place).unlink()

    def _nobody(self, trial: Trial, place: Place) -> Ended:
        self.end(place)
        ended = undisturbed(trial, place)
        self.begin(place)
        return ended

    def _starved(self, trial: Trial, place: Place) -> Ended:
        with Command(trial.command(place)) as command:
            command.wait_for(lambda: self._half(place))
            command.starve(0)
            assert place.site is not None
            place.site.go_on.set()
            return command.end()
