"""Runs that are stopped, that diverge, that are traced."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from ringrl.config import TrainConfig
from ringrl.config_files import to_yaml
from ringrl.errors import UserError
from ringrl.evaluation import load_policy
from ringrl.training import read_info, train


# One tuple of signals (ringrl.signals.STOPPING) serves training and all other commands. All: tests/test_signals.py.
def test_a_signal_saves_and_exits_with_zero(tiny: TrainConfig, tmp_path: Path) -> None:
    """A real process, stopped while it trains."""
    endless = tiny.optimiser.model_copy(update={"steps": 100_000})
    config = tiny.model_copy(update={"optimiser": endless, "checkpoint_every": 100_000})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    process = start("train", "--config", str(file), "--resume-or-start")
    metrics, deadline = config.run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, message = process.communicate(timeout=60)
    assert process.returncode == 0, message
    assert "stopped by SIGTERM: checkpoint saved after step" in message
    assert "step 2 of 100000  loss " in message, "without a terminal, a line shows the progress"
    step = read_info(config.run)[0]
    again = f"ringrl train --config {file} --resume-or-start"
    assert output == f"{config.run}: step {step} of 100000; next: {again}\n"
    written = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert written == list(range(1, step + 1)), "every computed step"
    assert load_policy(config.run).step == step


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from ringrl.cli import main; main()", *arguments]
    command = ["env", "--default-signal=HUP", *command]  # nohup, under which the tests may run, ignores it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_signal_stops_any_command_in_order(tmp_path: Path) -> None:
    command = ["data", "collect", "cartpole_swingup", "--episodes", "500", "--workers", "1"]
    process = start(*command, "--output", str(tmp_path / "c"))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".c.partial/**/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, message
    assert message.splitlines()[-1] == "ringrl: stopped; finished work is kept"


@pytest.mark.parametrize(
    "rate",
    [1e30, pytest.param(1e300, marks=pytest.mark.slow)],
    ids=["infinite loss", "infinite parameters after a finite loss"],
)
def test_a_run_that_diverges_stops_with_a_checkpoint_of_the_last_good_parameters(
    tiny: TrainConfig, rate: float
) -> None:
    wild = tiny.optimiser.model_copy(
        update={"learning_rate": rate, "warmup_steps": 0, "weight_decay": 0, "skipped_steps": 3}
    )
    config = tiny.model_copy(update={"optimiser": wild, "checkpoint_every": 100, "log_every": 1})
    with pytest.raises(UserError, match=r"as did the 3 steps before; .* start a new --run with a lower optim"):
        train(config, quiet=True)
    entries = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    skipped = [entry["skipped"] for entry in entries]
    assert skipped[-4:] == [1, 1, 1, 1]
    assert sum(skipped) == 4
    assert load_policy(config.run).step == len(entries)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(load_policy(config.run).policy, nnx.Param)))
