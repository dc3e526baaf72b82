"""The ablation: one question, many small runs. What is finished is skipped, what was interrupted goes on."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ringrl.config import SlurmConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampler import episodes_for_contexts
from ringrl.envs import domain_of
from ringrl.errors import UserError
from ringrl.evaluation.video import write_videos
from ringrl.files import lock
from ringrl.study.cells import (
    EVALUATION,
    LOG,
    Cell,
    Reference,
    Work,
    attempt_logged,
    cells,
    check,
    failure,
    forget_failure,
    is_finished,
    note_failure,
    references,
)
from ringrl.study.cluster import run_on_cluster
from ringrl.study.cost import cost, cost_table, with_steps_for
from ringrl.study.plan import AblationPlan
from ringrl.study.pool import Ended, run_all
from ringrl.study.timing import Timing, measure_all, read_timings
from ringrl.study.watch import Watch
from ringrl.training.run_folder import dataset_fingerprint, saved_configuration

COMPILED = ".compiled"  # programs; those of one shape are the same for all seeds


class Run(NamedTuple):
    """How a plan is carried out."""

    workers: int = 1
    """Cells at a time."""
    retry: bool = False
    """Run those again that failed before."""
    timing: bool = True
    """Time a few steps of every kind of cell first."""
    slurm: SlurmConfig | None = None
    """Hand the cells to SLURM; None: run them here."""
    cluster: str = "slurm"
    """Of submitit: "local" runs its jobs on this machine."""


def ablate(plan: AblationPlan, console: Console, command: str | None = None, how: Run | None = None) -> list[Path]:
    """Train and evaluate every cell that is not finished; returns the results files.

    A cell that was interrupted goes on from its last checkpoint, or from its last episode. One that fails stops no
    other. Random actions and the dataset's own episodes are recorded beside the cells.

    Raises:
      UserError: settings that no run accepts, data that does not fit a task, another plan's folder; or, when all others
        are done, cells that failed.
    """
    how = how or Run()
    everything, beside = _check(plan, how)
    with _alone_in(plan.output):
        chosen, timings = _timed(plan, everything, beside, how, console)
        everyone: list[Work] = [*beside, *chosen]
        todo = _todo(everyone, how.retry)
        waiting = [work for work in todo if isinstance(work, Cell)]
        if waiting:
            console.print(cost_table(waiting, timings, sum(map(is_finished, chosen)), how.workers))
        estimates = {work.name: cost(work, timings).seconds if isinstance(work, Cell) else None for work in todo}
        failed = {work: why for work in everyone if (why := failure(work)) is not None}
        with Watch(estimates, how.workers, console) as watch:
            for work, why in _outcomes(plan, todo, how, command, watch):
                watch.end(work.name, why)
                if why is not None:
                    failed[work] = why
    _tell_failures(failed, len(everyone), console)
    return [work.folder / EVALUATION for work in everyone]


def estimate(plan: AblationPlan, console: Console, how: Run | None = None) -> None:
    """Print what is left to do of a plan, and run none of it; what is timed is kept for the run.

    Raises:
      UserError: as `ablate`.
    """
    how = how or Run()
    everything, beside = _check(plan, how)
    with _alone_in(plan.output):
        chosen, timings = _timed(plan, everything, beside, how, Console(stderr=True))
    waiting = [cell for cell in chosen if not is_finished(cell)]
    if waiting:
        console.print(cost_table(waiting, timings, len(chosen) - len(waiting), how.workers))
    else:
        console.print(f"all {len(chosen)} cells are finished")


def _check(plan: AblationPlan, how: Run) -> tuple[list[Cell], list[Reference]]:
    """The plan's cells and references; UserError before anything is made where they cannot all be run."""
    if how.workers < 1:
        raise UserError(f"--workers: {how.workers} is too few, at least 1 is needed")
    everything, fingerprints, stores = list(cells(plan)), {}, {}
    for task, data in plan.datasets.items():
        store = stores[task] = EpisodeStore(data)
        if store.domain != domain_of(task).name:
            raise UserError(f"{data}: holds episodes of {store.domain}, which are of no use for {task}")
        store.returns(task)
        fingerprints[task] = dataset_fingerprint(store)
    for cell in everything:
        config = cell.config
        try:
            episodes_for_contexts(stores[config.task], config.task, config.context, config.seed)
        except UserError as error:
            raise UserError(f"{cell.name}: {error}") from error
    if plan.budget == "time" and not how.timing:
        raise UserError("--untimed: the budget time needs steps that were timed; leave it out")
    if plan.videos and how.slurm is None:
        for task in plan.datasets:
            write_videos(task, {})  # none, but it is found out whether they can be
    everything = list(cells(plan, fingerprints))
    return everything, list(references(plan, fingerprints))


