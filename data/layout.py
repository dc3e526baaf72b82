"""The file of an episode store: where every array lies, and the HDF5 description that says so.

    /steps/{observation,action,reward,discount,physics}   (rows, width)   as recorded, all episodes end to end
    /rewards/{task}                                       (rows,) float32  relabelled, row 0 of every episode is 0
    /returns/{task}                                       (episodes,) float32
    /return_quantiles/{task}                              (levels,) float64 of those returns, at RETURN_LEVELS
    /episodes/offset                                      (episodes + 1,) int64; episode i is rows offset[i]:offset[i+1]
    /episodes/recorded_sha256                             (episodes, 32) uint8 over the recorded arrays of each
    /episodes/relabelled_sha256                           (episodes, 32) uint8 over its rewards

Every dataset is contiguous and uncompressed. The places follow from the domain and the lengths alone, so rows can be
written before the description exists, by several processes and in any order; the description is made in memory and
written last.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence

import h5py
import numpy as np

from ringrl.data.digest import DIGEST_BYTES
from ringrl.data.schema import Column, recorded_columns, reward_key, reward_task
from ringrl.envs import domain_named

RETURN_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Layout:
    """Where the arrays of a store lie.

    Attributes:
        domain: name of the domain.
        tasks: the tasks whose rewards are stored.
        lengths: steps of each episode, (episodes,) int64.
        starts: first row of each episode and the number of all rows, (episodes + 1,) int64.
        columns: the arrays over all rows: those of `recorded_columns`, and "reward/{task}".
        size: bytes that the file may need, a little more than it will.
    """

    def __init__(self, domain: str, tasks: Sequence[str], lengths: Sequence[int] | np.ndarray) -> None:
        self.domain, self.tasks = domain, tuple(tasks)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if len(self.lengths) == 0 or self.lengths.min() < 1:
            raise ValueError(f"a store needs episodes of at least one step, got lengths {lengths}")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths + 1)])
        self.columns = recorded_columns(domain_named(domain))
        self.columns |= {reward_key(task): Column(1, np.dtype("<f4")) for task in tasks}
        log = _WriteLog()
        with _open(log) as file:
            self._places = self._allocate(file)
        self.size = log.size + 2**16

    def place(self, key: str, episode: int) -> int:
        """The byte at which the rows of an episode begin in the file."""
        return self._places[key] + int(self.starts[episode]) * self.row_bytes(key)

    def row_bytes(self, key: str) -> int:
        """Bytes of one row of an array."""
        column = self.columns[key]
        return column.width * column.dtype.itemsize

    def shape(self, key: str, rows: int) -> tuple[int, ...]:
        """The shape of that many rows of an array: a reward of one task has no second axis."""
        return (rows,) if reward_task(key) else (rows, self.columns[key].width)

    def describe(
        self, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, str | int]
    ) -> tuple[list[tuple[int, bytes]], int]:
        """The pieces of the file that are no rows, each with its place, and the size of the file.

        `arrays` are those of one entry or more per episode, by the names above. The first piece, at 0, makes the file
        HDF5 and is to be written last.
        """
        log = _WriteLog()
        with _open(log) as file:
            if self._allocate(file) != self._places:
                raise RuntimeError("HDF5 placed the arrays of the store elsewhere than before")
            for name, array in arrays.items():
                file[name][...] = array
                file[name].attrs["sha256"] = np.bytes_(hashlib.sha256(np.ascontiguousarray(array).data).hexdigest())
            for name, value in attributes.items():
                # Texts of a fixed length lie where HDF5 keeps a checksum; those of variable length do not.
                file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
            for task in self.tasks:
                file[f"return_quantiles/{task}"].attrs["levels"] = np.array(RETURN_LEVELS)
        rows = int(self.starts[-1])
        taken = [(place, place + rows * self.row_bytes(key)) for key, place in self._places.items()]
        return log.between(taken), log.size

    def _allocate(self, file: h5py.File) -> dict[str, int]:
        """Creates all datasets, always in this order; returns the byte offset of each array over all rows."""
        episodes, rows = len(self.lengths), int(self.starts[-1])
        _reserve(file, "episodes/offset", (episodes + 1,), np.dtype("<i8"))
        for kind in ("recorded", "relabelled"):
            _reserve(file, f"episodes/{kind}_sha256", (episodes, DIGEST_BYTES), np.dtype("u1"))
        for task in self.tasks:
            _reserve(file, f"returns/{task}", (episodes,), np.dtype("<f4"))
            _reserve(file, f"return_quantiles/{task}", (len(RETURN_LEVELS),), np.dtype("<f8"))
        return {
            key: _reserve(file, dataset_name(key), self.shape(key, rows), column.dtype).id.get_offset()
            for key, column in self.columns.items()
        }


def dataset_name(key: str) -> str:
    """Where an array of an episode lies in the file: "steps/physics", "rewards/walker_walk"."""
    task = reward_task(key)
    return f"rewards/{task}" if task else f"steps/{key}"


def _open(log: "_WriteLog") -> h5py.File:
    # This generation of HDF5's format has checksums on all it writes itself, so damage there is always noticed.
    return h5py.File(log, "w", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=64)


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """A contiguous dataset that has its place in the file at once and is not filled with zeros."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, shape=shape, dtype=dtype, dcpl=settings)


class _WriteLog(io.RawIOBase):
    """A file in memory that keeps only what is written: a store's description takes kilobytes, its rows gigabytes."""

    def __init__(self) -> None:
        self.size = 0
        self._position = 0
        self._writes: list[tuple[int, bytes]] = []

    def between(self, taken: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
        """All bytes of the file outside these ranges, zero where nothing was written."""
        begins = [0, *(end for _, end in sorted(taken))]
        ends = [*(start for start, _ in sorted(taken)), self.size]
        return [(begin, self._bytes(begin, end)) for begin, end in zip(begins, ends, strict=True) if end > begin]

    def _bytes(self, begin: int, end: int) -> bytes:
        image = bytearray(end - begin)
        for place, content in self._writes:
            first, last = max(place, begin), min(place + len(content), end)
            if first < last:
                image[first - begin : last - begin] = content[first - place : last - place]
        return bytes(image)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, content: "bytes | memoryview") -> int:  # type: ignore[override]
        self._writes.append((self._position, bytes(content)))
        self._position += len(content)
        self.size = max(self.size, self._position)
        return len(content)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        buffer[:] = self._bytes(self._position, self._position + len(buffer))
        self._position += len(buffer)
        return len(buffer)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size
