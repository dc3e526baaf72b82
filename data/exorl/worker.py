"""The import of single episodes, in this process or in several, and the journal of the finished ones."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Float32

from ringrl.data.exorl.archive import Archive, Member
from ringrl.data.relabel import relabel_all
from ringrl.data.store.format import Layout, reward_key
from ringrl.data.store.provenance import Relabelling
from ringrl.data.store.writer import Record, UnfinishedStore, hidden_name, record_of
from ringrl.envs import domain_named
from ringrl.errors import UserError
from ringrl.files import explain_write_errors
from ringrl.processes import worker_processes

SAME_REWARD = 1e-5  # the same task recorded in float32 by another MuJoCo differs by about 3e-8


@dataclass(frozen=True)
class ImportJob:
    """The archive, the store and the settings of an import."""

    source: Path
    destination: Path
    domain: str
    lengths: np.ndarray  # steps of each episode
    relabelling: Relabelling


class Imported(NamedTuple):
    """An episode that has been written.

    Attributes:
        record: its digests and returns.
        matches: the tasks whose rewards equal the recorded ones.
        has_reward: whether any recorded reward is not zero.
    """

    record: Record
    matches: tuple[str, ...]
    has_reward: bool


class Damaged(NamedTuple):
    """The reason, in one line, why an episode cannot be imported."""

    reason: str


class EpisodeTask(NamedTuple):
    """One episode to import: its number in the store, its file in the archive, and its entry in the journal."""

    episode: int
    member: Member
    known: Imported | None


class EpisodeImporter:
    """Reads, validates, relabels and hashes episodes, and writes them to the unfinished store."""

    def __init__(self, job: ImportJob) -> None:
        self._job, domain = job, domain_named(job.domain)
        self._layout = Layout(domain, domain.tasks, job.lengths)
        self._archive = Archive(job.source, domain)
        self._store = UnfinishedStore(hidden_name(job.destination), self._layout)

    def __call__(self, task: EpisodeTask) -> Imported | Damaged:
        """Import one episode, unless the store already has its rows. UserError if it cannot be written."""
        with explain_write_errors(self._job.destination):
            if task.known and record_of(self._layout, self._store.read(task.episode)) == task.known.record:
                return task.known
            try:
                episode = self._archive.read(task.member)
            except UserError as error:
                return Damaged(str(error))
            physics, action = episode["physics"], episode["action"]
            rewards = relabel_all(self._job.domain, physics, action, self._job.relabelling)
            relabelled = {reward_key(name): reward for name, reward in rewards.items()}
            record = self._store.write(task.episode, episode | relabelled)
            if self._job.relabelling != "control_aware":
                rewards = relabel_all(self._job.domain, physics, action)  # recorded rewards depend on the control
            return Imported(record, _matching_tasks(rewards, episode["reward"]), bool(episode["reward"].any()))

    def close(self) -> None:
        """Close archive and store."""
        self._archive.close()
        self._store.close()


@contextmanager
def episode_importers(
    job: ImportJob, tasks: Iterable[EpisodeTask], workers: int
) -> Iterator[Iterator[Imported | Damaged]]:
    """Give the outcome of each episode, in order. With one worker, this process does all the work.

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


def _matching_tasks(
    rewards: Mapping[str, Float32[np.ndarray, " time"]], recorded: Float32[np.ndarray, "time columns"]
) -> tuple[str, ...]:
    """The tasks whose rewards for an episode equal the first recorded column."""
    return tuple(task for task, reward in rewards.items() if np.abs(reward - recorded[:, 0]).max() <= SAME_REWARD)


class ImportJournal:
    """The finished episodes of an import, so that an interrupted import can resume.

    One JSON object per line: first the head, then one line per episode. The rows of an episode in the journal may not
    have reached the disk: a resumed import compares them with the digests.

    Attributes:
        head: facts about the import.
        episodes: the finished episodes, by their numbers in the store.

    Raises OSError if the file cannot be written.
    """

    def __init__(self, path: Path, head: Mapping[str, str], episodes: dict[int, Imported]) -> None:
        self.head, self.episodes = head, episodes
        self._file = path.open("a", encoding="ascii")

    @classmethod
    def begin(cls, path: Path, head: Mapping[str, str]) -> Self:
        """Create a journal in place of any other."""
        path.write_text(f"{json.dumps(head)}\n", encoding="ascii")
        return cls(path, head, {})

    @classmethod
    def resume(cls, path: Path, identity: str) -> Self | None:
        """Open the journal at `path` if its head has this identity, None otherwise."""
        try:
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1  # the last line may be cut off
            first, *lines = content[:end].decode("ascii").splitlines()
            head = json.loads(first)
            if head["identity"] != identity:
                return None
            os.truncate(path, end)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return cls(path, head, dict(filter(None, map(_parse, lines))))

    def add(self, index: int, imported: Imported) -> None:
        """Append a finished episode."""
        self.episodes[index] = imported
        record = imported.record
        line = {
            "episode": index,
            "recorded": record.recorded.hex(),
            "relabelled": record.relabelled.hex(),
            "returns": record.returns,
            "matches": imported.matches,
            "has_reward": imported.has_reward,
        }
        self._file.write(f"{json.dumps(line)}\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _parse(line: str) -> tuple[int, Imported] | None:
    """An episode of the journal, None for a damaged line: that episode is imported again."""
    try:
        values = json.loads(line)
        record = Record(
            bytes.fromhex(values["recorded"]), bytes.fromhex(values["relabelled"]), tuple(map(float, values["returns"]))
        )
        return int(values["episode"]), Imported(record, tuple(values["matches"]), bool(values["has_reward"]))
    except (ValueError, KeyError, TypeError):
        return None
