"""Import of single episodes, in this process or in several, and the journal of finished episodes."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from ringrl.data.exorl.archive import Archive, Member
from ringrl.data.relabel import relabel_all
from ringrl.data.store.format import Layout, Provenance, Relabelling, reward_key
from ringrl.data.store.writer import Record, UnfinishedStore, hidden_name, record_of
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
    misfits: tuple[str, ...]  # one line per episode that is left out because its length is not the domain's
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
        self._store = UnfinishedStore(hidden_name(plan.destination), plan.layout)

    def __call__(self, index: int, known: Imported | None) -> Imported | str:
        """Import one episode, unless the journal has it (`known`) and the store has its rows.

        Returns a line with the reason if the episode is damaged. Raises UserError if it cannot be written.
        """
        plan = self._plan
        with explain_write_errors(plan.destination):
            if known and record_of(plan.layout, self._store.read(index)) == known.record:
                return known
            try:
                episode = self._archive.read(plan.members[index])
            except UnreadableError:
                raise
            except UserError as error:
                return str(error)
            domain, physics, action = plan.layout.domain.name, episode["physics"], episode["action"]
            rewards = relabel_all(domain, physics, action, plan.relabelling, plan.layout.tasks)
            relabelled = {reward_key(name): reward for name, reward in rewards.items()}
            record = self._store.write(index, episode | relabelled)
            if plan.relabelling != "control_aware":
                # Recorded rewards depend on the control.
                rewards = relabel_all(domain, physics, action, tasks=plan.layout.tasks)
            recorded = episode["reward"]
            matches = [name for name, reward in rewards.items() if np.abs(reward - recorded[:, 0]).max() <= SAME_REWARD]
            return Imported(record, tuple(matches), bool(recorded.any()))

    def close(self) -> None:
        self._archive.close()
        self._store.close()


@contextmanager
def episode_importers(
    plan: ImportPlan, known: Sequence[Imported | None], workers: int
) -> Iterator[Iterator[Imported | str]]:
    """Yield an iterator over the results of `EpisodeImporter`, in order. With one worker, no process is started.

    `known` are the entries of the journal. Raises UserError if a process died, or the store cannot be written.
    """
    if workers == 1:
        with closing(EpisodeImporter(plan)) as importer:
            yield map(importer, range(len(known)), known)
    else:
        with worker_processes(workers, _start_worker, (plan,), "import") as pool:
            yield pool.map(_import_episode, range(len(known)), known)


_importer: EpisodeImporter  # of a worker process


def _start_worker(plan: ImportPlan) -> None:
    global _importer
    _importer = EpisodeImporter(plan)


def _import_episode(index: int, known: Imported | None) -> Imported | str:
    return _importer(index, known)


class ImportJournal:
    """The finished episodes of an import, so that an interrupted import can resume. Raises OSError.

    Each line of the file is a JSON list: first the identity and the day of the import, then one list per episode. The
    rows of a journalled episode may be missing on the disk, so a resumed import compares them with the digests.
    """

    created: str  # day on which the import began
    episodes: dict[int, Imported]  # by their numbers in the store

    def __init__(self, path: Path, created: str, episodes: dict[int, Imported]) -> None:
        self.created, self.episodes = created, episodes
        self._file = path.open("a", encoding="ascii")

    @classmethod
    def begin(cls, path: Path, identity: str, created: str) -> Self:
        """Create a journal in place of any other."""
        path.write_text(f"{json.dumps([identity, created])}\n", encoding="ascii")
        return cls(path, created, {})

    @classmethod
    def resume(cls, path: Path, identity: str) -> Self | None:
        """Open the journal at `path` if it has this identity, None otherwise."""
        try:
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1  # the last line may be cut off
            head, *lines = content[:end].decode("ascii").splitlines()
            found, created = json.loads(head)
            if found != identity or not isinstance(created, str):
                return None
            os.truncate(path, end)
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return cls(path, created, dict(filter(None, map(_parse, lines))))

    def add(self, index: int, imported: Imported) -> None:
        self.episodes[index] = imported
        (recorded, relabelled, returns), matches, has_reward = imported
        line = [index, recorded.hex(), relabelled.hex(), returns, matches, has_reward]
        self._file.write(f"{json.dumps(line)}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _parse(line: str) -> tuple[int, Imported] | None:
    """Return an episode of the journal. None: the line is damaged, and the episode is imported again."""
    try:
        index, recorded, relabelled, returns, matches, has_reward = json.loads(line)
        record = Record(bytes.fromhex(recorded), bytes.fromhex(relabelled), tuple(map(float, returns)))
        return int(index), Imported(record, tuple(matches), bool(has_reward))
    except (ValueError, TypeError):
        return None