def _timed(
    plan: AblationPlan, everything: Sequence[Cell], beside: Sequence[Reference], how: Run, console: Console
) -> tuple[list[Cell], Mapping[str, Timing]]:
    """The cells, with their steps where the budget is time, and what has been timed of them."""
    waiting = [cell for cell in everything if not is_finished(cell)]
    if how.slurm is None and how.timing:
        with _compiled(plan.output):
            timings = measure_all(waiting, plan.output, how.workers, console)
    else:  # the machine that would be timed here is not the one that the cells run on
        timings = read_timings(plan.output)
    chosen = [_with_steps(plan, cell, timings) for cell in everything]
    everyone: list[Work] = [*beside, *chosen]
    for work in everyone:
        check(work)
    return chosen, timings


def _with_steps(plan: AblationPlan, cell: Cell, timings: Mapping[str, Timing]) -> Cell:
    """As many as its time allows, or, once it has begun, as many as it began with."""
    if plan.budget != "time":
        return cell
    if (cell.folder / "config.yaml").exists():
        steps = saved_configuration(cell.folder).optimiser.steps
        return cell.of_steps(steps)
    try:
        return with_steps_for(plan.seconds, cell, timings)
    except KeyError:
        raise UserError(
            f"{cell.name}: the budget time needs steps that were timed where the cells run; run `ringrl ablate` with "
            "--dry-run on such a machine first"
        ) from None


def _todo(everything: Sequence[Work], retry: bool) -> list[Work]:
    """What is neither finished nor failed; with `retry`, what failed too."""
    todo = [work for work in everything if not is_finished(work) and (retry or failure(work) is None)]
    for work in todo:
        forget_failure(work)
    return todo


def _outcomes(
    plan: AblationPlan, todo: Sequence[Work], how: Run, command: str | None, watch: Watch
) -> Iterator[tuple[Work, str | None]]:
    """Each as it ends, and why it failed where it did."""
    if how.slurm is not None:
        folder = plan.output / "slurm"
        yield from run_on_cluster(todo, folder, how.slurm, how.workers, command, watch.begin, how.cluster)
        return
    tasks = [partial(attempt_logged, work, command) for work in todo]
    with _compiled(plan.output):
        for ended in run_all(tasks, how.workers, lambda index: watch.begin(todo[index].name)):
            yield todo[ended.number], _why(todo[ended.number], ended)


def _why(work: Work, ended: Ended) -> str | None:
    if ended.death is not None:
        return note_failure(work, ended.death)
    why: str | None = ended.result
    return why


def _tell_failures(failed: Mapping[Work, str], count: int, console: Console) -> None:
    """UserError where there are any, after a line for each."""
    for work, why in failed.items():
        console.print(f"{work.name} failed: {why} ({work.folder / LOG})", soft_wrap=True, markup=False, highlight=False)
    if failed:
        raise UserError(f"{len(failed)} of {count} failed; --retry runs them again, all others are finished")


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """UserError where another process is at the same ablation."""
    with ExitStack() as held:
        try:
            held.enter_context(lock(output, "is running this ablation", file=output / ".lock"))
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror}); give another output") from error
        yield


@contextmanager
def _compiled(output: Path) -> Iterator[None]:
    """Processes that are started here keep the programs that they compile, and find those of the others."""
    wanted = {
        "JAX_COMPILATION_CACHE_DIR": str((output / COMPILED).absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
