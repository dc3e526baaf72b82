"""Collection with a scripted controller: a cross-entropy search over its parameters, with every episode kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from ringrl.collect.controllers import ParameterVector, recipe_of
from ringrl.collect.record import record_episode
from ringrl.data import relabel
from ringrl.data.exorl import Archive, save_episode
from ringrl.envs import domain_of, load_simulation
from ringrl.pace import Progress
from ringrl.processes import worker_processes

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

_GENERATIONS = 40
_SMALLEST_GENERATION = 10
_MEMORY = 3  # generations per update: a single generation has too few episodes
_ELITE_SHARE = 0.15
_LEARNING_RATE = 0.6
_SMALLEST_SHARE = 0.1  # of the initial standard deviation, so that the search keeps exploring


class CrossEntropySearch:
    """A normal distribution over parameters that moves towards high returns, by smoothed updates (Rubinstein 1999)."""

    def __init__(self, mean: ParameterVector, deviation: ParameterVector) -> None:
        self.mean, self.deviation = mean, deviation
        self._smallest = _SMALLEST_SHARE * deviation
        self._memory: list[tuple[np.ndarray, np.ndarray]] = []  # parameters and returns of the last generations

    def propose(self, random: np.random.Generator, number: int) -> Float64[np.ndarray, "number parameters"]:
        """Return parameters to try next."""
        return self.mean + self.deviation * random.normal(size=(number, len(self.mean)))

    def learn(
        self, parameters: Float64[np.ndarray, "number parameters"], returns: Float64[np.ndarray, " number"]
    ) -> None:
        """Update the distribution after a generation. Equal returns change nothing but the memory."""
        self._memory = [*self._memory, (parameters, returns)][-_MEMORY:]
        tried, found = (np.concatenate(arrays) for arrays in zip(*self._memory, strict=True))
        if found.min() == found.max():
            return
        elite = tried[np.argsort(-found, kind="stable")[: max(2, round(_ELITE_SHARE * len(found)))]]
        self.mean = self.mean + _LEARNING_RATE * (elite.mean(0) - self.mean)
        deviation = self.deviation + _LEARNING_RATE * (elite.std(0) - self.deviation)
        self.deviation = np.maximum(deviation, self._smallest)


def search(task: str, folder: Path, *, episodes: int, seed: int, workers: int, progress: Progress) -> None:
    """Record all episodes of a search into `folder`/buffer, except those that it has. UserError if one is damaged."""
    recipe, finished = recipe_of(task), _finished_returns(task, folder)
    distribution = CrossEntropySearch(recipe.mean, recipe.deviation)
    generation_size = max(_SMALLEST_GENERATION, len(recipe.mean), episodes // _GENERATIONS)
    returns: list[float] = []
    record, workers = partial(_record, task, folder, seed), min(workers, episodes)
    with worker_processes(workers, _simulation, (task,), "collection") if workers > 1 else nullcontext() as pool:
        while len(returns) < episodes:
            first = len(returns)
            number = min(generation_size, episodes - first)
            parameters = distribution.propose(np.random.default_rng((seed, 1, first)), number)
            limits = np.interp(np.arange(first, first + number) / episodes, (0, 1), recipe.noise)
            new = [index for index in range(first, first + number) if index not in finished]
            arguments = new, [parameters[index - first] for index in new], [limits[index - first] for index in new]
            recorded = pool.map(record, *arguments) if pool else map(record, *arguments)
            for index in range(first, first + number):
                returns.append(finished[index] if index in finished else next(recorded))
                progress(len(returns), episodes)
            distribution.learn(parameters, np.array(returns[first:]))


def _finished_returns(task: str, folder: Path) -> dict[int, float]:
    """Return the returns, by number, of the episodes in the folder."""
    if not any(folder.glob("buffer/*.npz")):
        return {}
    with Archive(folder, domain_of(task)) as archive:
        return {member.number: _return(task, archive.read(member)) for member in archive.members}


def _record(task: str, folder: Path, seed: int, index: int, parameters: ParameterVector, noise_limit: float) -> float:
    """Record and save a scripted episode, and return its return."""
    simulation, recipe = _simulation(task), recipe_of(task)
    episode = record_episode(simulation, recipe, parameters, seed=seed, index=index, noise_limit=noise_limit)
    save_episode(folder / "buffer", index, episode)
    return _return(task, episode)


@lru_cache(maxsize=1)
def _simulation(task: str) -> Simulation:
    """Return the simulation that all episodes of this process share, since loading one is slow."""
    return load_simulation(task)


def _return(task: str, episode: Mapping[str, np.ndarray]) -> float:
    tasks = domain_of(task).recorded_tasks(task)
    if task in tasks:
        reward = episode["reward"][:, tasks.index(task)]
    else:
        reward = relabel(task, episode["physics"], episode["action"])
    return float(reward.sum(dtype="float64"))
