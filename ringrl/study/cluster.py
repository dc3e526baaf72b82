"""Cells as jobs of a cluster, through submitit: one array, each job a cell, queued again when its time is up."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ringrl.config import SlurmConfig
from ringrl.errors import UserError
from ringrl.study.cells import Work, attempt_logged, failure, is_finished, note_failure, write
from ringrl.training.slurm import make_executor, submitting

JOB = "job.txt"  # in a cell's folder: the number of its job
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED")
_SECONDS = 1.0  # between looks


def run_on_cluster(
    todo: Sequence[Work],
    folder: Path,
    slurm: SlurmConfig,
    workers: int,
    command: str | None,
    on_start: Callable[[str], None],
    cluster: str = "slurm",
) -> Iterator[tuple[Work, str | None]]:
    """Submit all cells, and yield each as its job ends, with why it failed where it did.

    Jobs go on when this process ends; the same command then waits for them and submits none twice.

    Args:
      todo: the cells.
      folder: what submitit writes, the output of jobs included.
      slurm: what each asks for; a cell is one process on one machine.
      workers: jobs that run at a time.
      command: the command line, for the records.
      on_start: told the name of a cell whose job runs.
      cluster: submitit's name of it; "local" is this machine.

    Raises:
      UserError: submitit or SLURM is missing, or the jobs are refused.
    """
    if not todo:
        return
    if slurm.nodes > 1:
        raise UserError(f"--slurm.nodes: a cell is one process on one machine, not on {slurm.nodes}; leave it at 1")
    with submitting() as submitit:
        jobs = _submit(submitit, todo, folder, slurm, workers, command, cluster)
    yield from _follow(jobs, on_start)


def _submit(
    submitit: Any,
    todo: Sequence[Work],
    folder: Path,
    slurm: SlurmConfig,
    workers: int,
    command: str | None,
    cluster: str,
) -> dict[Work, Any]:
    """The jobs of all cells, those included that an earlier process submitted and that are not over."""
    found = {} if cluster != "slurm" else {work: job for work in todo if (job := _earlier(submitit, work, folder))}
    new = [work for work in todo if work not in found]
    if not new:
        return found
    one_process = {"nodes": 1, "tasks_per_node": 1, "slurm_array_parallelism": workers}
    executor = make_executor(folder.absolute(), slurm, cluster, name=folder.parent.name, **one_process)
    with executor.batch():
        submitted = [executor.submit(CellJob(work, command)) for work in new]
    for work, job in zip(new, submitted, strict=True):
        write(work.folder / JOB, f"{job.job_id}\n")
    return found | dict(zip(new, submitted, strict=True))


def _earlier(submitit: Any, work: Work, folder: Path) -> Any:
    """The cell's job that is waiting or running; None where there is none."""
    path = work.folder / JOB
    if not path.exists():
        return None
    job = submitit.SlurmJob(folder=folder.absolute(), job_id=path.read_text().strip())
    return job if job.state in _ALIVE else None


def _follow(jobs: dict[Work, Any], on_start: Callable[[str], None]) -> Iterator[tuple[Work, str | None]]:
    waiting, started = dict(jobs), set()
    while waiting:
        for work, job in list(waiting.items()):
            over = job.done()
            if work not in started and (over or job.state == "RUNNING"):
                started.add(work)
                on_start(work.name)
            if over:
                del waiting[work]
                yield work, _why(work, job)
        if waiting:
            time.sleep(_SECONDS)


def _why(work: Work, job: Any) -> str | None:
    """Why a job that is over did not finish its cell."""
    if is_finished(work):
        return None
    return failure(work) or note_failure(work, f"job {job.job_id} ended with state {job.state}; see {job.paths.stderr}")


@dataclasses.dataclass(frozen=True)
class CellJob:
    """What a job does."""

    work: Work
    command: str | None

    def __call__(self) -> str | None:
        return attempt_logged(self.work, self.command)

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is up; the cell then goes on from its last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
