"""The writer of an episode store. h5py creates the file with all datasets, and `os.pwrite` writes the rows.

A full disk then raises an error, whereas a write through a memory map would end with SIGBUS.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from ringrl.data.store.format import (
    FORMAT,
    FORMAT_VERSION,
    LONGEST_TEXT,
    Episode,
    Layout,
    Provenance,
    Record,
    StoredDomain,
    content_fingerprint,
    dataset_name,
)
from ringrl.envs import Domain
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, linked, lock, reserve, write_aside

ATTRIBUTES = 2**19  # bytes that the attributes need at most
DIGESTS = ("episodes/recorded_sha256", "episodes/relabelled_sha256")


@contextlib.contextmanager
def create_store(
    path: Path,
    domain: Domain,
    tasks: Sequence[str],
    lengths: Sequence[int] | np.ndarray,
    *,
    source: Provenance,
    overwrite: bool = False,
) -> Iterator["StoreWriter"]:
    """Create a store for episodes of the given lengths (steps). The file appears at `path` when the block succeeds.

    In the block, `append` every episode in order, with rewards of all `tasks`, and set `recorded_task` if it is known.
    If `path` is a link, the file that it leads to is written.

    UserError if the path exists (without `overwrite`), another process writes it, or the disk or a quota is full.
    """
    path = linked(path)
    layout = Layout(domain, tasks, lengths)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, name the store's file")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists, choose another name or overwrite it (--overwrite)")
    with explain_write_errors(path), lock(path, "is writing it"), write_aside(path) as partial:
        writer = StoreWriter(partial, layout)
        with explain_write_errors(path, writer.size), contextlib.closing(writer):
            yield writer
            writer.finish(path, source)


class StoreWriter:
    """Creates the file of a store with space for all arrays, and writes its rows."""

    recorded_task: str | None = None

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self.records: list[Record] = []  # of the episodes that were written
        rows = int(layout.starts[-1])
        arrays = {dataset_name(key): (layout.shape(key, rows), spec.dtype) for key, spec in layout.arrays.items()}
        # This version of HDF5's format has checksums of its metadata, which reveal damage.
        with h5py.File(path, "x", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=64) as file:
            for name, (shape, dtype) in (layout.per_episode() | arrays).items():
                # Contiguous, with an offset in the file from the start, and not filled with zeros.
                settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                file.create_dataset(name, shape=shape, dtype=dtype, dcpl=settings)
            self._offsets = {key: file[dataset_name(key)].id.get_offset() for key in layout.arrays}
        self.size = path.stat().st_size + ATTRIBUTES
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def append(self, episode: Episode) -> None:
        """Write the rows of the next episode. Raises OSError, and ValueError for rows of another shape or dtype."""
        index = len(self.records)
        if index == 0:  # not earlier: an archive of false names would reserve any amount
            reserve(self.path, self.size)
        rows = int(self.layout.lengths[index]) + 1
        for key, spec in self.layout.arrays.items():
            array, shape = np.ascontiguousarray(episode[key]), self.layout.shape(key, rows)
            if array.shape != shape or array.dtype != spec.dtype:
                raise ValueError(f"{key} is {array.dtype} {array.shape}, the store expects {spec.dtype} {shape}")
            view = array.data.cast("B")
            offset = int(self._offsets[key]) + int(self.layout.starts[index]) * spec.row_bytes
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        self.records.append(self.layout.record(episode))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def finish(self, final: Path, provenance: Provenance) -> None:
        """Write returns, checksums and attributes. Raises OSError, and UserError that names the `final` path."""
        layout, records = self.layout, self.records
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
            "recorded_task": self.recorded_task or "none",
            "provenance": provenance.to_json(),
            "fingerprint": content_fingerprint(layout.domain.name, layout.lengths, recorded),
        }
        if isinstance(layout.domain, StoredDomain):
            attributes["facts"] = layout.domain.to_json()
        if too_long := [name for name, text in attributes.items() if len(text) > LONGEST_TEXT]:
            raise UserError(
                f"{final}: its {too_long[0]} is longer than {LONGEST_TEXT:,} characters: import fewer archives"
            )
        with h5py.File(self.path, "r+", libver=("v110", "v110"), locking=False) as file:
            for name, array in arrays.items():
                file[name][...] = array
                file[name].attrs["sha256"] = np.bytes_(hashlib.sha256(np.ascontiguousarray(array).data).hexdigest())
            file.attrs["format_version"] = FORMAT_VERSION
            for name, text in attributes.items():
                # HDF5 protects only strings of fixed length by checksums.
                file.attrs[name] = np.bytes_(text.encode())
            file.attrs["format"] = np.bytes_(FORMAT.encode())


def _stacked(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
