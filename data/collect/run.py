"""The collection itself: generation after generation of a cross-entropy search, every episode of it kept."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ringrl.data.collect.folder import new_folder
from ringrl.data.collect.recipe import Recipe
from ringrl.data.collect.recipes import recipe_of
from ringrl.data.collect.record import Plan
from ringrl.data.collect.search import CrossEntropySearch
from ringrl.data.collect.workers import RecordAll, recorders
from ringrl.errors import UserError

_GENERATIONS = 40
_SMALLEST_GENERATION = 10

Progress = Callable[[int, int], None]
"""Called after every episode with the number of episodes recorded so far and the number wanted."""


def collect(
    task: str,
    destination: Path,
    *,
    episodes: int,
    seed: int,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Record a dataset for a task in the ExoRL format: `destination/buffer/episode_{number}_{steps}.npz`.

    The episodes, in the order of their numbers, are the history of a search for good parameters of the domain's
    scripted controller under the task's reward: returns run from poor to good, with plenty in between. The same task,
    episodes and seed give the same arrays on the same machine, whatever the number of workers. The folder appears when
    all is recorded, or not at all.

    Args:
        task: full task name, "walker_walk".
        destination: the folder to make; it may exist if it is empty.
        episodes: how many episodes, at least 1.
        seed: of the starts, the noise and the search, at least 0.
        workers: processes that record side by side; None takes one per available core. With more than one, a script
            must call this under `if __name__ == "__main__":`, because the processes import it.
        progress: see `Progress`.

    Returns:
        `destination`.

    Raises:
        UserError: unknown task, a number out of range, a destination that is taken or cannot be written, or a worker
            process that died.
    """
    recipe = recipe_of(task)
    for name, number, least in (("episodes", episodes, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if number is not None and number < least:
            raise UserError(f"{task}: {name} is {number}, at least {least} is needed")
    destination = Path(destination)
    with new_folder(destination) as folder:
        buffer = folder / "buffer"
        buffer.mkdir()
        with recorders(task, buffer, min(workers or _available_cores(), episodes)) as record_all:
            _search(recipe, record_all, episodes, seed, progress or (lambda done, total: None))
    return destination


def _search(recipe: Recipe, record_all: RecordAll, episodes: int, seed: int, progress: Progress) -> None:
    search = CrossEntropySearch.start(recipe.mean, recipe.deviation)
    generation_size = max(_SMALLEST_GENERATION, len(recipe.mean), episodes // _GENERATIONS)
    returns: list[float] = []
    while len(returns) < episodes:
        first = len(returns)
        number = min(generation_size, episodes - first)
        parameters = search.propose(np.random.default_rng((seed, 1, first)), number)
        limits = np.interp(np.arange(first, first + number) / episodes, (0, 1), recipe.noise)
        plans = [Plan(first + i, seed, parameters[i], float(limits[i])) for i in range(number)]
        for episode_return in record_all(plans):
            returns.append(episode_return)
            progress(len(returns), episodes)
        search = search.learn(parameters, np.array(returns[first:]))


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
