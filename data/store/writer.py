"""Writers of an episode store.

h5py creates the file with all datasets and closes it. The lengths of all episodes are known, and so is the offset of
every row. The file has a hidden name until it is whole. Rows are written with `os.pwrite`: a full disk then raises an
error, whereas a write through a memory map would end with SIGBUS, and a kill leaves a file that h5py can open.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import h5py
import numpy as np

from ringrl.data.store.format import (
    DIGEST_BYTES,
    FORMAT,
    FORMAT_VERSION,
    LONGEST_TEXT,
    Episode,
    Layout,
    Provenance,
    StoredDomain,
    content_fingerprint,
    dataset_name,
    episode_digest,
    reward_key,
    reward_task,
)
from ringrl.data.store.reader import EpisodeStore
from ringrl.envs import Domain, domain_named
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, linked, lock, remove, reserve, sync

ATTRIBUTES = 2**19  # bytes that the attributes need at most
DIGESTS = ("episodes/recorded_sha256", "episodes/relabelled_sha256")


class Record(NamedTuple):
    """The digests of an episode, and its return for every task of the store."""

    recorded: bytes
    relabelled: bytes
    returns: tuple[float, ...]


def hidden_name(path: Path) -> Path:
    """Return the hidden path of the unfinished store at `path`."""
    return path.with_name(f".{path.name}.partial")


def refuse_taken(path: Path, *, overwrite: bool) -> None:
    """Raise UserError if no store may be written at `path`."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, name the store's file")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists, choose another name or overwrite it (--overwrite)")


def finished_store(path: Path, provenance: Provenance) -> EpisodeStore | None:
    """Return the store at `path` if it has this origin, on any day, None otherwise.

    The unfinished file of a killed import next to the store is deleted.
    """
    try:
        store = EpisodeStore(path)
    except UserError:
        return None
    if store.provenance != dataclasses.replace(provenance, created=store.provenance.created):
        return None
    with contextlib.suppress(OSError, UserError), lock(path, "is writing it"):
        remove(hidden_name(path))
    return store


@contextlib.contextmanager
def create_store(
    path: Path,
    domain: str | Domain,
    tasks: Sequence[str],
    lengths: Sequence[int] | np.ndarray,
    *,
    source: str | Provenance,
    overwrite: bool = False,
) -> Iterator["UnfinishedStore"]:
    """Create a store for episodes of the given lengths (steps). The file appears at `path` when the block succeeds.

    In the block, `append` every episode in order, and set `recorded_task` if it is known.

    Args:
        path: the store's file. A link stays, and the file that it leads to is written.
        domain: the name of an ExoRL domain, or the facts about another domain.
        tasks: the tasks whose rewards every episode has.
        lengths: steps of each episode.
        source: the origin of the episodes, as a name or in full.
        overwrite: replace an existing store.

    Raises:
        UserError: the path exists, another process writes it, or the disk or a quota is full.
    """
    path = linked(Path(path))
    layout = Layout(domain_named(domain) if isinstance(domain, str) else domain, tasks, lengths)
    refuse_taken(path, overwrite=overwrite)
    partial = hidden_name(path)
    with explain_write_errors(path), lock(path, "is writing it"):
        try:
            create_file(partial, layout)
            reserve_space(partial, path)
            with UnfinishedStore(partial, layout) as writer:
                yield writer
            provenance = Provenance(source) if isinstance(source, str) else source
            finish(partial, path, layout, writer.records, writer.recorded_task, provenance)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def create_file(partial: Path, layout: Layout, identity: str = "") -> None:
    """Create the HDF5 file of a store with space for all arrays, and replace any older file. Raises OSError.

    An `UnfinishedStore` must have the same `identity`, which determines the content.
    """
    partial.unlink(missing_ok=True)  # not emptied: workers of a killed import may still write to the old file
    # This version of HDF5's format has checksums of its metadata, which reveal damage.
    with h5py.File(partial, "x", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=64) as file:
        rows = int(layout.starts[-1])
        arrays = {dataset_name(key): (layout.shape(key, rows), spec.dtype) for key, spec in layout.arrays.items()}
        for name, (shape, dtype) in (layout.per_episode() | arrays).items():
            # Contiguous, with an offset in the file from the start, and not filled with zeros.
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            file.create_dataset(name, shape=shape, dtype=dtype, dcpl=settings)
        file.attrs["identity"] = np.bytes_(identity)


def reserve_space(partial: Path, path: Path) -> None:
    """Reserve the disk space of the finished store at `path`. UserError if the disk is full."""
    size = partial.stat().st_size + ATTRIBUTES
    with explain_write_errors(path, size):
        reserve(partial, size)


