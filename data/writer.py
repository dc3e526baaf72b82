"""Writing an episode store: HDF5 lays the file out, plain writes fill it, and only a whole file gets the real name.

The lengths of all episodes are known before the first is written, so every array has its place from the start and
nothing but one episode is ever in memory. The file grows under a hidden name in the same folder. If anything fails it
is deleted; if the process is killed, the remains are unfinished by name and by content and the next writer takes over.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from ringrl import __version__
from ringrl.data.schema import Column, Episode, recorded_columns, reward_key
from ringrl.data.store import FORMAT, FORMAT_VERSION, content_fingerprint
from ringrl.envs import domain_named
from ringrl.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def create_store(
    path: Path,
    domain: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    source: str,
    overwrite: bool = False,
) -> Iterator["StoreWriter"]:
    """Opens a new store for episodes of the given lengths (steps); it appears at `path` when the block ends well.

    `append` every episode in order, and set `recorded_task` before the end if it is known. Raises UserError if the
    path exists (unless `overwrite`), if another process is writing it, and if the disk or a quota is full.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists, choose another name or overwrite it (--overwrite)")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, name the store's file")
    partial = _partial(path)
    with _cannot_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_alone(partial, path)
    try:
        writer = StoreWriter(path, descriptor, domain, tasks, lengths, source)
        yield writer
        writer.finish()
        with _cannot_write(path):
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    _sync_folder(path.parent)


class StoreWriter:
    """Fills the store that `create_store` laid out, one episode after the other."""

    recorded_task: str | None = None

    def __init__(
        self,
        path: Path,
        descriptor: int,
        domain: str,
        tasks: Sequence[str],
        lengths: Sequence[int],
        source: str,
    ) -> None:
        self._path, self._descriptor = path, descriptor
        self._domain, self._tasks = domain, tuple(tasks)
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if len(self._lengths) == 0 or self._lengths.min() < 1:
            raise ValueError(f"a store needs episodes of at least one step, got lengths {lengths}")
        self._starts = np.concatenate([[0], np.cumsum(self._lengths + 1)])
        self._columns = recorded_columns(domain_named(domain))
        self._columns |= {reward_key(task): Column(1, np.dtype("<f4")) for task in tasks}
        row_bytes = sum(column.width * column.dtype.itemsize for column in self._columns.values())
        self._size = int(self._starts[-1]) * row_bytes + (8 + 4 * len(tasks)) * len(self._starts) + 2**16
        self._hashes = {key: hashlib.sha256() for key in self._columns}
        self._returns: dict[str, list[float]] = {task: [] for task in tasks}
        self._written = 0
        with _cannot_write(path, self._size):
            self._places = self._lay_out(source)

    def append(self, episode: Episode) -> None:
        """Writes the next episode: the arrays that `EpisodeStore.episode` gives back, with the announced length."""
        rows = int(self._lengths[self._written]) + 1
        for key, column in self._columns.items():
            array = np.ascontiguousarray(episode[key])
            shape = (rows,) if key not in self._recorded else (rows, column.width)
            if array.shape != shape or array.dtype != column.dtype:
                raise ValueError(f"{key} is {array.dtype} {array.shape}, the store expects {column.dtype} {shape}")
            place = self._places[key] + int(self._starts[self._written]) * column.width * column.dtype.itemsize
            with _cannot_write(self._path):
                _write_all(self._descriptor, array, place)
            self._hashes[key].update(array.data)
        for task in self._tasks:
            self._returns[task].append(float(episode[reward_key(task)].sum(dtype=np.float64)))
        self._written += 1

    def finish(self) -> None:
        """Writes what is known only at the end, and last of all the mark that says the store is whole."""
        if self._written != len(self._lengths):
            raise ValueError(f"{self._written} of {len(self._lengths)} announced episodes were written")
        digests = {key: digest.hexdigest() for key, digest in self._hashes.items()}
        with _cannot_write(self._path):
            os.fsync(self._descriptor)
            with h5py.File(_partial(self._path), "r+", locking=False) as file:
                for key, digest in digests.items():
                    file[self._dataset_name(key)].attrs["sha256"] = digest
                for task in self._tasks:
                    _fill(file[f"returns/{task}"], np.asarray(self._returns[task], dtype=np.float32))
                file.attrs["fingerprint"] = content_fingerprint(self._domain, self._lengths, digests)
                file.attrs["recorded_task"] = self.recorded_task or ""
                file.flush()
                file.attrs["complete"] = True
            os.fsync(self._descriptor)

    @property
    def _recorded(self) -> dict[str, Column]:
        return recorded_columns(domain_named(self._domain))

    def _dataset_name(self, key: str) -> str:
        return f"steps/{key}" if key in self._recorded else f"rewards/{key.removeprefix('reward/')}"

    def _lay_out(self, source: str) -> dict[str, int]:
        """Creates the file with every array in place but empty; returns the byte offset of each large array."""
        rows = int(self._starts[-1])
        # Tried before HDF5 does the same, because HDF5 does not say why it could not write.
        _reserve(self._descriptor, self._size)
        # This generation of HDF5's format has checksums on all it writes itself, so damage there is always noticed.
        with h5py.File(
            _partial(self._path),
            "w",
            libver=("v110", "v110"),
            locking=False,
            alignment_threshold=1,
            alignment_interval=64,
        ) as file:
            file.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, "complete": False})
            file.attrs.update({"domain": self._domain, "tasks": json.dumps(self._tasks), "source": source})
            file.attrs["created_by"] = f"ringrl {__version__}"
            _fill(_allocate(file, "episodes/offset", (len(self._starts),), np.dtype("<i8")), self._starts)
            for task in self._tasks:
                _allocate(file, f"returns/{task}", (len(self._lengths),), np.dtype("<f4"))
            places = {}
            for key, column in self._columns.items():
                shape = (rows, column.width) if key in self._recorded else (rows,)
                places[key] = _allocate(file, self._dataset_name(key), shape, column.dtype).id.get_offset()
        _reserve(self._descriptor, self._size)
        return places


