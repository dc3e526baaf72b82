"""A run that is killed with SIGKILL and resumed equals one that is not, bit for bit."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ringrl.config import TrainConfig, to_yaml
from ringrl.training import load_policy, train

EXACT = ("step", "loss", "gradient_norm", "learning_rate")  # tokens_per_second is the clock's


def numbers(run: Path) -> list[list[float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[entry[name] for name in EXACT] for entry in entries]


def start(config: TrainConfig, *flags: str) -> subprocess.Popen[bytes]:
    file = config.run.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    command = [str(Path(sys.executable).with_name("ringrl")), "train", "--config", str(file), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, process: subprocess.Popen[bytes]) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.wait() == -9


def test_killed_at_three_moments_and_resumed_is_bit_identical(tiny: TrainConfig, tmp_path: Path) -> None:
    whole = tiny.model_copy(update={"run": tmp_path / "whole"})
    train(whole, quiet=True)

    process = start(tiny)
    wait_for(lambda: lines(tiny.run) >= 2, process)  # before the first checkpoint
    kill(process)
    assert not list((tiny.run / "checkpoints").glob("[0-9]*"))

    process = start(tiny, "--resume")
    wait_for(lambda: any((tiny.run / "checkpoints").glob("*8*")), process)  # the second checkpoint is being written
    kill(process)

    process = start(tiny, "--resume")
    wait_for(lambda: lines(tiny.run) >= 10, process)  # past the last checkpoint: this work is done twice
    kill(process)
    with (tiny.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # what a kill in the middle of a write leaves

    assert start(tiny, "--resume").wait() == 0
    assert numbers(tiny.run) == numbers(whole.run)
    assert load_policy(tiny.run).parameter_hash == load_policy(whole.run).parameter_hash


def test_resuming_a_finished_run_changes_nothing(tiny: TrainConfig) -> None:
    train(tiny, quiet=True)
    before = (tiny.run / "metrics.jsonl").read_bytes()
    train(tiny, resume=True, quiet=True)
    assert (tiny.run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", [{"seed": 4}, {"optimiser": {"steps": 15}}])
def test_seed_and_settings_do_change_the_numbers(tiny: TrainConfig, tmp_path: Path, change: dict) -> None:
    """The identity above is no accident of numbers that never differ."""
    other = tiny.model_dump() | {"run": tmp_path / "other"}
    other |= {name: other[name] | value if isinstance(value, dict) else value for name, value in change.items()}
    train(tiny, quiet=True)
    train(TrainConfig.model_validate(other), quiet=True)
    a, b = numbers(tiny.run), numbers(tmp_path / "other")
    assert not np.array_equal(a[:14], b[:14])
