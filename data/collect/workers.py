"""Processes that record episodes, each with a simulation of its own."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ringrl.data.collect.recipe import Recipe
from ringrl.data.collect.recipes import recipe_of
from ringrl.data.collect.record import Plan, record_episode
from ringrl.data.exorl import save_episode
from ringrl.data.processes import worker_processes
from ringrl.envs import domain_of

RecordAll = Callable[[list[Plan]], Iterable[float]]
"""Records and saves an episode for each plan and gives their returns, in the order of the plans."""


class Recorder:
    """Records episodes of a task into a folder."""

    def __init__(self, task: str, folder: Path) -> None:
        from ringrl.envs import load_simulation

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
    with worker_processes(number, _start_worker, (task, folder), "collection") as pool:
        yield lambda plans: pool.map(_record, plans)


_recorder: Recorder  # of a worker process


def _start_worker(task: str, folder: Path) -> None:
    global _recorder
    _recorder = Recorder(task, folder)


def _record(plan: Plan) -> float:
    return _recorder(plan)
