"""The runner of an ablation: trains and evaluates all cells of a plan, in processes of this machine."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path

import jax
from rich.console import Console

from ringrl import pace
from ringrl.data import EpisodeStore
from ringrl.data.sampling.held_out import held_out
from ringrl.data.sampling.sampler import episodes_for_contexts
from ringrl.envs import domain_of
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, lock
from ringrl.processes import available_cores, follow_parent
from ringrl.study.cells import EVALUATION, LOG, Cell, Reference, Work, attempt_logged, cells, references
from ringrl.study.cost import cost_table, estimates
from ringrl.study.plan import AblationPlan
from ringrl.study.progress import AblationProgress
from ringrl.training.loop import check_actions
from ringrl.training.run_folder import dataset_fingerprint

COMPILED = ".compiled"  # compiled programs, which all seeds share


def ablate(
    plan: AblationPlan,
    console: Console,
    command: str | None = None,
    workers: int = 1,
    share: tuple[int, int] = (0, 1),
    dry_run: bool = False,
) -> list[Path]:
    """Train and evaluate every cell that is not finished, `workers` at once, and return the results files.

    An interrupted cell resumes from its last checkpoint or after its last finished evaluation. A cell that fails stops
    no other. Random actions and the episodes of the dataset are recorded next to the cells.

    Args:
      share: (index, number) runs every `number`-th cell from the `index`-th, for several machines with one file system.
      dry_run: only print the remaining cost, within seconds, and write nothing.

    Raise UserError for settings that no run accepts, data that does not fit a task, a folder of another plan, or (after
    all other cells) cells that failed.
    """
    everything, reference_work = _check(plan, workers)
    output, (index, number) = plan.output, share
    everything = everything[index::number]
    work: list[Work] = [*(reference_work if index == 0 else ()), *everything]
    lock_file = output / (".lock" if number == 1 else f".lock-{index}-of-{number}")
    held = nullcontext() if dry_run else lock(output, "is running this ablation", file=lock_file)
    with explain_write_errors(output), held:
        for one in work:
            one.check()
        costs = estimates(everything, workers)
        if waiting := [cell for cell in everything if cell.name in costs]:
            console.print(cost_table(waiting, costs, len(everything) - len(costs), workers))
        elif dry_run:
            console.print(f"all {len(everything)} cells are finished")
        if dry_run:
            return []
        todo = [one for one in work if not one.is_finished]
        expected = {one.name: costs[one.name].seconds if one.name in costs else 0.0 for one in todo}
        failed = dict[Work, str]()
        with AblationProgress(expected, workers, console) as progress:
            for one, why in _run_all(todo, command, workers, output / COMPILED, progress):
                progress.end(one.name, why)
                if why is not None:
                    failed[one] = why
    for one, why in failed.items():
        console.print(f"{one.name} failed: {why} ({one.folder / LOG})", soft_wrap=True, markup=False, highlight=False)
    if failed:
        raise UserError(f"{len(failed)} of {len(work)} failed; the same command runs them again, others are finished")
    return [one.folder / EVALUATION for one in work]


def _check(plan: AblationPlan, workers: int) -> tuple[list[Cell], list[Reference]]:
    """Return the plan's cells and references. Write nothing. Raise UserError if one of them cannot be run."""
    if workers < 1:
        raise UserError(f"--workers: {workers} is too small; give at least 1")
    cells(plan)  # settings are checked before the datasets, which may be missing
    stores, fingerprints = {}, {}
    for task, data in plan.datasets.items():
        store = stores[task] = EpisodeStore(data)
        if store.domain != domain_of(task).name:
            raise UserError(f"{data}: contains episodes of {store.domain}, which do not fit the task {task}")
        store.returns(task)
        fingerprints[task] = dataset_fingerprint(store)
    everything = cells(plan, fingerprints)
    for cell in everything:
        config, store = cell.config, stores[cell.config.task]
        try:
            check_actions(config, store.facts)
            excluded = held_out(store, config)
            episodes_for_contexts(store, config.task, config.context, config.seed, excluded=excluded)
        except UserError as error:
            raise UserError(f"{cell.name}: {error}") from error
    return everything, references(plan, fingerprints)


def _run_all(
    todo: Sequence[Work], command: str | None, workers: int, compiled: Path, progress: AblationProgress
) -> Iterator[tuple[Work, str | None]]:
    """Run cells in order in worker processes. Yield each when it ends, and why it failed if it did.

    A process that dies fails its own cell only. All processes end with the main process, divide the cores among them,
    and share the folder of compiled programs.
    """
    workers, waiting = min(workers, len(todo)), list(todo)
    others = multiprocessing.active_children()  # of the caller
    spawn = multiprocessing.get_context("spawn")  # not forked: JAX's threads may hold locks at that moment

    def process(number: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, spawn, initializer=_prepare, initargs=(number, workers, compiled))

    pools = {number: process(number) for number in range(workers)}  # of one process each
    running = dict[Future[str | None], tuple[int, Work]]()
    try:
        while waiting or running:
            for number in sorted(pools.keys() - {number for number, _ in running.values()})[: len(waiting)]:
                one = waiting.pop(0)
                progress.begin(one.name)
                running[pools[number].submit(attempt_logged, one, command)] = number, one
            done = wait(running, pace.SECONDS, FIRST_COMPLETED).done
            if not done:
                progress.still_running()
            for future in done:
                number, one = running.pop(future)
                try:
                    why = future.result()
                except BrokenProcessPool:
                    pools[number], why = process(number), "its process died (often because memory is short)"
                yield one, why
    finally:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


def _prepare(number: int, workers: int, compiled: Path) -> None:
    """Prepare a worker process, the `number`-th of several."""
    follow_parent()
    if hasattr(os, "sched_getaffinity") and 1 < workers <= available_cores():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[number::workers])
    if workers > 1:  # they share the memory of the accelerators
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / workers:.3f}")
    jax.config.update("jax_compilation_cache_dir", str(compiled.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
