"""The reader of an episode store. Its arrays are views of one memory map, so reading an episode copies nothing."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from ringrl.data.hdf5 import plain_dataset
from ringrl.data.store.format import (
    FORMAT,
    FORMAT_VERSION,
    LONGEST_TEXT,
    Layout,
    Provenance,
    StoredDomain,
    content_fingerprint,
    dataset_name,
)
from ringrl.envs import Domain, domain_named
from ringrl.errors import UserError
from ringrl.files import explain_read_errors


class EpisodeStore:
    """A memory-mapped dataset of episodes, relabelled for every task of its domain.

    `episode(i)` returns views of the map, so memory does not grow with the dataset. Threads and processes may share one
    file, because a finished store never changes. An unpickled store opens the file again.

    Raises UserError, naming the file, if the file is not a whole store of a known format and domain.
    """

    path: Path
    domain: str
    facts: Domain  # a StoredDomain if the domain is not an ExoRL domain
    tasks: tuple[str, ...]
    provenance: Provenance  # origin of the episodes and how they were processed
    fingerprint: str  # sha256 of the recorded content: equal for equal episodes, however they were packed
    recorded_task: str | None  # the task whose reward was recorded, if known
    reference_returns: tuple[float, float] | None  # of random actions and of an expert, if the dataset names them
    num_episodes: int
    num_steps: int  # transitions in all episodes
    observation_size: int
    action_size: int
    lengths: Int64[np.ndarray, " episode"]  # steps of each episode, its rows less one
    offsets: Int64[np.ndarray, " episode_plus_1"]
    recorded_digests: UInt8[np.ndarray, "episode 32"]  # sha256 of the recorded arrays, equal for equal episodes
    arrays: Mapping[str, np.ndarray]  # every array over all rows: as recorded, and "reward/{task}"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.realpath(path))  # unlike Path.resolve also for a link to itself
        if self.path.is_dir():
            raise UserError(
                f"{path}: is a folder; import one of episodes (ringrl data import), or name the store's file (.h5)"
            )
        if not self.path.is_file():
            raise UserError(f"{path}: no such file, import an archive first (ringrl data import)")
        with explain_read_errors(f"{path}:", "give an episode store (.h5), or import the archive again"):
            try:
                self._open()
            except OSError as error:
                if zipfile.is_zipfile(self.path):
                    raise UserError("is an archive, not a store: import it (ringrl data import)") from error
                raise

    def _open(self) -> None:
        # Without HDF5's file lock: a finished store never changes, and network file systems often reject locks.
        with h5py.File(self.path, "r", locking=False) as file:
            _check_format(file)
            self.domain = _read_text(file, "domain")
            if "facts" in file.attrs:
                self.facts = StoredDomain.from_json(_read_text(file, "facts"))
                if self.facts.name != self.domain:
                    raise ValueError(f"facts about {self.facts.name}, not about {self.domain}")
            else:
                self.facts = domain_named(self.domain)
            self.observation_size, self.action_size = self.facts.observation_size, self.facts.action_size
            self.reference_returns = getattr(self.facts, "reference_returns", None)  # of a StoredDomain
            tasks = json.loads(_read_text(file, "tasks"))
            if not isinstance(tasks, list) or not all(map(self.facts.has_task, tasks)) or len({*tasks}) < len(tasks):
                raise UserError(f"the tasks {tasks} differ from the tasks of {self.domain}: import the archive again")
            self.tasks = tuple(tasks)
            self.provenance = Provenance.from_json(_read_text(file, "provenance"))
            self.fingerprint = _read_text(file, "fingerprint")
            recorded_task = _read_text(file, "recorded_task")
            if recorded_task not in (*tasks, "none"):
                raise ValueError(f"recorded for {recorded_task}")
            self.recorded_task = None if recorded_task == "none" else recorded_task
            self._map(_MappedArrays(file, self.path))
        self._starts: list[int] = self.offsets.tolist()  # slicing by Python integers is faster

    def _map(self, mapped: "_MappedArrays") -> None:
        """Map all arrays. Arrays with one entry per episode or task are compared with their checksums."""
        self.offsets = mapped.small("episodes/offset", None, np.dtype("<i8"))
        if len(self.offsets) < 2 or self.offsets[0] != 0 or (np.diff(self.offsets) < 2).any():
            raise ValueError("no list of episodes")
        self.lengths = np.diff(self.offsets) - 1
        self.num_episodes, self.num_steps = len(self.lengths), int(self.lengths.sum())
        self._layout = layout = Layout(self.facts, self.tasks, self.lengths)
        self._small = {name: mapped.small(name, *expected) for name, expected in layout.per_episode().items()}
        self.recorded_digests = self._small["episodes/recorded_sha256"]
        if content_fingerprint(self.domain, self.lengths, self.recorded_digests) != self.fingerprint:
            raise UserError("the fingerprint does not match the content: import the archive again")
        rows = int(self.offsets[-1])
        self.arrays = {
            key: mapped.view(dataset_name(key), layout.shape(key, rows), spec.dtype)
            for key, spec in layout.arrays.items()
        }

    def returns(self, task: str) -> Float32[np.ndarray, " episode"]:
        """Return the relabelled episode returns of a task. UserError for a task that the store does not have."""
        if task not in self.tasks:
            hint = "; import the archives again with --tasks" if task.startswith(f"{self.domain}_") else ""
            raise UserError(
                f"{self.path}: no rewards for task {task} (domain {self.domain}). Tasks: {', '.join(self.tasks)}{hint}"
            )
        return self._small[f"returns/{task}"]

    def episode(self, index: int) -> dict[str, np.ndarray]:
        """Return an episode as read-only views of T+1 rows, row t being (s_t, a_{t-1}, r_{t-1}) and row 0 the reset.

        observation (T+1,O), action (T+1,A), reward as recorded (T+1,1 or one column per task) and discount (T+1,1), all
        float32; physics (T+1,P) float64, where the domain has any; "reward/{task}" (T+1,) float32 for every task.
        IndexError outside 0..num_episodes-1.
        """
        if not 0 <= index < self.num_episodes:
            raise IndexError(f"episode {index} of a store of {self.num_episodes}")
        start, end = self._starts[index], self._starts[index + 1]
        return {key: array[start:end] for key, array in self.arrays.items()}

    def verify(self) -> None:
        """Read the whole file and compare it with its checksums. UserError names the first damaged episode."""
        with ThreadPoolExecutor() as threads:
            for index, fault in enumerate(threads.map(self._fault, range(self.num_episodes))):
                if fault:
                    raise UserError(f"{self.path}: episode {index} is damaged ({fault}): import the archive again")

    def _fault(self, index: int) -> str | None:
        record = self._layout.record(self.episode(index))
        for kind, digest in (("recorded", record.recorded), ("relabelled", record.relabelled)):
            if digest != self._small[f"episodes/{kind}_sha256"][index].tobytes():
                return f"the sha256 of its {kind} arrays differs"
        for task, total in zip(self.tasks, record.returns, strict=True):
            if np.float32(total) != self.returns(task)[index]:
                return f"its return of {task} is not the sum of its rewards"
        return None

    def __len__(self) -> int:
        return self.num_episodes

    def __reduce__(self) -> tuple[type["EpisodeStore"], tuple[Path]]:
        return EpisodeStore, (self.path,)

    def __repr__(self) -> str:
        return f"EpisodeStore({str(self.path)!r}: {self.num_episodes} episodes of {self.domain})"


def _check_format(file: h5py.File) -> None:
    if "format" not in file.attrs or _read_text(file, "format") != FORMAT:
        raise UserError(
            "an HDF5 file, but not an episode store of ringrl: give a store, or import a flat file such as D4RL's "
            "(ringrl data import --format hdf5)"
        )
    version = int(file.attrs["format_version"])
    if version != FORMAT_VERSION:
        what_to_do = "update ringrl" if version > FORMAT_VERSION else "import the archive again"
        raise UserError(
            f"written in format {version} by {_read_text(file, 'created_by')}, this version reads format "
            f"{FORMAT_VERSION}: {what_to_do}"
        )


def _read_text(node: h5py.Group | h5py.Dataset, name: str) -> str:
    """Return a text attribute. KeyError if it is missing, ValueError if it is not a text or too long."""
    value = node.attrs[name]
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} is not a text")
    return value


class _MappedArrays:
    """The arrays of an open HDF5 file as read-only views of its memory map, which outlive the file object.

    The file may be hostile. HDF5 itself therefore reads no array, and UserError is raised unless an array is contiguous
    in this file. Damaged files raise other errors of h5py and numpy, too.
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self._mapped = np.memmap(path, dtype=np.uint8, mode="r")

    def view(self, name: str, shape: tuple[int, ...] | None, dtype: np.dtype) -> np.ndarray:
        """Return an array without reading it. UserError for another shape (None: any) or dtype."""
        try:
            dataset = plain_dataset(self._file, name)
        except UserError as error:
            raise UserError(f"{error}, it is damaged: import the archive again") from error
        shape = dataset.shape if shape is None else shape
        if dataset.dtype != dtype or dataset.shape != shape:
            raise UserError(
                f"{name} is {dataset.dtype} {dataset.shape}, expected {dtype} {shape}: the store is damaged or made "
                "for another version of the domain, import the archive again"
            )
        offset = dataset.id.get_offset()
        if dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS or offset is None:
            raise UserError(f"{name} is chunked or compressed: import the archive again")
        if offset + dataset.nbytes > len(self._mapped):
            raise UserError(f"{name} goes beyond the end of the file, it is cut short: import the archive again")
        # A plain array: slices of a memmap cost more.
        return np.ndarray(shape, dtype, buffer=self._mapped, offset=offset)

    def small(self, name: str, shape: tuple[int, ...] | None, dtype: np.dtype) -> np.ndarray:
        """Return a small array after comparing it with its checksum."""
        array = self.view(name, shape, dtype)
        if hashlib.sha256(array.data).hexdigest() != _read_text(self._file[name], "sha256"):
            raise UserError(f"{name} is damaged (its sha256 differs): import the archive again")
        return array
