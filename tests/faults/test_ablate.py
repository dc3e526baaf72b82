"""`ringrl ablate`: stopped, starved and damaged. The same command must give the cells of an undisturbed study."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests import damage
from tests.faults.conftest import TASK, Disk
from tests.faults.process import CTRL_C, KILL, TERM, Command, during, run, stop
from tests.faults.test_evaluate import records
from tests.faults.test_train import assert_same_run

pytestmark = pytest.mark.slow
SAME = ("returns", "context", "environment_seed", "steps_simulated")
FIRST, SECOND = "bc_seed0", "at_1_seed0"  # cells in the order of the study
PLAN = {
    "task": TASK, "trajectories": [1], "seeds": [0], "baselines": ["bc"], "trajectories_per_batch": 2,
    "episodes": 2, "settings": {
        "model": {"layers": 1, "width": 16, "token_set": "fused1"}, "optimiser": {"steps": 60},
        "checkpoint_every": 20, "log_every": 2,
    },
}  # fmt: skip


def ablate_command(material: Path, folder: Path) -> list[str]:
    paths = {"data": str(material / "jaco.h5"), "output": str(folder / "study")}
    (folder / "plan.yaml").write_text(yaml.safe_dump(paths | PLAN))
    return ["ablate", str(folder / "plan.yaml")]


def cell(folder: Path, name: str) -> Path:
    return folder / "study" / TASK / name


def in_cell(folder: Path, name: str) -> Callable[[], object]:
    return lambda: (cell(folder, name) / "checkpoints" / "20").exists()


def assert_completes(command: list[str], folder: Path, expected: Path) -> None:
    """Run the command again. Check the records of all cells, and the runs."""
    run(command).expect(0)
    for name in ("random", "data", FIRST, SECOND):
        found, wanted = cell(folder, name), cell(expected, name)
        assert records(found / "evaluation.jsonl", SAME) == records(wanted / "evaluation.jsonl", SAME)
        json.loads((found / "finished.json").read_text())
        if name in (FIRST, SECOND):
            assert_same_run(found, wanted)


@pytest.fixture(scope="session")
def expected(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablated")
    run(ablate_command(material, folder)).expect(0)
    return folder


@pytest.mark.parametrize(("name", "number"), [(SECOND, KILL), (FIRST, CTRL_C), (FIRST, TERM)])
def test_signal(material: Path, expected: Path, tmp_path: Path, name: str, number) -> None:
    command = ablate_command(material, tmp_path)
    stop(command, in_cell(tmp_path, name), number).expect(128 + number)
    assert_completes(command, tmp_path, expected)


FAULTS: dict[str, Callable[[Command], object]] = {
    "killed": lambda command: os.kill(command.worker(), KILL),
    "starved": lambda command: command.starve(2**20, command.worker()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_lost_worker(material: Path, expected: Path, tmp_path: Path, fault: str) -> None:
    command = ablate_command(material, tmp_path)
    ended = during(command, in_cell(tmp_path, FIRST), FAULTS[fault])
    assert (ended.code, "runs them again" in ended.line) == (2, True), ended.error
    assert_completes(command, tmp_path, expected)


def test_full_disk(material: Path, expected: Path, disk: Disk) -> None:
    command = ablate_command(material, disk.folder)
    for ended in (disk.fill_before(command), disk.fill_during(command, in_cell(disk.folder, FIRST))):
        assert (ended.code, "space" in ended.error, "Traceback" in ended.error) == (2, True, False), ended.error
    assert_completes(command, disk.folder, expected)


@pytest.mark.parametrize("kind", damage.CELL)
def test_damaged_cell(material: Path, expected: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(expected / "study", tmp_path / "study")
    damage.CELL[kind](cell(tmp_path, FIRST))
    command = ablate_command(material, tmp_path)
    if kind == "cell.yaml empty":
        run(command).expect(2, "cell.yaml: .*; remove it")
        (cell(tmp_path, FIRST) / "cell.yaml").unlink()
    assert_completes(command, tmp_path, expected)
