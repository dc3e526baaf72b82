"""Runs that are stopped, that diverge, that are traced."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringrl.config import TrainConfig, to_yaml
from ringrl.errors import UserError
from ringrl.training import load_policy, read_info, train


def test_sigterm_saves_and_exits_with_zero(tiny: TrainConfig, tmp_path: Path) -> None:
    """A real process, stopped while it trains."""
    endless = tiny.optimiser.model_copy(update={"steps": 100_000})
    config = tiny.model_copy(update={"optimiser": endless, "checkpoint_every": 100_000})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    process = subprocess.Popen(
        [sys.executable, "-c", "from ringrl.cli import main; main()", "train", "--config", str(file), "--resume"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = config.run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, message = process.communicate(timeout=60)
    assert process.returncode == 0, message
    assert "stopped by SIGTERM: checkpoint saved after step" in message
    assert f"{config.run}: no checkpoint yet; training starts at step 0\n" in message
    step = read_info(config.run)[0]
    assert output == f"{config.run}: step {step} of 100000; next: ringrl train --config {file} --resume\n"
    written = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert written == list(range(1, step + 1)), "every computed step"
    assert load_policy(config.run).step == step


def test_a_run_that_diverges_stops_with_a_checkpoint_of_the_last_good_parameters(tiny: TrainConfig) -> None:
    wild = tiny.optimiser.model_copy(
        update={"learning_rate": 1e30, "warmup_steps": 0, "weight_decay": 0, "skipped_steps": 3}
    )
    config = tiny.model_copy(update={"optimiser": wild, "checkpoint_every": 100, "log_every": 1})
    with pytest.raises(UserError, match=r"as in the 3 steps before; .* start a new --run with a lower optim"):
        train(config, quiet=True)
    entries = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    skipped = [entry["skipped"] for entry in entries]
    assert skipped[-4:] == [1, 1, 1, 1]
    assert sum(skipped) == 4
    assert load_policy(config.run).step == len(entries)


def test_a_trace_is_written(tiny: TrainConfig) -> None:
    train(tiny, profile=True, quiet=True)
    traces = [path for path in (tiny.run / "profile").rglob("*") if path.is_file()]
    assert any(path.name.endswith(".xplane.pb") and path.stat().st_size > 1000 for path in traces)
