"""The runner of an ablation: trains and evaluates all cells of a plan, in processes of this machine.

Finished cells are skipped and interrupted ones are resumed, so the same command can be repeated at any time.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from ringrl.cores import available_cores
from ringrl.data import EpisodeStore
from ringrl.data.sampling.held_out import held_out
from ringrl.data.sampling.sampler import episodes_for_contexts
from ringrl.envs import domain_of
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, lock
from ringrl.processes import end_with_parent
from ringrl.signals import STOPPING, ignore
from ringrl.study.cells import EVALUATION, LOG, Cell, Reference, Work, attempt_logged, cells, references
from ringrl.study.cost import cost_table, estimates
from ringrl.study.plan import AblationPlan
from ringrl.study.progress import AblationProgress
from ringrl.training.loop import check_actions
from ringrl.training.run_folder import dataset_fingerprint

COMPILED = ".compiled"  # compiled programs, which all seeds share


class RunOptions(NamedTuple):
    """How a plan is carried out."""

    workers: int = 1
    """Cells that run at once."""
    retry: bool = False
    """Run failed cells again."""


class TaskError(str):
    """The reason why a task failed or its process died, in place of a result."""


def ablate(
    plan: AblationPlan, console: Console, command: str | None = None, options: RunOptions = RunOptions()
) -> list[Path]:
    """Train and evaluate every cell that is not finished, and return the results files.

    An interrupted cell resumes from its last checkpoint or episode. A cell that fails stops no other. Random actions
    and the episodes of the dataset are recorded next to the cells.

    Raise UserError for settings that no run accepts, data that does not fit a task, a folder of another plan, or (after
    all other cells) cells that failed.
    """
    everything, reference_work = _check(plan, options)
    with _locked(plan.output):
        work: list[Work] = [*reference_work, *everything]
        for one in work:
            one.check()
        todo = [one for one in work if not one.is_finished and (options.retry or one.failure is None)]
        for one in todo:
            one.forget_failure()
        costs = estimates(everything, options.workers)
        waiting = [cell for cell in todo if isinstance(cell, Cell)]
        if waiting:
            console.print(cost_table(waiting, costs, len(everything) - len(costs), options.workers))
        expected = {one.name: costs[one.name].seconds if isinstance(one, Cell) else 0.0 for one in todo}
        failed = {one: why for one in work if (why := one.failure) is not None}
        with AblationProgress(expected, options.workers, console) as progress:
            for one, why in _outcomes(plan, todo, options, command, progress.begin):
                progress.end(one.name, why)
                if why is not None:
                    failed[one] = why
    for one, why in failed.items():
        console.print(f"{one.name} failed: {why} ({one.folder / LOG})", soft_wrap=True, markup=False, highlight=False)
    if failed:
        raise UserError(f"{len(failed)} of {len(work)} failed; --retry runs them again, all others are finished")
    return [one.folder / EVALUATION for one in work]


def estimate(plan: AblationPlan, console: Console, options: RunOptions = RunOptions()) -> None:
    """Print the remaining cost of a plan without running it, within seconds. Raise UserError as `ablate` does."""
    everything, reference_work = _check(plan, options)
    for one in (*reference_work, *everything):
        one.check()
    costs = estimates(everything, options.workers)
    waiting = [cell for cell in everything if cell.name in costs]
    if waiting:
        console.print(cost_table(waiting, costs, len(everything) - len(waiting), options.workers))
    else:
        console.print(f"all {len(everything)} cells are finished")


def _check(plan: AblationPlan, options: RunOptions) -> tuple[list[Cell], list[Reference]]:
    """Return the plan's cells and references. Write nothing. Raise UserError if one of them cannot be run."""
    if options.workers < 1:
        raise UserError(f"--workers: {options.workers} is too small; give at least 1")
    cells(plan)
    stores, fingerprints = {}, {}
    for task, data in plan.datasets.items():
        store = stores[task] = EpisodeStore(data)
        if store.domain != domain_of(task).name:
            raise UserError(f"{data}: contains episodes of {store.domain}, which do not fit the task {task}")
        store.returns(task)
        fingerprints[task] = dataset_fingerprint(store)
    everything = cells(plan, fingerprints)
    for cell in everything:
        config = cell.config
        try:
            check_actions(config, stores[config.task].facts)
            excluded = held_out(stores[config.task], config)
            episodes_for_contexts(stores[config.task], config.task, config.context, config.seed, excluded=excluded)
        except UserError as error:
            raise UserError(f"{cell.name}: {error}") from error
    return everything, references(plan, fingerprints)


