"""`ringrl evaluate`: stopped, starved, damaged. The same command again must give the same records and summary."""

import json
import shutil
import time
from pathlib import Path

import pytest

from tests import damage
from tests.faults.conftest import Disk
from tests.faults.process import CTRL_C, KILL, TERM, names, run, stop

pytestmark = pytest.mark.slow
SAME = ("returns", "context", "environment_seed", "steps_simulated", "evaluation", "checkpoint_hash")


def evaluate_command(checkpoint: Path, folder: Path) -> list[str]:
    """Return three episodes in one context, in two streams, and as many without memory."""
    paths = [f"--checkpoint={checkpoint}", f"--output={folder / 'results.jsonl'}"]
    return ["evaluate", *paths, "--environments=2", "--episodes=3", "--control"]


def records(path: Path, same: tuple[str, ...] = SAME) -> list[str]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted({json.dumps([entry[name] for name in same]) for entry in entries})


def assert_completes(command: list[str], folder: Path, expected: Path) -> None:
    """Run the command again. Check records and summary, and that nothing else is left."""
    run(command).expect(0)
    assert records(folder / "results.jsonl") == records(expected / "results.jsonl")
    found, wanted = (json.loads((f / "results.json").read_text())["evaluations"] for f in (folder, expected))
    assert [part["returns"] for part in found] == [part["returns"] for part in wanted]
    left = [name for name in names(folder) if name.lstrip(".").startswith("results")]
    assert left == ["results.json", "results.jsonl"]


@pytest.fixture(scope="session")
def expected(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    run(evaluate_command(trained, folder)).expect(0)
    return folder


@pytest.mark.parametrize("number", [KILL, CTRL_C, TERM])
def test_signal(trained: Path, expected: Path, tmp_path: Path, number) -> None:
    end = time.monotonic() + 20  # it imports, compiles and plays
    command = evaluate_command(trained, tmp_path)
    stop(command, lambda: time.monotonic() > end, number).expect(128 + number)
    assert_completes(command, tmp_path, expected)


def test_full_disk(trained: Path, expected: Path, disk: Disk) -> None:
    command = evaluate_command(trained, disk.folder)
    disk.fill_before(command).expect(2, "free some space|give another")
    assert_completes(command, disk.folder, expected)


@pytest.mark.parametrize("kind", damage.RESULTS)
def test_damaged_results(trained: Path, expected: Path, tmp_path: Path, kind: str) -> None:
    for name in ("results.jsonl", "results.json"):
        shutil.copy(expected / name, tmp_path)
    damage.RESULTS[kind](tmp_path / "results.jsonl")
    assert_completes(evaluate_command(trained, tmp_path), tmp_path, expected)


@pytest.mark.parametrize("kind", ["zeros", "arrays cut short", "a digit of the description", "description gone"])
def test_damaged_checkpoint(trained: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    damage.CHECKPOINT[kind](tmp_path / "run" / "checkpoints" / "60")
    run(evaluate_command(tmp_path / "run", tmp_path)).expect(2, "is damaged .*; remove it")
