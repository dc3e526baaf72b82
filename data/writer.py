"""Writing an episode store: plain writes fill the file, and only a whole file is described and gets the real name.

The lengths of all episodes are known before the first is written, so every array has its place from the start and
nothing but one episode is ever in memory. The file grows under a hidden name in the same folder and is no HDF5 file
until its last bytes are written, which are its first.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from ringrl.data import part
from ringrl.data.digest import content_fingerprint, episode_digest
from ringrl.data.foreign import ForeignDomain
from ringrl.data.layout import RETURN_LEVELS, Layout
from ringrl.data.mapped import LONGEST_TEXT
from ringrl.data.provenance import Provenance
from ringrl.data.schema import Episode, reward_key, reward_task
from ringrl.data.store import FORMAT, FORMAT_VERSION
from ringrl.envs import Domain
from ringrl.errors import UserError


class Record(NamedTuple):
    """What is kept of an episode beside its rows: two digests, and its return for every task of the store."""

    recorded: bytes
    relabelled: bytes
    returns: tuple[float, ...]


@contextlib.contextmanager
def create_store(
    path: Path,
    domain: str | Domain,
    tasks: Sequence[str],
    lengths: Sequence[int] | np.ndarray,
    *,
    source: str | Provenance,
    overwrite: bool = False,
) -> Iterator["StoreWriter"]:
    """Opens a new store for episodes of the given lengths (steps); it appears at `path` when the block ends well.

    `domain` is one of ExoRL's, by name, or any other; `source` says where the episodes came from, in a word or in full.
    `append` every episode in order, and set `recorded_task` before the end if it is known. Raises UserError if the
    path exists (unless `overwrite`), if another process is writing it, and if the disk or a quota is full.
    """
    path, layout = Path(path), Layout(domain, tasks, lengths)
    part.refuse_taken(path, overwrite=overwrite)
    with part.cannot_write(path):
        descriptor = part.claim_new(path, part.claim(path))
    try:
        with part.cannot_write(path, layout.size):
            part.reserve(descriptor, layout.size)
        writer = StoreWriter(path, descriptor, layout)
        yield writer
        provenance = Provenance(source) if isinstance(source, str) else source
        finish_store(path, descriptor, layout, writer.records, writer.recorded_task, provenance)
    except BaseException:
        part.discard(path)
        raise
    finally:
        os.close(descriptor)


class StoreWriter:
    """Fills the store that `create_store` laid out, one episode after the other."""

    recorded_task: str | None = None

    def __init__(self, path: Path, descriptor: int, layout: Layout) -> None:
        self.records: list[Record] = []
        self._path, self._descriptor, self._layout = path, descriptor, layout

    def append(self, episode: Episode) -> None:
        """Writes the next episode: the arrays that `EpisodeStore.episode` gives back, with the announced length."""
        with part.cannot_write(self._path):
            self.records.append(write_episode(self._descriptor, self._layout, len(self.records), episode))

    def fingerprint(self) -> str:
        """That of the store, once all episodes are written."""
        recorded = _digests([record.recorded for record in self.records])
        return content_fingerprint(self._layout.domain, self._layout.lengths, recorded)


def write_episode(descriptor: int, layout: Layout, index: int, episode: Episode) -> Record:
    """Writes the rows of an episode to their place. Raises OSError, and ValueError for rows of another shape."""
    rows = int(layout.lengths[index]) + 1
    for key, column in layout.columns.items():
        array, shape = np.ascontiguousarray(episode[key]), layout.shape(key, rows)
        if array.shape != shape or array.dtype != column.dtype:
            raise ValueError(f"{key} is {array.dtype} {array.shape}, the store expects {column.dtype} {shape}")
        part.write_all(descriptor, array.data, layout.place(key, index))
    return record_of(layout, episode)


def record_of(layout: Layout, episode: Episode) -> Record:
    """The record of an episode with the arrays of this layout."""
    return Record(
        recorded=episode_digest(episode, [key for key in layout.columns if not reward_task(key)]),
        relabelled=episode_digest(episode, map(reward_key, layout.tasks)),
        returns=tuple(float(episode[reward_key(task)].sum(dtype=np.float64)) for task in layout.tasks),
    )


def read_episode(descriptor: int, layout: Layout, index: int) -> dict[str, np.ndarray] | None:
    """The rows of an episode in an unfinished store, whatever they hold; None if the file ends before."""
    episode, rows = {}, int(layout.lengths[index]) + 1
    for key, column in layout.columns.items():
        size = rows * layout.row_bytes(key)
        content = os.pread(descriptor, size, layout.place(key, index))
        if len(content) != size:
            return None
        episode[key] = np.frombuffer(content, column.dtype).reshape(layout.shape(key, rows))
    return episode


def read_starts(descriptor: int, layout: Layout) -> Float64[np.ndarray, "episodes physics"]:
    """The first physics state of every episode in an unfinished store. Raises OSError."""
    places = [layout.place("physics", index) for index in range(len(layout.lengths))]
    content = b"".join(os.pread(descriptor, layout.row_bytes("physics"), place) for place in places)
    return np.frombuffer(content, np.float64).reshape(len(places), -1)


def move_episodes(descriptor: int, old: Layout, new: Layout, kept: Sequence[int]) -> None:
    """Brings some episodes of an unfinished store to their places in a layout for them alone. Raises OSError.

    With fewer episodes every place is further to the front, so that front to back nothing is overwritten before it has
    been moved. If this is cut off, episodes no longer have their digests and are imported again.
    """
    for key in sorted(old.columns, key=lambda key: old.place(key, 0)):
        for target, index in enumerate(kept):
            source, place = old.place(key, index), new.place(key, target)
            size = (int(old.lengths[index]) + 1) * old.row_bytes(key)
            if place > source:
                raise RuntimeError(f"{key} of episode {index} would move back")
            if place < source:
                part.write_all(descriptor, memoryview(os.pread(descriptor, size, source)), place)


def finish_store(
    path: Path,
    descriptor: int,
    layout: Layout,
    records: Sequence[Record],
    recorded_task: str | None,
    provenance: Provenance,
) -> None:
    """Describes the rows in the part of the store at `path`, and gives it its name. UserError if that cannot be."""
    if len(records) != len(layout.lengths):
        raise ValueError(f"{len(records)} of {len(layout.lengths)} announced episodes were written")
    recorded = _digests([record.recorded for record in records])
    arrays = {
        "episodes/offset": layout.starts,
        "episodes/recorded_sha256": recorded,
        "episodes/relabelled_sha256": _digests([record.relabelled for record in records]),
    }
    for column, task in enumerate(layout.tasks):
        returns = np.array([record.returns[column] for record in records], np.float32)
        arrays[f"returns/{task}"] = returns
        arrays[f"return_quantiles/{task}"] = np.quantile(returns.astype(np.float64), RETURN_LEVELS)
    attributes: dict[str, str | int] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_by": provenance.created_by,
        "domain": layout.domain,
        "tasks": json.dumps(layout.tasks),
        "recorded_task": recorded_task or "none",
        "provenance": provenance.to_json(),
        "fingerprint": content_fingerprint(layout.domain, layout.lengths, recorded),
    }
    if isinstance(layout.facts, ForeignDomain):
        attributes["facts"] = layout.facts.to_json()
    if too_long := [name for name, text in attributes.items() if len(str(text)) > LONGEST_TEXT]:
        raise UserError(
            f"{path}: its {too_long[0]} is longer than {LONGEST_TEXT:,} characters, which no store may have: was it "
            "merged of too many others? Merge the archives' own stores at once"
        )
    (head, *pieces), size = layout.describe(arrays, attributes)
    with part.cannot_write(path):
        os.ftruncate(descriptor, size)
        for place, content in pieces:
            part.write_all(descriptor, memoryview(content), place)
        os.fsync(descriptor)
        part.write_all(descriptor, memoryview(head[1]), head[0])
        os.fsync(descriptor)
        part.part_of(path).replace(path)
    part.journal_of(path).unlink(missing_ok=True)
    part.sync_folder(path.parent)


def _digests(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