def _outcomes(
    plan: AblationPlan,
    todo: Sequence[Work],
    options: RunOptions,
    command: str | None,
    on_start: Callable[[str], None],
) -> Iterator[tuple[Work, str | None]]:
    """Yield each cell when it ends, and why it failed if it did."""
    tasks = [partial(attempt_logged, work, command) for work in todo]
    for index, why in run_all(tasks, options.workers, plan.output / COMPILED, lambda index: on_start(todo[index].name)):
        yield todo[index], todo[index].note_failure(why) if isinstance(why, TaskError) else why


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Create the output folder and lock it. Raise UserError if another ablation is running in it."""
    with explain_write_errors(output), lock(output, "is running this ablation", file=output / ".lock"):
        yield


def run_all(
    tasks: Sequence[Callable[[], Any]], workers: int, compiled: Path, on_start: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    """Start tasks in order in worker processes. Yield the index and the result (or `TaskError`) of each when it ends.

    A process that dies fails its own task only. All processes end with the main process, and divide the cores among
    them. Tasks and results can be pickled.

    Args:
      compiled: folder of compiled programs, which all processes share.
      on_start: called with the index of a task that starts.
    """
    waiting = list(range(len(tasks)))
    workers = min(workers, len(tasks))
    crew = [_Worker(number, workers, compiled) for number in range(workers)]
    try:
        while waiting or any(worker.index is not None for worker in crew):
            for number, worker in enumerate(crew):
                if worker.index is None and waiting:
                    if not worker.process.is_alive():
                        crew[number] = worker = _Worker(number, workers, compiled)
                    index = waiting.pop(0)
                    on_start(index)
                    worker.start(index, tasks[index])
            busy = [worker for worker in crew if worker.index is not None]
            ready = wait([worker.pipe for worker in busy])
            yield from [worker.end() for worker in busy if worker.pipe in ready]
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A process that runs one task after another."""

    def __init__(self, number: int, workers: int, compiled: Path) -> None:
        cores: set[int] = set()
        if hasattr(os, "sched_getaffinity") and 1 < workers <= available_cores():
            cores = set(sorted(os.sched_getaffinity(0))[number::workers])
        context = multiprocessing.get_context("spawn")  # not forked: JAX's threads may hold locks at that moment
        self.pipe, inside = context.Pipe()
        self.process = context.Process(target=_serve, args=(inside, cores, workers, compiled), daemon=True)
        self.process.start()
        inside.close()
        self.index: int | None = None

    def start(self, index: int, task: Callable[[], Any]) -> None:
        self.index = index
        with suppress(OSError):  # `end` reports a dead process
            self.pipe.send(task)

    def end(self) -> tuple[int, Any]:
        index, self.index = self.index, None
        assert index is not None
        try:
            return index, self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
        return index, TaskError(f"its process ended with code {self.process.exitcode} (-9: often out of memory)")


def _serve(pipe: Connection, cores: set[int], workers: int, compiled: Path) -> None:
    ignore((signal.SIGINT, *STOPPING))  # they reach the main process, which ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)
    if workers > 1:  # they share the memory of the accelerators
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / workers:.3f}")
    jax.config.update("jax_compilation_cache_dir", str(compiled.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with suppress(EOFError):
        while True:
            task = pipe.recv()
            try:
                result = task()
            except Exception as error:
                result = TaskError(" ".join(f"{type(error).__name__}: {error}".split()))
            pipe.send(result)
