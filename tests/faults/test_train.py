"""`ringrl train`: stopped, starved, damaged. Resuming must give the metrics and parameters of an undisturbed run."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ringrl.evaluation import load_policy
from tests import damage
from tests.faults.conftest import Disk, train_command
from tests.faults.process import CTRL_C, KILL, TERM, Ended, during, lines, run, stop

pytestmark = pytest.mark.slow
SAVING = (TERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXACT = ("step", "loss", "gradient_norm", "learning_rate")  # other metrics depend on the clock
MOMENTS: dict[str, Callable[[Path], object]] = {
    "before the first step": lambda folder: (folder / "config.yaml").exists(),
    "while a checkpoint is written": lambda folder: any((folder / "checkpoints").glob("20*")),
    "between checkpoints": lambda folder: lines(folder / "metrics.jsonl") >= 28,
    "at the last step": lambda folder: lines(folder / "metrics.jsonl") >= 60,
}


def metrics(folder: Path) -> list[list[float]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[entry[name] for name in EXACT] for entry in entries]


def assert_same_run(folder: Path, trained: Path) -> None:
    """Check metrics and parameters, and that no temporary file is left."""
    assert metrics(folder) == metrics(trained)
    assert load_policy(folder).parameter_hash == load_policy(trained).parameter_hash
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*"))


@pytest.fixture
def command(material: Path, tmp_path: Path) -> list[str]:
    return train_command(material / "jaco.h5", tmp_path / "run")


@pytest.fixture
def unfinished(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run without its last checkpoint."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
    return tmp_path / "run"


def resume(command: list[str]) -> Ended:
    return run([*command, "--resume-or-start"])


def assert_resumes(command: list[str], folder: Path, trained: Path) -> None:
    resume(command).expect(0)
    assert_same_run(folder, trained)


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [(moment, KILL, 137) for moment in MOMENTS]
    + [("between checkpoints", number, 0 if number in SAVING else 130) for number in (CTRL_C, *SAVING)],
)
def test_signal(command: list[str], trained: Path, tmp_path: Path, moment: str, number, code: int) -> None:
    ended = stop(command, lambda: MOMENTS[moment](tmp_path / "run"), number)
    ended.expect(code, {KILL: "", CTRL_C: "kept"}.get(number, "saved after step .*--resume"))
    assert_resumes(command, tmp_path / "run", trained)


def test_full_disk(material: Path, trained: Path, disk: Disk) -> None:
    command = train_command(material / "jaco.h5", disk.folder / "run")
    for leave in (0, 2**16):  # the latter is enough for the configuration, but not for a checkpoint
        disk.fill_before([*command, "--resume-or-start"], leave).expect(2, "free some space|give another")
    moment = lambda: MOMENTS["between checkpoints"](disk.folder / "run")  # noqa: E731
    shutil.rmtree(disk.folder / "run")
    disk.fill_during(command, moment).expect(2, "free some space")
    assert_resumes(command, disk.folder / "run", trained)


def test_no_memory(command: list[str], trained: Path, tmp_path: Path) -> None:
    moment = (tmp_path / "run" / "config.yaml").exists
    during(command, moment, lambda process: process.starve(2**20)).expect(2, "memory")
    assert_resumes(command, tmp_path / "run", trained)


CHECKPOINT = damage.CHECKPOINT | damage.ITERATOR
FLIPS = {f"a bit at {share}": share for share in (0.3, 0.5, 0.8)}


@pytest.mark.parametrize("kind", [*CHECKPOINT, *FLIPS])
def test_damaged_checkpoint(command: list[str], trained: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "60"
    if kind in FLIPS:  # no value may depend on the bit: then there is nothing to report
        damage.flip(damage.arrays(step), FLIPS[kind])
    else:
        CHECKPOINT[kind](step)
    ended = resume(command)
    if kind not in FLIPS or ended.code:
        ended.expect(2, "60: is damaged .*; remove it")
        shutil.rmtree(step, ignore_errors=True)
        resume(command).expect(0)
    assert_same_run(tmp_path / "run", trained)


def test_all_checkpoints_damaged(command: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").glob("[0-9]*"):
        damage.write_zeros(step / "state")
    resume(command).expect(2, "is damaged")


@pytest.mark.parametrize("kind", damage.METRICS_TAIL)
def test_metrics_with_a_damaged_end(command: list[str], trained: Path, unfinished: Path, kind: str) -> None:
    damage.METRICS_TAIL[kind](unfinished / "metrics.jsonl")
    assert_resumes(command, unfinished, trained)


@pytest.mark.parametrize("kind", damage.METRICS_LOST)
def test_lost_metrics(command: list[str], trained: Path, unfinished: Path, kind: str) -> None:
    damage.METRICS_LOST[kind](unfinished / "metrics.jsonl")
    ended = resume(command)
    ended.expect(0)
    assert "metrics.jsonl" in ended.error
    assert metrics(unfinished)[-20:] == metrics(trained)[-20:]
    assert load_policy(unfinished).parameter_hash == load_policy(trained).parameter_hash


CONFIGURATION = {"gone": Path.unlink, "cut short": damage.cut, "empty": lambda file: damage.cut(file, 0)}


@pytest.mark.parametrize("kind", CONFIGURATION)
def test_damaged_configuration(command: list[str], trained: Path, unfinished: Path, kind: str) -> None:
    """The checkpoints hold the settings."""
    CONFIGURATION[kind](unfinished / "config.yaml")
    assert_resumes(command, unfinished, trained)


def test_damaged_tensorboard_events(command: list[str], trained: Path, unfinished: Path) -> None:
    for file in (unfinished / "tensorboard").iterdir():
        damage.cut(file)
    assert_resumes(command, unfinished, trained)


@pytest.mark.parametrize("kind", ["gone", "cut short", "a flipped bit of the header"])
def test_damaged_store(material: Path, trained: Path, tmp_path: Path, kind: str) -> None:
    store = tmp_path / "own.h5"
    shutil.copy(material / "jaco.h5", store)
    command = train_command(store, tmp_path / "run")
    (damage.STORE | {"gone": Path.unlink})[kind](store)
    run(command).expect(2, "own.h5")
    shutil.copy(material / "jaco.h5", store)
    assert_resumes(command, tmp_path / "run", trained)
