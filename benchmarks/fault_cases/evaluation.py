"""ringrl evaluate."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fault_cases.damage import cut, flip, names, zeros
from fault_cases.disk import Disk
from fault_cases.means import CTRL_C, KILL, TERM, filled, full_from_the_start, killed, starved, undisturbed
from fault_cases.training import Train, arrays, checkpoints
from fault_cases.trial import INTERRUPTED, KILLED, MENDABLE, TERMINATED, WELL, Deed, Fault, Place, Trial

EPISODES = 3
SAME = ("returns", "context", "environment_seed", "steps_simulated", "evaluation", "checkpoint_hash")


class Evaluate(Trial):
    """Three episodes in one context, in two streams, and as many without memory."""

    name = "evaluate"

    @property
    def run(self) -> Path:
        """What is evaluated."""
        return self.reference.folder / "trained" / "run"

    def begin(self, place: Place) -> None:
        if place is self.reference:
            Train(self.material, self.run.parent).run_undisturbed()

    def command(self, place: Place) -> list[str]:
        own = place.folder / "run"
        what = ["--checkpoint", str(own if own.exists() else self.run), "--output", str(self._results(place))]
        return ["evaluate", *what, "--environments", "2", "--episodes", str(EPISODES), "--control"]

    def kept(self, place: Place) -> str:
        if self._results(place).exists():
            return "the results"
        return f"{len(list(place.folder.rglob('*_*.npz')))} of {2 * EPISODES} episodes"

    def lost(self, place: Place) -> list[str]:
        found, expected = records(self._results(place)), records(self._results(self.reference))
        if found != expected:
            return [f"{len(found)} of {len(expected)} records" if len(found) < len(expected) else "records differ"]
        files = [name for name in names(place.folder) if name.startswith(("results", ".results"))]
        summary = self._results(place).with_suffix(".json")
        same = self._summary(summary) == self._summary(self._results(self.reference).with_suffix(".json"))
        left = sorted(set(files) - {"results.jsonl", "results.json"})
        return ([] if same else ["summary differs"]) + [f"{name} is left" for name in left]

    def _results(self, place: Place) -> Path:
        return place.folder / "results.jsonl"

    def _summary(self, path: Path) -> list[list[float]] | None:
        try:
            return [part["returns"] for part in json.loads(path.read_text())["evaluations"]]
        except (OSError, ValueError, KeyError):
            return None

    def _has(self, episode: str) -> Callable[[Place], bool]:
        return lambda place: any((place.folder / "results.journal").glob(f"*/{episode}.npz"))

    def faults(self, disk: Disk) -> Iterator[Fault]:
        first, second, control = map(self._has, ("context_00000", "context_00001", "control_00000"))
        begun = lambda place: (place.folder / "results.journal").exists()  # noqa: E731
        yield Fault("kill -9 before the first episode", [KILLED], None, killed(KILL, begun))
        yield Fault("kill -9 after the first episode", [KILLED], None, killed(KILL, first))
        yield Fault("kill -9 in the control", [KILLED], None, killed(KILL, control))
        yield Fault("Ctrl-C", [INTERRUPTED], "what was finished is kept", killed(CTRL_C, second, to_all=True))
        yield Fault("SIGTERM", [TERMINATED], None, killed(TERM, second))
        full = "(free some space|give another)"
        yield Fault("disk full beforehand", [MENDABLE], full, full_from_the_start(disk), on_disk=True)
        yield Fault("disk fills after the first episode", [MENDABLE], full, filled(disk, first), on_disk=True)
        last = self._has(f"control_0000{EPISODES - 2}")
        yield Fault("disk fills before the last episode", [MENDABLE], full, filled(disk, last), on_disk=True)
        abrupt = "the C library ends a process that gets no memory for a thread, before Python knows"
        yield Fault("no more memory at the start", [MENDABLE], "memory", starved(2**20, begun), accepted=abrupt)
        yield from self._damaged_journal()
        yield from self._damaged_results()
        yield from self._damaged_checkpoint()

    def _damaged_journal(self) -> Iterator[Fault]:
        def stopped(deed: Callable[[Path], object]) -> Deed:
            def prepare(place: Place) -> None:
                killed(KILL, self._has("context_00001"))(self, place)
                (journal,) = (place.folder / "results.journal").iterdir()
                deed(journal)

            return prepare

        def remove(place: Place) -> None:
            shutil.rmtree(place.folder / "results.journal")

        for what, deed in (
            ("an episode cut short", lambda journal: cut(journal / "context_00001.npz")),
            ("an episode with a flipped bit", lambda journal: flip(journal / "context_00000.npz")),
            ("an episode with a flipped bit of its returns", _flip_reward),
            ("an episode gone", lambda journal: (journal / "context_00000.npz").unlink()),
            ("the journal gone", lambda journal: shutil.rmtree(journal.parent)),
        ):
            yield Fault(f"killed, and {what}", [WELL], None, undisturbed, prepare=stopped(deed))
        for what, deed in (
            ("about.json cut short", lambda journal: cut(journal / "about.json")),
            ("about.json with a flipped bit", lambda journal: flip(journal / "about.json")),
        ):
            yield Fault(f"killed, and {what}", [MENDABLE], "damaged; remove it", undisturbed, remove, stopped(deed))

    def _damaged_results(self) -> Iterator[Fault]:
        def finished(deed: Callable[[Path], object]) -> Deed:
            def prepare(place: Place) -> None:
                for suffix in (".jsonl", ".json"):
                    shutil.copy(self._results(self.reference).with_suffix(suffix), place.folder)
                deed(self._results(place))

            return prepare

        for what, deed in (
            ("half a last line", lambda path: _rewrite(path, lambda lines: [*lines[:-1], lines[-1][:100]])),
            ("its last line gone", lambda path: _rewrite(path, lambda lines: lines[:-1])),
            ("all gone", lambda path: path.unlink()),
            ("the summary cut short", lambda path: cut(path.with_suffix(".json"))),
            ("the summary gone", lambda path: path.with_suffix(".json").unlink()),
        ):
            yield Fault(f"results: {what}", [WELL], None, undisturbed, prepare=finished(deed))

        def remove(place: Place) -> None:
            self._results(place).unlink()

        broken = finished(lambda path: _rewrite(path, lambda lines: ["{broken\n", *lines[1:]]))
        yield Fault("results: a line that is none", [MENDABLE], "line 1: is not JSON; remove", undisturbed, remove,
                    broken)  # fmt: skip

    def _damaged_checkpoint(self) -> Iterator[Fault]:
        def own(deed: Callable[[Path], object]) -> Deed:
            def prepare(place: Place) -> None:
                shutil.copytree(self.run, place.folder / "run")
                deed(place.folder / "run" / "checkpoints" / str(checkpoints(self.run)[-1]))

            return prepare

        def back(place: Place) -> None:
            shutil.rmtree(place.folder / "run")

        for what, deed in (
            ("all zeros", lambda step: zeros(step / "state")),
            ("with a flipped bit", lambda step: flip(arrays(step))),
            ("without its description", lambda step: shutil.rmtree(step / "info")),
        ):
            yield Fault(f"checkpoint {what}", [MENDABLE], "is damaged .*; remove it", undisturbed, back, own(deed))


def _flip_reward(journal: Path) -> None:
    path = journal / "context_00000.npz"
    content = path.read_bytes()
    place = content.index(b"reward.npy") + 400
    flip(path, place / (len(content) - 1))


def _rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def records(path: Path, same: Sequence[str] = SAME) -> list[list[object]]:
    """What must be the same for ever of each record, in the order of the streams; empty where it cannot be read."""
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        unique = {json.dumps([entry[name] for name in same]) for entry in entries}
    except (OSError, ValueError, KeyError):
        return []
    return [json.loads(entry) for entry in sorted(unique)]
