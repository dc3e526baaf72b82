"""A training run as a SLURM job, through submitit: queued again and resumed when its time is up."""

import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ringrl.config import DistributedConfig, SlurmConfig
from ringrl.errors import UserError, brief
from ringrl.training.supervisor import run_supervised

FIRST_PORT, PORTS = 49_152, 16_384  # those that nobody may reserve


def submit(
    work: Callable[..., object], run: Path, slurm: SlurmConfig, resume: bool, cluster: str = "slurm"
) -> tuple[str, Path]:
    """Hand a run to the cluster; returns the number of the job and the folder of its output, beside the run's.

    `work` takes the argument `resume` and can be pickled.

    Raises:
      UserError: submitit or SLURM is missing, the job is refused, or the run exists (without `resume`).
    """
    with submitting():
        if not resume and (run / "config.yaml").exists():
            raise UserError(f"{run}: holds a run already; use --resume to go on with it, or give another --run")
        folder = run.absolute().with_name(f"{run.name}.slurm")
        executor = make_executor(folder, slurm, cluster, name=run.name)
        job = executor.submit(TrainJob(work, slurm.gpus_per_node > 0))
    return job.job_id, folder


@contextmanager
def submitting() -> Iterator[Any]:
    """Gives submitit.

    Raises:
      UserError: it is not installed, or it or SLURM refuses what is done with it.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher slurm: needs submitit; install it with: pip install 'ringrl[slurm]'") from None
    try:
        yield submitit
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--launcher slurm: no job was taken ({brief(error)})") from error


def make_executor(folder: Path, slurm: SlurmConfig, cluster: str, **own: object) -> Any:
    """What submits jobs that ask for this, or for what `own` says in submitit's words; `folder` is for their output."""
    import submitit

    executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=slurm.restarts)
    executor.update_parameters(**(_parameters(slurm) | own))
    return executor


def _parameters(slurm: SlurmConfig) -> dict[str, Any]:
    """In submitit's words."""
    asked = {"partition": slurm.partition, "account": slurm.account, "constraint": slurm.constraint}
    return {
        "nodes": slurm.nodes,
        "tasks_per_node": max(slurm.gpus_per_node, 1),
        "gpus_per_node": slurm.gpus_per_node or None,
        "cpus_per_task": slurm.cpus_per_task,
        "mem_gb": slurm.memory,
        "timeout_min": slurm.minutes,
        "slurm_setup": list(slurm.setup) or None,
        **{f"slurm_{key}": value for key, value in asked.items()},
    }


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """What each task of the job does. It resumes always: the job may have been stopped and queued again."""

    work: Callable[..., object]
    has_gpus: bool

    def __call__(self) -> None:
        import submitit

        task = submitit.JobEnvironment()
        port = FIRST_PORT + int(task.raw_job_id) % PORTS  # which other jobs on the machine are unlikely to have
        if self.has_gpus:
            os.environ["JAX_LOCAL_DEVICE_IDS"] = str(task.local_rank)
        config = DistributedConfig(
            coordinator=f"{task.hostnames[0]}:{port}", processes=task.num_tasks, process=task.global_rank
        )
        run_supervised(partial(self.work, resume=True), config)

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is up."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