def _partial(path: Path) -> Path:
    """The hidden name under which a store grows."""
    return path.with_name(f".{path.name}.partial")


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """A contiguous dataset that has its place in the file at once and is not filled with zeros."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, shape=shape, dtype=dtype, dcpl=settings)


def _fill(dataset: h5py.Dataset, array: np.ndarray) -> None:
    dataset[...] = array
    dataset.attrs["sha256"] = hashlib.sha256(array.data).hexdigest()


def _write_all(descriptor: int, array: np.ndarray, place: int) -> None:
    view = array.data.cast("B")
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def _reserve(descriptor: int, size: int) -> None:
    """Claims `size` bytes of disk now (where the system can), so that a full disk shows before the work and not after.

    HDF5 cuts the file back to its own idea of its length when it closes it.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise


def _open_alone(partial: Path, path: Path) -> int:
    """Opens the unfinished file for this process only; the lock goes when the process does."""
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock another writer may have finished and renamed the very file that is open here.
        if partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat()):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    raise UserError(f"{path}: another process is writing it, wait for it or choose another name")


@contextlib.contextmanager
def _cannot_write(path: Path, size: int | None = None) -> Iterator[None]:
    """Turns failed writes, of `size` bytes where known, into one line that says what the user can do."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: HDF5, which gives the error number only in its text
        in_text = re.search(r"errno = (\d+)", str(error))
        code = int(in_text[1]) if in_text else getattr(error, "errno", None)
        if code in DISK_FULL:
            free = f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free in {path.parent}"
            needed = f"{size / 1e6:,.1f} MB are needed, " if size else ""
            raise UserError(
                f"{path}: the disk, a quota or a limit on file size is full ({needed}{free}): "
                "free some space or write elsewhere"
            ) from error
        reason = os.strerror(code) if code else " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({reason}): check the folder or choose another") from error


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself safe; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
