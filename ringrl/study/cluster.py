"""Cells as jobs of a cluster, through submitit: one array with a job per cell, queued again when its time is up."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ringrl.config import SlurmConfig
from ringrl.errors import UserError
from ringrl.study.cells import Work, attempt_logged, write
from ringrl.training.slurm import RequeuedJob, make_executor, submitting

JOB = "job.txt"  # number of the cell's job, in its folder
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED")
_SECONDS = 1.0  # between polls


def run_on_cluster(
    todo: Sequence[Work],
    folder: Path,
    slurm: SlurmConfig,
    workers: int,
    command: str | None,
    on_start: Callable[[str], None],
    cluster: str = "slurm",
) -> Iterator[tuple[Work, str | None]]:
    """Submit all cells, and yield each when its job ends, with the reason if it failed.

    Jobs continue when this process ends. The same command then waits for them and submits none twice.

    Submitit's files and the output of the jobs are written to `folder`. Up to `workers` jobs run at a time. `on_start`
    is called with the name of a cell whose job has started. `cluster` is submitit's name, "local" for this machine.
    Raise UserError if submitit or SLURM is missing or rejects the jobs.
    """
    if not todo:
        return
    if slurm.nodes > 1:
        raise UserError(f"--slurm.nodes: a cell is one process on one machine, not on {slurm.nodes}; leave it at 1")
    with submitting() as submitit:
        jobs: dict[Work, Any] = {}
        if cluster == "slurm":  # jobs of an earlier process
            jobs = {work: job for work in todo if (job := _earlier(submitit, work, folder))}
        new = [work for work in todo if work not in jobs]
        if new:
            one_process = {"nodes": 1, "tasks_per_node": 1, "slurm_array_parallelism": workers}
            executor = make_executor(folder.absolute(), slurm, cluster, name=folder.parent.name, **one_process)
            with executor.batch():
                submitted = [executor.submit(RequeuedJob(partial(attempt_logged, work, command))) for work in new]
            for work, job in zip(new, submitted, strict=True):
                write(work.folder / JOB, f"{job.job_id}\n")
                jobs[work] = job
    yield from _follow(jobs, on_start)


def _earlier(submitit: Any, work: Work, folder: Path) -> Any:
    """Return the cell's waiting or running job; None if there is none."""
    path = work.folder / JOB
    if not path.exists():
        return None
    job = submitit.SlurmJob(folder=folder.absolute(), job_id=path.read_text().strip())
    return job if job.state in _ALIVE else None


def _follow(jobs: dict[Work, Any], on_start: Callable[[str], None]) -> Iterator[tuple[Work, str | None]]:
    waiting, started = dict(jobs), set()
    while waiting:
        for work, job in list(waiting.items()):
            has_ended = job.done()
            if work not in started and (has_ended or job.state == "RUNNING"):
                started.add(work)
                on_start(work.name)
            if has_ended:
                del waiting[work]
                ended = f"job {job.job_id} ended with state {job.state}; see {job.paths.stderr}"
                yield work, None if work.is_finished else work.failure or work.note_failure(ended)
        if waiting:
            time.sleep(_SECONDS)
