"""The collection itself: by which method, how much, and where it goes on after an interruption."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from ringrl import __version__
from ringrl.cores import available_cores
from ringrl.data.collect.folder import new_folder
from ringrl.data.collect.recipe import Recipe
from ringrl.data.collect.recipes import recipe_of
from ringrl.data.collect.record import Plan
from ringrl.data.collect.search import CrossEntropySearch
from ringrl.data.collect.workers import RecordAll, recorders
from ringrl.data.exorl import Archive
from ringrl.envs import domain_of
from ringrl.errors import UserError

Method = Literal["scripted", "td3", "rnd"]
"""Who acts: a scripted controller whose parameters are searched, a TD3 learner, or one that is rewarded for novelty."""

Preset = Literal["tiny", "small", "exorl_like"]

PRESETS: Mapping[Preset, int] = MappingProxyType({"tiny": 10_000, "small": 200_000, "exorl_like": 10_000_000})
"""How many transitions to collect. ExoRL's archives hold ten million each."""

Progress = Callable[[int, int], None]
"""Called after every episode with the number of episodes recorded so far and the number wanted."""

_GENERATIONS = 40
_SMALLEST_GENERATION = 10


def preset_episodes(preset: str, task: str) -> int:
    """How many of a task's episodes make up a preset's transitions.

    Raises:
        UserError: unknown preset or task.
    """
    for name, transitions in PRESETS.items():
        if name == preset:
            return transitions // domain_of(task).episode_length
    raise UserError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")


def collect(
    task: str,
    destination: Path,
    *,
    episodes: int,
    seed: int,
    method: str = "scripted",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Record a dataset for a task in the ExoRL format: `destination/buffer/episode_{number}_{steps}.npz`.

    The episodes, in the order of their numbers, are the history of a learner. "scripted" searches for good parameters
    of the domain's scripted controller under the task's reward: returns run from poor to good, with plenty in between.
    "td3" learns a policy from nothing. "rnd" learns one that looks for states it has not seen; the recorded reward is
    still the task's. The same arguments give the same arrays on the same machine, whatever the number of workers.

    The folder appears when all is recorded. Until then the finished episodes are in the hidden folder
    `.{name}.partial` beside it, where the same call goes on after an interruption, to the same arrays.

    Args:
        task: full task name, "walker_walk".
        destination: the folder to make; it may exist if it is empty.
        episodes: how many episodes, at least 1.
        seed: of the starts, the noise, the search and the learner, at least 0.
        method: "scripted", "td3" or "rnd".
        workers: processes that record scripted episodes side by side; None takes one per available core. With more
            than one, a script must call this under `if __name__ == "__main__":`, because the processes import it.
        progress: see `Progress`.

    Returns:
        `destination`.

    Raises:
        UserError: unknown task or method, a number out of range, a destination that is taken or cannot be written, or
            a worker process that died.
    """
    domain_of(task)
    if method not in get_args(Method):
        raise UserError(f"no method {method!r}; there are {', '.join(get_args(Method))}")
    for name, number, least in (("episodes", episodes, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if number is not None and number < least:
            raise UserError(f"{task}: {name} is {number}, at least {least} is needed")
    if method != "scripted" and workers not in (None, 1):
        raise UserError(f"{task}: workers is {workers}, but method {method} learns in one process: leave workers out")
    destination = Path(destination)
    progress = progress or (lambda done, total: None)
    description: dict[str, str | int] = {
        "task": task,
        "method": method,
        "episodes": episodes,
        "seed": seed,
        "ringrl": __version__,
    }
    with new_folder(destination, description) as folder:
        (folder / "buffer").mkdir(exist_ok=True)
        if method == "scripted":
            finished = _finished_returns(task, folder)
            with recorders(task, folder / "buffer", min(workers or available_cores(), episodes)) as record_all:
                _search(recipe_of(task), record_all, finished, episodes, seed, progress)
        else:
            from ringrl.data.collect.learner import learn  # JAX is imported here and not before

            learn(task, folder, episodes=episodes, seed=seed, is_reward_free=method == "rnd", progress=progress)
    return destination


def _search(
    recipe: Recipe,
    record_all: RecordAll,
    finished: Mapping[int, float],
    episodes: int,
    seed: int,
    progress: Progress,
) -> None:
    """Generation after generation of a cross-entropy search, every episode of it kept.

    An episode follows from the returns of those before it, so one that is finished already need not be run again.
    """
    search = CrossEntropySearch.start(recipe.mean, recipe.deviation)
    generation_size = max(_SMALLEST_GENERATION, len(recipe.mean), episodes // _GENERATIONS)
    returns: list[float] = []
    while len(returns) < episodes:
        first = len(returns)
        number = min(generation_size, episodes - first)
        parameters = search.propose(np.random.default_rng((seed, 1, first)), number)
        limits = np.interp(np.arange(first, first + number) / episodes, (0, 1), recipe.noise)
        plans = [Plan(first + i, seed, parameters[i], float(limits[i])) for i in range(number)]
        recorded = iter(record_all([plan for plan in plans if plan.index not in finished]))
        for plan in plans:
            returns.append(finished[plan.index] if plan.index in finished else next(recorded))
            progress(len(returns), episodes)
        search = search.learn(parameters, np.array(returns[first:]))


def _finished_returns(task: str, folder: Path) -> dict[int, float]:
    """The returns, by number, of the episodes that an interrupted collection left."""
    if not any(folder.glob("buffer/*.npz")):
        return {}
    domain = domain_of(task)
    column = domain.recorded_tasks(task).index(task)
    with Archive(folder, domain) as archive:
        rewards = {member.number: archive.read(member)["reward"][:, column] for member in archive.members}
    return {number: float(reward.sum(dtype="float64")) for number, reward in rewards.items()}
