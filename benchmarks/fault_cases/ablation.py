"""ringrl ablate."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from fault_cases.damage import append, cut, zeros
from fault_cases.disk import Disk
from fault_cases.evaluation import records
from fault_cases.material import TASK
from fault_cases.means import (
    CTRL_C,
    KILL,
    TERM,
    filled,
    full_from_the_start,
    killed,
    resumed,
    worker_killed,
    worker_starved,
)
from fault_cases.training import checkpoints, run_differences
from fault_cases.trial import INTERRUPTED, KILLED, MENDABLE, TERMINATED, WELL, Deed, Fault, Place, Trial

SAME = ("returns", "context", "environment_seed", "steps_simulated")
CELLS = ("bc_seed0", "at_1_seed0")  # as they are run
PLAN = {
    "task": TASK, "trajectories": [1], "seeds": [0], "baselines": ["bc"], "trajectories_per_batch": 2,
    "environments": 2, "settings": {
        "model": {"layers": 1, "width": 16, "token_set": "fused1"}, "optimiser": {"steps": 60},
        "checkpoint_every": 20, "log_every": 2,
    },
}  # fmt: skip


class Ablate(Trial):
    """Two cells, random actions and the data's own returns, one after another."""

    name = "ablate"
    again_with = ("--retry",)

    def command(self, place: Place) -> list[str]:
        plan = place.folder / "plan.yaml"
        if not plan.exists():
            where = {"data": str(self.material / "jaco.h5"), "output": str(place.folder / "study")}
            plan.write_text(yaml.safe_dump(where | PLAN))
        return ["ablate", str(plan), "--untimed"]

    def kept(self, place: Place) -> str:
        done = [name for name in CELLS if (self._cell(place, name) / "finished.json").exists()]
        begun = [f"step {steps[-1]} of another" for name in set(CELLS) - set(done)
                 if (steps := checkpoints(self._cell(place, name)))]  # fmt: skip
        return ", ".join([f"{len(done)} of {len(CELLS)} cells", *begun])

    def lost(self, place: Place) -> list[str]:
        found = []
        for name in ("random", "data", *CELLS):
            cell, reference = self._cell(place, name), self._cell(self.reference, name)
            differences = run_differences(cell, reference) if name in CELLS and cell.exists() else []
            if records(cell / "evaluation.jsonl", SAME) != records(reference / "evaluation.jsonl", SAME):
                differences.append("records differ")
            if not _is_json(cell / "finished.json"):
                differences.append("not finished")
            found += [f"{name}: {what}" for what in differences]
        return found

    def _cell(self, place: Place, name: str) -> Path:
        return place.folder / "study" / TASK / name

    def _trained(self, name: str, step: int = 20) -> Callable[[Place], bool]:
        return lambda place: (self._cell(place, name) / "checkpoints" / str(step)).exists()

    def faults(self, disk: Disk) -> Iterator[Fault]:
        first, second = self._trained(CELLS[0]), self._trained(CELLS[1])
        retry = r"[12] of 4 failed; --retry runs them again"
        yield Fault("kill -9 in the second cell", [KILLED], None, killed(KILL, second))
        yield Fault("kill -9 of a worker", [MENDABLE], retry, worker_killed(first))
        yield Fault("Ctrl-C in the first cell", [INTERRUPTED], "what was finished is kept",
                    killed(CTRL_C, first, to_all=True))  # fmt: skip
        yield Fault("SIGTERM in the first cell", [TERMINATED], None, killed(TERM, first))
        yield Fault("SIGTERM to all in the first cell", [TERMINATED], None, killed(TERM, first, to_all=True))
        full = "(free some space|give another|--retry runs them again)"
        yield Fault("disk full beforehand", [MENDABLE], full, full_from_the_start(disk), on_disk=True,
                    prepare=self.command)  # fmt: skip
        yield Fault("disk fills in the first cell", [MENDABLE], full, filled(disk, first), on_disk=True)
        yield Fault("a worker has no more memory", [MENDABLE], retry, worker_starved(2**20, first))
        yield from self._damaged()

    def _damaged(self) -> Iterator[Fault]:
        def finished(deed: Callable[[Path], object]) -> Deed:
            """The whole study, whose first cell is then damaged."""

            def prepare(place: Place) -> None:
                shutil.copytree(self.reference.folder / "study", place.folder / "study")
                deed(self._cell(place, CELLS[0]))

            return prepare

        def unfinished(deed: Callable[[Path], object]) -> Deed:
            return finished(lambda cell: ((cell / "finished.json").unlink(), deed(cell)))

        for what, prepare in (
            ("finished.json cut short", finished(lambda cell: cut(cell / "finished.json"))),
            ("half a last line of its results", unfinished(lambda cell: _halve_last(cell / "evaluation.jsonl"))),
            ("half a last line of its metrics", unfinished(lambda cell: append(cell / "metrics.jsonl", '{"st'))),
            ("its newest checkpoint all zeros", unfinished(_damage_newest)),
            ("its whole folder gone", finished(shutil.rmtree)),
        ):
            yield Fault(f"of a cell, {what}", [WELL], None, resumed, prepare=prepare)

        def remove(place: Place) -> None:
            (self._cell(place, CELLS[0]) / "cell.yaml").unlink()

        yield Fault("of a cell, cell.yaml cut short", [MENDABLE], "cell.yaml: .*; remove it", resumed, remove,
                    unfinished(lambda cell: cut(cell / "cell.yaml")))  # fmt: skip


def _damage_newest(cell: Path) -> None:
    zeros(cell / "checkpoints" / str(checkpoints(cell)[-1]) / "state")


def _halve_last(path: Path) -> None:
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-1]) + whole[-1][:100])


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
