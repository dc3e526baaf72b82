"""From an ExoRL archive to an episode store in one pass: read, validate, relabel for every task, write."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ringrl.data.exorl import Archive
from ringrl.data.relabel import relabel_all
from ringrl.data.schema import Episode, reward_key
from ringrl.data.store import EpisodeStore
from ringrl.data.writer import create_store
from ringrl.envs import Domain, domain_named, make

SAME_REWARD = 1e-5  # recorded in float32 by another MuJoCo: equal to about 3e-8 where the task is the same


def import_archive(
    source: str | Path,
    destination: str | Path,
    domain: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EpisodeStore:
    """Imports a zip archive or folder in ExoRL's layout into a new episode store and opens it.

    `progress` is called with (episodes done, episodes in all). Every episode is validated; the first that is not a
    whole episode of `domain` ends the import, and nothing is left at `destination` (a store that `overwrite` was to
    replace stays). Raises UserError for bad input, an existing destination, and a disk that is full.
    """
    source, destination, found = Path(source), Path(destination), domain_named(domain)
    with Archive(source, found) as archive:
        lengths = [member.length for member in archive.members]
        provenance = "/".join(source.resolve().parts[-2:])
        with create_store(
            destination, found.name, found.tasks, lengths, source=provenance, overwrite=overwrite
        ) as writer:
            match = _RecordedTask(found)
            for done, episode in enumerate(_relabelled(archive, found), start=1):
                writer.append(episode)
                match.update(episode)
                if progress is not None:
                    progress(done, len(lengths))
            writer.recorded_task = match.result()
    return EpisodeStore(destination)


def _relabelled(archive: Archive, domain: Domain) -> Iterator[Episode]:
    for episode in archive:
        rewards = relabel_all(domain.name, episode["physics"], episode["action"])
        yield episode | {reward_key(task): rewards[task] for task in domain.tasks}


class _RecordedTask:
    """Finds out, episode by episode, for which task the reward was recorded: for none in particular if for all."""

    def __init__(self, domain: Domain) -> None:
        self._candidates = [] if domain.records_all_tasks else list(domain.tasks)
        self._has_reward = False
        self._starts: list[np.ndarray] = []

    def update(self, episode: Episode) -> None:
        recorded = episode["reward"][:, 0]
        self._candidates = [
            task for task in self._candidates if np.abs(episode[reward_key(task)] - recorded).max() <= SAME_REWARD
        ]
        self._has_reward = self._has_reward or bool(recorded.any())
        self._starts.append(episode["physics"][0].copy())

    def result(self) -> str | None:
        """The one task that fits every episode; None if there is none or the data cannot tell."""
        if not self._candidates or not self._has_reward:
            return None
        if len(self._candidates) == 1:
            return self._candidates[0]
        return _nearest_start(self._candidates, np.stack(self._starts))


def _nearest_start(tasks: list[str], starts: np.ndarray) -> str | None:
    """Among tasks of equal reward, the one whose episodes begin where these (episodes, P) do.

    Cartpole's balance and swingup share their reward and differ only in the start. None if no start is clearly nearer.
    """
    distances: Mapping[str, float] = {task: _distance_to_start(task, starts) for task in tasks}
    nearest, second = sorted(tasks, key=distances.__getitem__)[:2]
    return nearest if distances[nearest] < 0.5 * distances[second] else None


def _distance_to_start(task: str, starts: np.ndarray) -> float:
    env = make(task, seed=0)
    own = np.stack([env.reset()[1]["physics"] for _ in range(8)])
    return float(np.linalg.norm(own.mean(axis=0) - starts.mean(axis=0)))
