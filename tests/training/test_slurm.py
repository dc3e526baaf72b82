"""Runs as SLURM jobs: the script for sbatch, and a job of two processes with submitit's local executor."""

import importlib.util
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from ringrl.config import SlurmConfig, TrainConfig
from ringrl.errors import UserError
from ringrl.evaluation import load_policy
from ringrl.training import train
from ringrl.training.slurm import submit

needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs submitit: pip install 'ringrl[slurm]'"
)


@needs_submitit
def test_the_script_for_sbatch(tiny: TrainConfig, cluster: Path) -> None:
    asked = SlurmConfig(
        partition="gpu", nodes=4, gpus_per_node=8, cpus_per_task=12, minutes=90, setup=("module load x",)
    )
    assert submit(partial(train, tiny), tiny.run, asked, resume=False) == ("7", tiny.run.with_name("run.slurm"))
    script = (cluster / "job.sh").read_text()
    for line in (
        "--partition=gpu", "--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=12",
        "--time=90", "--mem=64GB", "--job-name=run", "--signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "--account" not in script
    assert "\nmodule load x\n" in script
    assert script.index("module load x") < script.index("\nsrun ")
    assert sys.executable in script


@needs_submitit
def test_rejected_jobs(tiny: TrainConfig, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    with pytest.raises(UserError, match="invalid partition specified: gpu"):
        submit(partial(train, tiny), tiny.run, SlurmConfig(partition="gpu"), resume=False)
    monkeypatch.setenv("PATH", str(tiny.run))
    with pytest.raises(UserError, match="srun"):
        submit(partial(train, tiny), tiny.run, SlurmConfig(), resume=False)
    tiny.run.mkdir()
    (tiny.run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="use --resume"):
        submit(partial(train, tiny), tiny.run, SlurmConfig(), resume=False)


def test_missing_submitit_is_reported_with_the_remedy(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'ringrl\[slurm\]'"):
        submit(partial(train, tiny), tiny.run, SlurmConfig(), resume=False)


PROGRAM = """
import json, sys
from ringrl.config import SlurmConfig, TrainConfig
from functools import partial
from ringrl.training import train
from ringrl.training.slurm import submit

config = TrainConfig.model_validate_json(sys.argv[1])
submit(partial(train, config), config.run, SlurmConfig(gpus_per_node=2, minutes=10), False, cluster="local")
"""


@needs_submitit
def test_a_job_of_two_processes_trains(tiny: TrainConfig, environment: dict[str, str]) -> None:
    """One process for each of two GPUs; cores play the GPUs."""
    values = json.loads(tiny.model_dump_json())
    values["mesh"]["data"] = 2
    subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(values)], env=environment, check=True, timeout=120)
    logs, deadline = tiny.run.with_name("run.slurm"), time.monotonic() + 240
    while len(list(logs.glob("*_result.pkl"))) < 2:
        assert time.monotonic() < deadline, [file.read_text() for file in logs.glob("*.err")]
        time.sleep(0.5)
    assert load_policy(tiny.run).step == 14
    lines = (tiny.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 15))
