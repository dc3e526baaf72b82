"""ringrl train."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_cases.damage import append, cut, flip, lines, zeros
from fault_cases.disk import Disk
from fault_cases.material import TASK, TINY
from fault_cases.means import CTRL_C, KILL, TERM, filled, full_from_the_start, killed, resumed, starved
from fault_cases.trial import INTERRUPTED, KILLED, MENDABLE, WELL, Deed, Fault, Place, Trial

STEPS, EVERY = 60, 20
EXACT = ("step", "loss", "gradient_norm", "learning_rate")  # the rest of a line is the clock's


class Train(Trial):
    """Sixty steps of a tiny transformer, with a checkpoint after every twenty."""

    name = "train"
    again_with = ("--resume",)

    def command(self, place: Place) -> list[str]:
        data = ["--data", str(self._data(place)), "--task", TASK, "--run", str(self._run(place))]
        often = [f"--optimiser.steps={STEPS}", f"--checkpoint-every={EVERY}", "--log-every=2"]
        return ["train", *data, *TINY, *often]

    def kept(self, place: Place) -> str:
        found = checkpoints(self._run(place))
        return f"step {found[-1]} of {STEPS}" if found else "no checkpoint yet"

    def lost(self, place: Place) -> list[str]:
        return run_differences(self._run(place), self._run(self.reference))

    def _run(self, place: Place) -> Path:
        return place.folder / "run"

    def _data(self, place: Place) -> Path:
        own = place.folder / "own.h5"
        return own if own.exists() or own.is_symlink() else self.material / "jaco.h5"

    def _lines(self, number: int) -> Callable[[Place], bool]:
        return lambda place: lines(self._run(place) / "metrics.jsonl") >= number

    def _steps(self, number: int) -> Callable[[Place], bool]:
        return lambda place: (self._run(place) / "checkpoints" / str(number)).exists()

    def faults(self, disk: Disk) -> Iterator[Fault]:
        writing = lambda place: any((self._run(place) / "checkpoints").glob(f"{EVERY}*"))  # noqa: E731
        configured = lambda place: (self._run(place) / "config.yaml").exists()  # noqa: E731
        yield Fault("kill -9 before the first step", [KILLED], None, killed(KILL, configured))
        yield Fault("kill -9 while a checkpoint is written", [KILLED], None, killed(KILL, writing))
        yield Fault("kill -9 between checkpoints", [KILLED], None, killed(KILL, self._lines(EVERY + 8)))
        yield Fault("kill -9 at the last step", [KILLED], None, killed(KILL, self._lines(STEPS)))
        kept = "what was finished is kept"
        yield Fault("Ctrl-C", [INTERRUPTED], kept, killed(CTRL_C, self._lines(EVERY + 8), to_all=True))
        told = "told to stop: saved after step .*--resume"
        yield Fault("SIGTERM", [WELL], told, killed(TERM, self._lines(EVERY + 8)))
        yield from self._disk(disk)
        yield Fault("no more memory before the first step", [MENDABLE], "memory", starved(2**20, configured))
        yield from self._damaged_checkpoints()
        yield from self._damaged_run()
        yield from self._damaged_store()

    def _disk(self, disk: Disk) -> Iterator[Fault]:
        full = "(free some space|give another)"
        yield Fault("disk full beforehand", [MENDABLE], full, full_from_the_start(disk), on_disk=True)
        room = 64 * 1024  # for the configuration and some metrics, not for a checkpoint
        yield Fault("disk nearly full beforehand", [MENDABLE], full, full_from_the_start(disk, room), on_disk=True)
        yield Fault("disk fills between checkpoints", [MENDABLE], full, filled(disk, self._lines(EVERY + 8)),
                    on_disk=True)  # fmt: skip

    def _finished(self, deed: Callable[[Path], object]) -> Deed:
        """A finished run that is then damaged."""

        def prepare(place: Place) -> None:
            shutil.copytree(self._run(self.reference), self._run(place))
            deed(self._run(place))

        return prepare

    def _damaged_checkpoints(self) -> Iterator[Fault]:
        newest = Path("checkpoints") / str(STEPS)
        for what, damage in (
            ("all zeros", lambda step: zeros(step / "state")),
            ("arrays cut short", lambda step: cut(arrays(step))),
            *((f"a bit flipped at {share:.0%} of its arrays", lambda step, share=share: flip(arrays(step), share))
              for share in (0.3, 0.5, 0.8)),
            ("its description cut short", lambda step: cut(step / "info" / "metadata")),
            ("a bit of its description flipped", lambda step: flip(step / "info" / "metadata")),
            ("its state gone", lambda step: shutil.rmtree(step / "state")),
            ("its place in the data gone", lambda step: shutil.rmtree(step / "iterator")),
            ("all of it gone", shutil.rmtree),
        ):  # fmt: skip
            prepare = self._finished(lambda run, damage=damage: damage(run / newest))
            # No value may depend on a bit: then nothing is to be said. Parameters are compared in any case.
            says = None if damage is shutil.rmtree or what.startswith("a bit flipped") else "laid aside as"
            yield Fault(f"newest checkpoint: {what}", [WELL], says, resumed, prepare=prepare)

        def all_damaged(run: Path) -> None:
            for step in checkpoints(run):
                zeros(run / "checkpoints" / str(step) / "state")

        def begin_anew(place: Place) -> None:
            shutil.rmtree(self._run(place))

        yield Fault("every checkpoint all zeros", [MENDABLE], "is damaged", resumed, begin_anew,
                    self._finished(all_damaged))  # fmt: skip

    def _damaged_run(self) -> Iterator[Fault]:
        def remove(place: Place) -> None:
            (self._run(place) / "config.yaml").unlink()

        def without_last(damage: Callable[[Path], object]) -> Deed:
            """The run as a kill before its last checkpoint leaves it, and something wrong besides."""

            def deed(run: Path) -> None:
                shutil.rmtree(run / "checkpoints" / str(STEPS))
                damage(run)

            return self._finished(deed)

        gone = "what is damaged from outside is gone; parameters and all later numbers are the same"
        for what, damage in (
            ("half a last line", lambda run: append(run / "metrics.jsonl", '{"step": 61, "lo')),
            ("a last line that is none", lambda run: append(run / "metrics.jsonl", "61\n")),
        ):
            yield Fault(f"metrics.jsonl: {what}", [WELL], None, resumed, prepare=without_last(damage))
        for what, damage in (
            ("gone", lambda run: (run / "metrics.jsonl").unlink()),
            ("a flipped bit", lambda run: flip(run / "metrics.jsonl", 0.2, 7)),
            ("cut short", lambda run: cut(run / "metrics.jsonl", 0.1)),
        ):
            yield Fault(f"metrics.jsonl: {what}", [WELL], "gone or damaged", resumed, prepare=without_last(damage),
                        accepted=gone)  # fmt: skip
        yield Fault("config.yaml: gone", [WELL], None, resumed,
                    prepare=without_last(lambda run: (run / "config.yaml").unlink()))  # fmt: skip
        for what, damage in (
            ("cut short", lambda run: cut(run / "config.yaml")),
            ("empty", lambda run: cut(run / "config.yaml", 0)),
        ):
            yield Fault(f"config.yaml: {what}", [MENDABLE], "config.yaml: .* remove it", resumed, remove,
                        without_last(damage))  # fmt: skip
        events = without_last(lambda run: [cut(file) for file in (run / "tensorboard").iterdir()])
        yield Fault("TensorBoard's events cut short", [WELL], None, resumed, prepare=events)

    def _damaged_store(self) -> Iterator[Fault]:
        def own(damage: Callable[[Path], object]) -> Deed:
            def prepare(place: Place) -> None:
                shutil.copy(self.material / "jaco.h5", place.folder / "own.h5")
                damage(place.folder / "own.h5")

            return prepare

        def import_again(place: Place) -> None:
            (place.folder / "own.h5").unlink()

        def gone(store: Path) -> None:
            store.unlink()
            store.symlink_to("nowhere.h5")

        for what, damage in (
            ("gone", gone),
            ("cut short", cut),
            ("with a flipped bit in its description", lambda store: flip(store, 0.0001)),
        ):
            yield Fault(f"store {what}", [MENDABLE], "own.h5", resumed, import_again, own(damage))
        in_use = "read only as needed, and not compared: `ringrl data info --verify` finds it"
        yield Fault("store with a flipped bit in its rows", [MENDABLE], "own.h5", resumed, import_again,
                    own(lambda store: flip(store, 0.3, 6)), accepted=in_use)  # fmt: skip


def arrays(step: Path) -> Path:
    """The file of a checkpoint that holds most of its arrays."""
    return max((step / "state").glob("**/d/*"), key=lambda path: path.stat().st_size)


def checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints that have their names."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def metrics(run: Path) -> list[list[float]]:
    """What must be the same for ever; empty where it cannot be read."""
    try:
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [[entry[name] for name in EXACT] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def run_differences(run: Path, reference: Path) -> list[str]:
    """In what a run is not the other: metrics, parameters, files left behind."""
    from ringrl.errors import UserError
    from ringrl.training import load_policy

    if metrics(run) != metrics(reference):
        return ["metrics differ"]
    try:
        same = load_policy(run).parameter_hash == load_policy(reference).parameter_hash
    except UserError:
        return ["no parameters"]
    left = sorted(path.name for path in run.iterdir() if path.suffix == ".tmp")
    return ([] if same else ["parameters differ"]) + [f"{name} is left" for name in left]
