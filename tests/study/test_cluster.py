"""Cells as jobs: the script for sbatch, and jobs run by submitit's local executor."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ringrl.config import SlurmConfig
from ringrl.data import EpisodeStore
from ringrl.errors import UserError
from ringrl.evaluation.records import read_records
from ringrl.study.cells import cells
from ringrl.study.cluster import run_on_cluster
from ringrl.study.plan import read_plan
from ringrl.study.runner import RunOptions, ablate

needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs submitit: pip install 'ringrl[slurm]'"
)


class _Begun(Exception):
    pass


def begin_all(write_plan, slurm: SlurmConfig) -> list[str]:
    """Submit two cells, and stop when both have started."""
    plan = read_plan(write_plan(Path("x.h5"), baselines=[]))
    begun: list[str] = []

    def on_start(name: str) -> None:
        begun.append(name)
        if len(begun) == 2:
            raise _Begun

    with pytest.raises(_Begun):
        list(run_on_cluster(list(cells(plan)), plan.output / "slurm", slurm, 1, None, on_start))
    return begun


@needs_submitit
def test_one_array_holds_all_cells_and_is_submitted_once(write_plan, cluster: Path) -> None:
    resources = SlurmConfig(partition="gpu", gpus_per_node=1, cpus_per_task=4, minutes=90, setup=("module load x",))
    names = [f"jaco_reach_top_left/at_{count}_seed0" for count in (1, 2)]
    assert begin_all(write_plan, resources) == names
    script = (cluster / "job.sh").read_text()
    for line in (
        "--array=0-1%1", "--partition=gpu", "--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1",
        "--cpus-per-task=4", "--time=90", "--job-name=runs", "--signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load x\n" in script
    assert sys.executable in script
    assert begin_all(write_plan, resources) == names, "running jobs are waited for"
    assert (cluster / "count").read_text() == "x\n"


@needs_submitit
def test_errors_of_the_cluster_are_reported(write_plan, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(write_plan(Path("x.h5")))

    def submit(slurm: SlurmConfig) -> None:
        list(run_on_cluster(list(cells(plan)), plan.output / "slurm", slurm, 1, None, lambda name: None))

    with pytest.raises(UserError, match="leave it at 1"):
        submit(SlurmConfig(nodes=2))
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    with pytest.raises(UserError, match="invalid partition specified: gpu"):
        submit(SlurmConfig(partition="gpu"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'ringrl\[slurm\]'"):
        submit(SlurmConfig())


@needs_submitit
def test_jobs_on_this_machine_train_and_evaluate(write_plan, jaco_store: EpisodeStore) -> None:
    """One of three fails."""
    plan = read_plan(write_plan(jaco_store.path, trajectories=[1], baselines=[]))
    blocked = plan.output / "jaco_reach_top_left" / "data"
    (blocked / "evaluation.jsonl" / "in the way").mkdir(parents=True)
    how = RunOptions(workers=3, slurm=SlurmConfig(minutes=10), cluster="local")
    with pytest.raises(UserError, match="1 of 3 failed"):
        ablate(plan, Console(quiet=True), "ringrl ablate plan.yaml", how)
    assert "Error" in (blocked / "failed.txt").read_text()
    records = read_records(plan.output).records
    assert {record.method for record in records} == {"random", "at"}
    assert {record.steps_trained for record in records if record.method == "at"} == {3}
    shutil.rmtree(blocked / "evaluation.jsonl")
    files = ablate(plan, Console(quiet=True), None, how._replace(retry=True))
    assert {record.method for record in read_records(files).records} == {"random", "data", "at"}
