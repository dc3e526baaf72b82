"""A training run as a SLURM job, through submitit. The job is queued again and resumed after its time limit."""

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
from ringrl.training.run_folder import holds_run
from ringrl.training.supervisor import run_supervised

FIRST_PORT, PORTS = 49_152, 16_384  # the dynamic ports


def submit(
    work: Callable[..., object], run: Path, slurm: SlurmConfig, resume: bool, cluster: str = "slurm"
) -> tuple[str, Path]:
    """Submit a run as a job. Return the job's number and the folder of its output, which is next to the run.

    `work` takes the argument `resume` and can be pickled. Raise UserError as `submitting` does, or if the run exists
    (without `resume`).
    """
    with submitting():
        if not resume and holds_run(run):
            raise UserError(f"{run}: holds a run already; use --resume to resume it, or give another --run")
        folder = run.absolute().with_name(f"{run.name}.slurm")
        executor = make_executor(folder, slurm, cluster, name=run.name)
        job = executor.submit(RequeuedJob(partial(_train_task, work, slurm.gpus_per_node > 0)))
    return job.job_id, folder


@contextmanager
def submitting() -> Iterator[Any]:
    """Yield the module submitit. Raise UserError if it is missing, or if submitit or SLURM fails inside the block."""
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher slurm: needs submitit; install it with: pip install 'ringrl[slurm]'") from None
    try:
        yield submitit
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--launcher slurm: the job was not accepted ({brief(error)})") from error


def make_executor(folder: Path, slurm: SlurmConfig, cluster: str, **own: object) -> Any:
    """Return a submitit executor for jobs with these resources, whose output goes to `folder`.

    `own` holds further parameters of submitit, which override the resources.
    """
    import submitit

    optional = {"partition": slurm.partition, "account": slurm.account, "constraint": slurm.constraint}
    parameters = {
        "nodes": slurm.nodes,
        "tasks_per_node": max(slurm.gpus_per_node, 1),
        "gpus_per_node": slurm.gpus_per_node or None,
        "cpus_per_task": slurm.cpus_per_task,
        "mem_gb": slurm.memory,
        "timeout_min": slurm.minutes,
        "slurm_setup": list(slurm.setup) or None,
        **{f"slurm_{name}": value for name, value in optional.items()},
    }
    executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=slurm.restarts)
    executor.update_parameters(**(parameters | own))
    return executor


@dataclasses.dataclass(frozen=True)
class RequeuedJob:
    """Work that submitit queues again after its time limit."""

    work: Callable[[], object]

    def __call__(self) -> object:
        return self.work()

    def checkpoint(self) -> Any:
        """Return the job that submitit queues after the time limit."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _train_task(work: Callable[..., object], has_gpus: bool) -> None:
    """Do the work of one task of a job. It always resumes, because the job may have been stopped and queued again."""
    import submitit

    task = submitit.JobEnvironment()
    port = FIRST_PORT + int(task.raw_job_id) % PORTS  # differs between jobs on the same node
    if has_gpus:
        os.environ["JAX_LOCAL_DEVICE_IDS"] = str(task.local_rank)
    config = DistributedConfig(
        coordinator=f"{task.hostnames[0]}:{port}", processes=task.num_tasks, process=task.global_rank
    )
    run_supervised(partial(work, resume=True), config)
