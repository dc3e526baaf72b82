"""A run that is killed with SIGKILL and resumed is bit-identical to an uninterrupted run."""

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from ringrl.cli import main
from ringrl.config import TrainConfig
from ringrl.config_files import to_yaml
from ringrl.errors import UserError
from ringrl.evaluation import load_policy
from ringrl.training import train

EXACT = ("step", "loss", "gradient_norm", "learning_rate")  # tokens_per_second is the clock's


def numbers(run: Path) -> list[list[float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[entry[name] for name in EXACT] for entry in entries]


def start(config: TrainConfig, *flags: str) -> subprocess.Popen[bytes]:
    file = config.run.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    command = [str(Path(sys.executable).with_name("ringrl")), "train", "--config", str(file), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(condition, config: TrainConfig, *flags: str) -> None:  # type: ignore[no-untyped-def]
    """Start or resume, and kill the process as soon as the condition holds."""
    process = start(config, *flags)
    deadline = time.monotonic() + 120
    try:
        while not condition():
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
    assert process.wait() == -9


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_killed_twice_and_resumed_is_bit_identical(tiny: TrainConfig, finished_run: Path) -> None:
    """Kills at more moments: tests/faults/test_train.py."""
    checkpoints = tiny.run / "checkpoints"
    tiny.run.mkdir()
    (tiny.run / "config.yaml").write_text(to_yaml(tiny))  # what a kill before the first step leaves
    tiny.run.with_suffix(".yaml").write_text(to_yaml(tiny))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", str(tiny.run.with_suffix(".yaml")), "--resume"])  # it took no step
    (tiny.run / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 8.0}\n')  # no checkpoint yet

    kill_when(lambda: any(checkpoints.glob("4*")), tiny, "--resume")  # the first checkpoint is being written

    kill_when(lambda: lines(tiny.run) >= 10, tiny, "--resume")  # past the last checkpoint: these steps are repeated
    with (tiny.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # what a kill in the middle of a write leaves

    train(tiny, resume=True, quiet=True)
    assert numbers(tiny.run) == numbers(finished_run)
    assert load_policy(tiny.run).parameter_hash == load_policy(finished_run).parameter_hash
    kept = {p.name for p in checkpoints.iterdir()}
    assert {"12", "14"} <= kept <= {"4", "8", "12", "14"}, "nothing half-written is left"
    assert len(kept) <= 3, "the newest two and the best"
    assert sorted(p.name for p in tiny.run.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"]


def test_resuming_a_finished_run_changes_nothing(finished: TrainConfig) -> None:
    before, policy = (finished.run / "metrics.jsonl").read_bytes(), load_policy(finished.run)
    log = io.StringIO()
    train(finished, resume=True, console=Console(file=log))
    assert log.getvalue().replace("\n", "") == f"{finished.run}: has finished"
    assert (finished.run / "metrics.jsonl").read_bytes() == before
    assert load_policy(finished.run).parameter_hash == policy.parameter_hash


def test_a_resumed_run_says_where_it_goes_on(finished: TrainConfig) -> None:
    shutil.rmtree(finished.run / "checkpoints" / "14")
    log = io.StringIO()
    train(finished, resume=True, console=Console(file=log, width=200))
    assert log.getvalue().splitlines()[0] == f"{finished.run}: resumes at step 12 of 14"


def test_a_run_is_repeatable_and_depends_on_its_seed(tiny: TrainConfig, finished_run: Path, tmp_path) -> None:
    """Metrics are repeatable, and differ for another seed."""
    train(tiny, quiet=True)
    assert numbers(tiny.run) == numbers(finished_run)
    other = tiny.model_copy(update={"seed": 4, "run": tmp_path / "other"})
    train(other, quiet=True)
    differing = [a != b for a, b in zip(numbers(tiny.run), numbers(other.run), strict=True)]
    assert all(differing)


def test_a_checkpoint_contains_the_configuration(finished: TrainConfig) -> None:
    file = finished.run / "config.yaml"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    train(finished, resume=True, quiet=True)
    file.unlink()
    wider = finished.model_copy(update={"model": finished.model.model_copy(update={"width": 32})})
    with pytest.raises(UserError, match=r"began with other settings \(model\.width was 16, is 32\); give the same, or"):
        train(wider, resume=True, quiet=True)
    with pytest.raises(UserError, match="holds a run already"):
        train(finished, quiet=True)
    assert not file.exists()
    train(finished, resume=True, quiet=True)
    assert file.read_text() == whole.replace(whole.split("run: ")[1].splitlines()[0], str(finished.run))


def test_a_moved_run_resumes(finished: TrainConfig, tmp_path: Path) -> None:
    """A moved run continues from its newest checkpoint."""
    moved = finished.run.rename(tmp_path / "moved")
    for step in (moved / "checkpoints").glob("14*"):
        for path in sorted(step.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        step.rmdir()
    before = numbers(moved)
    train(finished.model_copy(update={"run": moved, "keep_checkpoints": 1}), resume=True, quiet=True)
    assert numbers(moved) == before
    kept = {p.name for p in (moved / "checkpoints").iterdir()}
    assert "14" in kept
    assert len(kept) <= 2, "the newest one and the best"
