"""Several real processes with two devices each as one run, and how they end when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from ringrl.config import DistributedConfig, TrainConfig
from ringrl.data import EpisodeStore
from ringrl.errors import UserError, user_message
from ringrl.training import train
from ringrl.training.distributed import is_wanted

HEARTBEAT = 8  # seconds
MINUTE = 60.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Hosts:
    """Processes that run the same command, as on several hosts."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment, self.started = folder, environment, []

    def start(
        self, config: TrainConfig, count: int, *flags: str, devices: int = 2, only: int | None = None, **own: list[str]
    ) -> None:
        """Start `count` processes (or the first `only`) with flags for all, and one=[...] for process 1."""
        file = self.folder / "command.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        xla = f"{self.environment['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = self.environment | {"XLA_FLAGS": xla}
        command = [sys.executable, "-c", "from ringrl.cli import main; main()", "train", "--config", str(file), *flags]
        place = f"127.0.0.1:{free_port()}"
        self.started = []
        for index in range(count if only is None else only):
            where = [f"--distributed.coordinator={place}", f"--distributed.processes={count}"]
            where += [f"--distributed.process={index}", f"--distributed.heartbeat-timeout={HEARTBEAT}"]
            more = (where if count > 1 else []) + own.get("one", []) * (index == 1)
            self.started.append(
                subprocess.Popen(
                    [*command, *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )

    def end(self, index: int, timeout: float = 240.0) -> tuple[int, str, str]:
        """Return a process's exit code, output and errors."""
        output, errors = self.started[index].communicate(timeout=timeout)
        return self.started[index].returncode, output, errors


@pytest.fixture
def hosts(tmp_path: Path, environment: dict[str, str]) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, environment)
    yield hosts
    for process in hosts.started:
        process.kill()


def changed(config: TrainConfig, **sections: object) -> TrainConfig:
    values = config.model_dump()
    for name, value in sections.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return TrainConfig.model_validate(values)


@pytest.fixture
def spread(tiny: TrainConfig) -> TrainConfig:
    """`tiny` on four devices."""
    return changed(tiny, mesh={"data": 2, "seq": 2}, model={"heads": 2}, optimiser={"batch_size": 4})


@pytest.fixture
def endless(spread: TrainConfig) -> TrainConfig:
    """A run that ends only if it is stopped."""
    return changed(spread, optimiser={"steps": 1_000_000}, checkpoint_every=1_000_000)


def entries(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_until(condition: Callable[[], object], hosts: Hosts) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        for process in hosts.started:
            assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def is_training(config: TrainConfig) -> bool:
    file = config.run / "metrics.jsonl"
    return file.exists() and b"\n" in file.read_bytes()


def assert_equal_runs(several: Path, one: Path) -> None:
    found, expected = entries(several), entries(one)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose([e[name] for e in found], [e[name] for e in expected], rtol=1e-5)
    losses = [{e["step"]: e["validation_loss"] for e in run if "validation_loss" in e} for run in (found, expected)]
    assert list(losses[0]) == list(losses[1]) != []
    np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=1e-5)
    assert expected[0]["loss"] != pytest.approx(expected[-1]["loss"], rel=1e-3)


@pytest.mark.usefixtures("eight_devices")
def test_two_processes_equal_one(hosts: Hosts, spread: TrainConfig, tmp_path: Path) -> None:
    together = changed(spread, optimiser={"steps": 6}, validation_fraction=0.25, validate_every=4)
    hosts.start(together, 2)
    (code, output, errors), (other, silent, reported) = hosts.end(0), hosts.end(1)
    assert (code, other) == (0, 0), errors + reported
    assert output.endswith(f"{together.run}; next: ringrl evaluate --checkpoint {together.run}\n")
    assert "ringrl" not in silent + reported, "process 0 prints for all"
    alone = changed(together, run=tmp_path / "alone")
    train(alone, quiet=True)
    assert len(entries(alone.run)) == 6
    assert_equal_runs(together.run, alone.run)


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_two_processes_are_stopped_and_resume(hosts: Hosts, spread: TrainConfig, tmp_path: Path) -> None:
    """A SIGTERM to one process stops both, which save. They resume and are compared with one process."""
    held_out = {"validation_fraction": 0.25, "validate_every": 15}
    stopped = changed(spread, optimiser={"steps": 40}, checkpoint_every=1000, **held_out)
    hosts.start(stopped, 2)
    wait_until(lambda: is_training(stopped), hosts)
    hosts.started[1].send_signal(signal.SIGUSR1)  # as SIGTERM
    (code, _, errors), (other, _, reported) = hosts.end(0), hosts.end(1)
    assert (code, other) == (0, 0), errors + reported
    assert "stopped by SIGTERM: checkpoint saved after step" in errors
    (step,) = [int(path.name) for path in (stopped.run / "checkpoints").iterdir()]
    assert [entry["step"] for entry in entries(stopped.run)] == list(range(1, step + 1))
    assert step < 40

    hosts.start(stopped, 2, "--resume")
    (code, _, errors), (other, _, reported) = hosts.end(0), hosts.end(1)
    assert (code, other) == (0, 0), errors + reported
    assert len(list((stopped.run / "tensorboard").iterdir())) == 2, "one file per start"
    alone = changed(stopped, run=tmp_path / "alone")
    train(alone, quiet=True)
    assert len(entries(alone.run)) == 40
    assert_equal_runs(stopped.run, alone.run)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1], ids=["the coordinator", "another"])
def test_a_process_that_is_killed_ends_the_others_within_a_minute(
    hosts: Hosts, endless: TrainConfig, lost: int
) -> None:
    hosts.start(endless, 2)
    wait_until(lambda: is_training(endless), hosts)
    hosts.started[lost].kill()
    assert hosts.end(1 - lost, timeout=MINUTE)[0] != 0


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_all(hosts: Hosts, endless: TrainConfig) -> None:
    hosts.start(endless, 2)
    wait_until(lambda: is_training(endless), hosts)
    hosts.started[1].send_signal(signal.SIGINT)
    ends = [hosts.end(index, timeout=MINUTE) for index in (0, 1)]
    assert [code for code, _, _ in ends] == [130, 130]
    assert ends[0][2].splitlines()[-1] == "ringrl: process 1 of 2 was interrupted"
    assert ends[1][2].splitlines()[-1] == "ringrl: stopped; finished work is kept"


@pytest.mark.slow
def test_a_process_that_never_connects(hosts: Hosts, tiny: TrainConfig) -> None:
    hosts.start(tiny, 2, "--distributed.start-timeout=5", only=1)
    assert hosts.end(0)[0] == -signal.SIGABRT
    assert not tiny.run.exists()


@pytest.mark.slow
def test_a_different_setting_in_one_process_is_reported_by_all(hosts: Hosts, spread: TrainConfig) -> None:
    hosts.start(spread, 2, one=["--optimiser.learning-rate=0.5"])
    difference = (
        "process 1 of 2: optimiser.learning_rate is 0.5, but 0.001 in process 0; start all with the same command"
    )
    ends = [hosts.end(index) for index in (0, 1)]
    assert [code for code, _, _ in ends] == [2, 2]
    assert f"ringrl: {difference}\n" in ends[1][2]
    assert f"ringrl: process 1 of 2 stopped: {difference}\n" in ends[0][2]
    assert not spread.run.exists()


def test_processes_compare_their_settings_and_data_before_they_write(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference ends all, as in the test above."""
    compared = dict[str, dict[str, object]]()

    def agree(name: str, settings: dict[str, object]) -> None:
        compared[name] = settings
        if name == "data":
            raise UserError("process 1 of 2: fingerprint of the data is")

    monkeypatch.setattr("ringrl.training.distributed.agree", agree)
    with pytest.raises(UserError, match="fingerprint of the data is"):
        train(tiny, quiet=True)
    assert list(compared) == ["settings", "data"]
    assert compared["settings"]["optimiser.steps"] == 14
    assert compared["settings"].keys() >= {"seed", "resume", "version of jax"}
    assert compared["data"] == {"fingerprint of the data": EpisodeStore(tiny.data).fingerprint}
    assert not tiny.run.exists()


@pytest.mark.slow
def test_an_error_of_process_0_ends_all(hosts: Hosts, spread: TrainConfig) -> None:
    """Process 0 fails while the others wait for it. The reverse is tested above."""
    spread.run.mkdir()
    (spread.run / "thesis.tex").write_text("years of work")
    hosts.start(spread, 2)
    ends = [hosts.end(index) for index in (0, 1)]
    assert [code for code, _, _ in ends] == [2, 2]
    assert f"ringrl: {spread.run}: holds other files" in ends[0][2]
    assert f"ringrl: process 0 of 2 stopped: {spread.run}: holds other files" in ends[1][2]


def test_out_of_memory_is_a_line() -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (of XLA)
        jax.jit(lambda: jnp.ones(2**45))()
    assert str(user_message(caught.value)).startswith("not enough memory (")


def test_when_a_run_is_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    together = DistributedConfig(coordinator="node1:1234", processes=2, process=1)
    assert not is_wanted(DistributedConfig())
    assert is_wanted(DistributedConfig(enabled="on"))
    assert is_wanted(together)
    assert not is_wanted(together.model_copy(update={"enabled": "off"}))
    monkeypatch.setenv("SLURM_NTASKS", "8")  # as a batch script sees it, outside srun
    assert not is_wanted(DistributedConfig())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert is_wanted(DistributedConfig())
    assert not is_wanted(DistributedConfig(enabled="off"))


def test_unconnected_hosts_of_a_pod_are_an_error(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)  # as the TPU runtime reports
    with pytest.raises(UserError, match=r"belong to 4 hosts that are not connected; .*--distributed.enabled on"):
        train(tiny, quiet=True)
    assert not tiny.run.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "node1:1234"}, "give all three"),
        ({"processes": 2, "process": 0}, "give all three"),
        ({"coordinator": "node1", "processes": 2, "process": 0}, "not of the form HOST:PORT"),
        ({"coordinator": "node1:99999", "processes": 2, "process": 0}, "not of the form HOST:PORT"),
        ({"coordinator": "node1:1", "processes": 2, "process": 2}, "process 2 is out of range: 2 processes"),
    ],
)
def test_incomplete_settings_are_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedConfig.model_validate(values)