class UnfinishedStore:
    """The rows of a file made by `create_file`. Use it as a context manager.

    Raises OSError or KeyError if the file is not an unfinished store of this layout.
    """

    recorded_task: str | None = None

    def __init__(self, partial: Path, layout: Layout, identity: str = "") -> None:
        self.layout = layout
        self.records: list[Record] = []  # of the appended episodes
        with h5py.File(partial, "r", locking=False) as file:
            if file.attrs["identity"].decode() != identity:
                raise OSError(f"{partial} has other episodes")
            self._offsets = {key: file[dataset_name(key)].id.get_offset() for key in layout.arrays}
            self._digests = [file[name].id.get_offset() for name in DIGESTS]
        self._descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)

    def append(self, episode: Episode) -> None:
        """Write the next episode, with the arrays of `EpisodeStore.episode` and the announced length."""
        self.records.append(self.write(len(self.records), episode))

    def write(self, index: int, episode: Episode) -> Record:
        """Write the rows of an episode. Raises OSError, and ValueError for rows of another shape or dtype."""
        rows = int(self.layout.lengths[index]) + 1
        for key, spec in self.layout.arrays.items():
            array, shape = np.ascontiguousarray(episode[key]), self.layout.shape(key, rows)
            if array.shape != shape or array.dtype != spec.dtype:
                raise ValueError(f"{key} is {array.dtype} {array.shape}, the store expects {spec.dtype} {shape}")
            view, offset = array.data.cast("B"), self._offset(key, index)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        record = record_of(self.layout, episode)
        for digest, start in zip(record[:2], self._digests, strict=True):
            os.pwrite(self._descriptor, digest, start + index * DIGEST_BYTES)
        return record

    def finished(self, index: int) -> Record | None:
        """Return the record of an episode whose rows have the digests in the file, None for any other."""
        digests = [os.pread(self._descriptor, DIGEST_BYTES, start + index * DIGEST_BYTES) for start in self._digests]
        if not any(digests[0]):  # not written
            return None
        record = record_of(self.layout, self.read(index))
        return record if [*record[:2]] == digests else None

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Return the rows of an episode. Rows that were not written are zeros or rows of an older file."""
        rows = int(self.layout.lengths[index]) + 1
        episode = {}
        for key, spec in self.layout.arrays.items():
            content = os.pread(self._descriptor, rows * self.layout.row_bytes(key), self._offset(key, index))
            episode[key] = np.frombuffer(content, spec.dtype).reshape(self.layout.shape(key, rows))
        return episode

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _offset(self, key: str, episode: int) -> int:
        """Return the offset in the file of the first row of an episode, in bytes."""
        return int(self._offsets[key]) + int(self.layout.starts[episode]) * self.layout.row_bytes(key)


def record_of(layout: Layout, episode: Episode) -> Record:
    """Return the digests and returns of an episode with the arrays of a layout."""
    return Record(
        recorded=episode_digest(episode, [key for key in layout.arrays if not reward_task(key)]),
        relabelled=episode_digest(episode, map(reward_key, layout.tasks)),
        returns=tuple(float(episode[reward_key(task)].sum(dtype=np.float64)) for task in layout.tasks),
    )


def finish(
    partial: Path,
    path: Path,
    layout: Layout,
    records: Sequence[Record],
    recorded_task: str | None,
    provenance: Provenance,
) -> None:
    """Write returns, checksums and attributes of an unfinished store and rename it to `path`.

    Raises OSError and UserError.
    """
    if len(records) != len(layout.lengths):
        raise ValueError(f"{len(records)} of {len(layout.lengths)} announced episodes were written")
    recorded = _stacked([record.recorded for record in records])
    digests = recorded, _stacked([record.relabelled for record in records])
    arrays = {"episodes/offset": layout.starts} | dict(zip(DIGESTS, digests, strict=True))
    for column, task in enumerate(layout.tasks):
        arrays[f"returns/{task}"] = np.array([record.returns[column] for record in records], np.float32)
    attributes = {
        "created_by": provenance.created_by,
        "domain": layout.domain.name,
        "tasks": json.dumps(layout.tasks),
        "recorded_task": recorded_task or "none",
        "provenance": provenance.to_json(),
        "fingerprint": content_fingerprint(layout.domain.name, layout.lengths, recorded),
    }
    if isinstance(layout.domain, StoredDomain):
        attributes["facts"] = layout.domain.to_json()
    if too_long := [name for name, text in attributes.items() if len(text) > LONGEST_TEXT]:
        raise UserError(f"{path}: its {too_long[0]} is longer than {LONGEST_TEXT:,} characters: import fewer archives")
    sync(partial)
    with h5py.File(partial, "r+", libver=("v110", "v110"), locking=False) as file:
        for name, array in arrays.items():
            file[name][...] = array
            file[name].attrs["sha256"] = np.bytes_(hashlib.sha256(np.ascontiguousarray(array).data).hexdigest())
        file.attrs["format_version"] = FORMAT_VERSION
        del file.attrs["identity"]
        for name, text in attributes.items():
            # HDF5 protects only strings of fixed length by checksums.
            file.attrs[name] = np.bytes_(text.encode())
        file.attrs["format"] = np.bytes_(FORMAT.encode())
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _stacked(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
