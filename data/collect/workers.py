"""Processes that record episodes, each with a simulation of its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from ringrl.data.collect.recipe import Recipe
from ringrl.data.collect.recipes import recipe_of
from ringrl.data.collect.record import Plan, record_episode
from ringrl.data.exorl import save_episode
from ringrl.envs import domain_of
from ringrl.errors import UserError

RecordAll = Callable[[list[Plan]], Iterable[float]]
"""Records and saves an episode for each plan and gives their returns, in the order of the plans."""


class Recorder:
    """Records episodes of a task into a folder."""

    def __init__(self, task: str, folder: Path) -> None:
        from ringrl.envs.simulation import load_simulation  # MuJoCo is imported here and not before

        self._simulation = load_simulation(task)
        self._column = domain_of(task).recorded_tasks(task).index(task)  # of the reward
        self._recipe: Recipe = recipe_of(task)
        self._folder = folder

    def __call__(self, plan: Plan) -> float:
        """Record and save one episode; returns its return."""
        episode = record_episode(self._simulation, self._recipe, plan)
        save_episode(self._folder, plan.index, episode)
        return float(episode["reward"][:, self._column].sum(dtype="float64"))


@contextmanager
def recorders(task: str, folder: Path, number: int) -> Iterator[RecordAll]:
    """A number of processes that record into a folder; with one, this process does it.

    Raises:
        UserError: a process died, for want of memory or because it could not start.
    """
    if number == 1:
        recorder = Recorder(task, folder)
        yield lambda plans: map(recorder, plans)
        return
    # Not forked: JAX's threads may hold locks at that moment.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(number, context, initializer=_start_worker, initargs=(task, folder))
    try:
        yield lambda plans: pool.map(_record, plans)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process of the collection died: collect with fewer workers if memory is short (--workers 1 needs "
            "no further process), and in a script of your own call collect() under `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_recorder: Recorder  # of a worker process


def _start_worker(task: str, folder: Path) -> None:
    global _recorder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _recorder = Recorder(task, folder)


def _end_with_parent() -> None:
    """Without this, a worker whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _record(plan: Plan) -> float:
    return _recorder(plan)
