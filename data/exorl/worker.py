"""Import of single episodes, in this process or in several."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ringrl.data.exorl.archive import Archive, Member
from ringrl.data.relabel import relabel_all
from ringrl.data.store.format import Episode, Layout, Provenance, Relabelling, reward_key
from ringrl.data.store.writer import Record, UnfinishedStore, hidden_name
from ringrl.errors import UnreadableError, UserError
from ringrl.files import explain_write_errors
from ringrl.processes import worker_processes

SAME_REWARD = 1e-5  # the same task recorded in float32 by another MuJoCo differs by about 3e-8


class Imported(NamedTuple):
    """An episode that has been written."""

    record: Record
    matches: tuple[str, ...]  # tasks whose rewards equal the recorded rewards
    has_reward: bool  # whether any recorded reward is not zero


@dataclass(frozen=True)
class ImportPlan:
    """Everything that determines the content of the store."""

    source: Path
    destination: Path
    members: tuple[Member, ...]
    layout: Layout
    provenance: Provenance
    relabelling: Relabelling
    changed: int  # time of the last change of an episode of a folder, in ns
    identity: str  # an import with the same identity resumes an interrupted import


class EpisodeImporter:
    """Reads, validates, relabels and hashes episodes, and writes them to the unfinished store."""

    def __init__(self, plan: ImportPlan) -> None:
        self._plan = plan
        self._archive = Archive(plan.source, plan.layout.domain)
        self._store = UnfinishedStore(hidden_name(plan.destination), plan.layout, plan.identity)

    def __call__(self, index: int) -> Imported | str:
        """Import one episode, unless an interrupted import has written it.

        Returns a line with the reason if the episode is damaged. Raises UserError if it cannot be written.
        """
        with explain_write_errors(self._plan.destination):
            record = self._store.finished(index)
            if record:
                episode: Episode = self._store.read(index)
            else:
                try:
                    recorded = self._archive.read(self._plan.members[index])
                except UnreadableError:
                    raise
                except UserError as error:
                    return str(error)
                rewards = self._rewards(recorded, self._plan.relabelling)
                episode = recorded | {reward_key(task): reward for task, reward in rewards.items()}
                record = self._store.write(index, episode)
            return Imported(record, self._matches(episode), bool(episode["reward"].any()))

    def _rewards(self, episode: Episode, relabelling: Relabelling) -> dict[str, np.ndarray]:
        layout = self._plan.layout
        return relabel_all(layout.domain.name, episode["physics"], episode["action"], relabelling, layout.tasks)

    def _matches(self, episode: Episode) -> tuple[str, ...]:
        rewards = {task: episode[reward_key(task)] for task in self._plan.layout.tasks}
        if self._plan.relabelling != "control_aware":  # recorded rewards depend on the control
            rewards = self._rewards(episode, "control_aware")
        recorded = episode["reward"]
        return tuple(task for task, reward in rewards.items() if np.abs(reward - recorded[:, 0]).max() <= SAME_REWARD)

    def close(self) -> None:
        self._archive.close()
        self._store.close()


@contextmanager
def episode_importers(plan: ImportPlan, workers: int) -> Iterator[Iterator[Imported | str]]:
    """Yield an iterator over the results of `EpisodeImporter`, in order. With one worker, no process is started.

    Raises UserError if a process died, or the store cannot be written.
    """
    indices = range(len(plan.members))
    if workers == 1:
        with closing(EpisodeImporter(plan)) as importer:
            yield map(importer, indices)
    else:
        with worker_processes(workers, _start_worker, (plan,), "import") as pool:
            yield pool.map(_import_episode, indices)


_importer: EpisodeImporter  # of a worker process


def _start_worker(plan: ImportPlan) -> None:
    global _importer
    _importer = EpisodeImporter(plan)


def _import_episode(index: int) -> Imported | str:
    return _importer(index)
