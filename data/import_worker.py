"""What is done with each episode of an archive, in this process or in several."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ringrl.data.exorl import Archive, Member
from ringrl.data.journal import Imported
from ringrl.data.layout import Layout
from ringrl.data.part import cannot_write, part_of
from ringrl.data.processes import worker_processes
from ringrl.data.provenance import Relabelling
from ringrl.data.recorded_task import matching_tasks
from ringrl.data.relabel import relabel_all
from ringrl.data.schema import reward_key
from ringrl.data.writer import read_episode, record_of, write_episode
from ringrl.envs import domain_named
from ringrl.errors import UserError


@dataclass(frozen=True)
class ImportJob:
    """From which archive to which store, and how."""

    source: Path
    destination: Path
    layout: Layout
    relabelling: Relabelling


class EpisodeTask(NamedTuple):
    """One episode of the job: its number in the store, where it is in the archive, and the journal's word on it."""

    episode: int
    member: Member
    known: Imported | None


class Damaged(NamedTuple):
    """Why an episode cannot be imported, in one line."""

    reason: str


class EpisodeImporter:
    """Reads, validates, relabels and hashes episodes, and writes them to their place in the unfinished store."""

    def __init__(self, job: ImportJob) -> None:
        self._job = job
        self._archive = Archive(job.source, domain_named(job.layout.domain))
        self._descriptor = os.open(part_of(job.destination), os.O_RDWR | os.O_CLOEXEC)

    def __call__(self, task: EpisodeTask) -> Imported | Damaged:
        """Imports one episode, unless its rows are there already. UserError if it cannot be written."""
        layout = self._job.layout
        with cannot_write(self._job.destination):
            if task.known:
                rows = read_episode(self._descriptor, layout, task.episode)
                if rows is not None and record_of(layout, rows) == task.known.record:
                    return task.known
            try:
                episode = self._archive.read(task.member)
            except UserError as error:
                return Damaged(str(error))
            domain, physics, action = layout.domain, episode["physics"], episode["action"]
            rewards = relabel_all(domain, physics, action, self._job.relabelling)
            relabelled = {reward_key(task): reward for task, reward in rewards.items()}
            record = write_episode(self._descriptor, layout, task.episode, episode | relabelled)
            if self._job.relabelling != "control_aware":
                rewards = relabel_all(domain, physics, action)  # what was recorded knew the control
            matches = matching_tasks(rewards, episode["reward"])
            return Imported(record, matches, bool(episode["reward"].any()))

    def close(self) -> None:
        """Closes archive and store."""
        self._archive.close()
        os.close(self._descriptor)


@contextmanager
def episode_importers(
    job: ImportJob, tasks: Iterable[EpisodeTask], workers: int
) -> Iterator[Iterator[Imported | Damaged]]:
    """What becomes of each episode, in their order, computed by a number of processes: by this one alone if it is 1.

    Raises:
        UserError: a process died, or the store cannot be written.
    """
    if workers == 1:
        importer = EpisodeImporter(job)
        try:
            yield map(importer, tasks)
        finally:
            importer.close()
    else:
        with worker_processes(workers, _start_worker, (job,), "import") as pool:
            yield pool.map(_import_episode, tasks)


_importer: EpisodeImporter  # of a worker process


def _start_worker(job: ImportJob) -> None:
    global _importer
    _importer = EpisodeImporter(job)


def _import_episode(task: EpisodeTask) -> Imported | Damaged:
    return _importer(task)
