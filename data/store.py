"""The episode store: one HDF5 file per dataset, read through one memory map.

    /steps/{observation,action,reward,discount,physics}   (rows, width)   as recorded, all episodes end to end
    /rewards/{task}                                       (rows,) float32  relabelled, row 0 of every episode is 0
    /returns/{task}                                       (episodes,) float32
    /episodes/offset                                      (episodes + 1,) int64; episode i is rows offset[i]:offset[i+1]

Every dataset is contiguous and uncompressed, with its sha256 as an attribute. HDF5 says where an array lies; the array
itself is then a view of the mapped file, so an episode costs a few slices and no copy. `ringrl.data.writer` writes
these files.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32, Int64

from ringrl.data.schema import recorded_columns, reward_key
from ringrl.envs import domain_named
from ringrl.errors import UserError

FORMAT = "ringrl episode store"
FORMAT_VERSION = 1


class EpisodeStore:
    """All episodes of one imported dataset, relabelled for every task of its domain.

    Opening reads the description and the returns and maps the file; `episode(i)` gives views of the map, so memory
    does not grow with the steps of the dataset. Any number of readers, threads and processes may use
    one file: it never changes once it has its name. A pickled store opens the file again where it is unpickled.

    Raises UserError, naming the file, if it is not a whole store of a known format and domain.
    """

    path: Path
    domain: str
    tasks: tuple[str, ...]
    source: str  # where the episodes came from, e.g. "walker/rnd.zip"
    created_by: str
    fingerprint: str  # sha256 of the recorded content: the same for the same episodes, however they were packed
    recorded_task: str | None  # the task whose reward was recorded, where one is known
    lengths: Int64[np.ndarray, " episode"]  # steps of each episode, its rows less one
    offsets: Int64[np.ndarray, " episode_plus_1"]
    arrays: Mapping[str, np.ndarray]  # every array over all rows: as recorded, and "reward/{task}"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_file():
            raise UserError(f"{path}: no such file, import an archive first (ringrl data import)")
        try:
            self._open()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # HDF5 raises nearly anything when the bytes are damaged
            raise UserError(
                f"{path}: not an episode store, or damaged or cut short: import the archive again"
            ) from error

    def _open(self) -> None:
        # Without HDF5's file lock: a finished store never changes, and network file systems often refuse locks.
        with h5py.File(self.path, "r", locking=False) as file:
            _refuse_foreign(file)
            self.domain = str(file.attrs["domain"])
            self.tasks = tuple(json.loads(file.attrs["tasks"]))
            self.source = str(file.attrs["source"])
            self.created_by = str(file.attrs["created_by"])
            self.fingerprint = str(file.attrs["fingerprint"])
            self.recorded_task = str(file.attrs["recorded_task"]) or None
            self.offsets = _checked_offsets(_read_checked(file["episodes/offset"]))
            self.lengths = np.diff(self.offsets) - 1
            self._returns = {task: _read_checked(file[f"returns/{task}"]) for task in self.tasks}
            self._sha256 = {key: str(dataset.attrs["sha256"]) for key, dataset in self._datasets(file).items()}
            mapped = np.memmap(self.path, mode="r")
            self.arrays = {key: _view(mapped, dataset) for key, dataset in self._datasets(file).items()}
        self._check_shapes()
        self._starts: list[int] = self.offsets.tolist()  # slicing by Python integers is faster

    def _datasets(self, file: h5py.File) -> dict[str, h5py.Dataset]:
        recorded = {key: file[f"steps/{key}"] for key in recorded_columns(domain_named(self.domain))}
        return recorded | {reward_key(task): file[f"rewards/{task}"] for task in self.tasks}

    def _check_shapes(self) -> None:
        rows = int(self.offsets[-1])
        for key, column in recorded_columns(domain_named(self.domain)).items():
            _require(self.arrays[key], (rows, column.width), column.dtype, key)
        for task in self.tasks:
            _require(self.arrays[reward_key(task)], (rows,), np.dtype("<f4"), reward_key(task))
            _require(self._returns[task], (self.num_episodes,), np.dtype("<f4"), f"returns/{task}")

    @property
    def num_episodes(self) -> int:
        """How many episodes the store holds."""
        return len(self.offsets) - 1

    @property
    def num_steps(self) -> int:
        """Transitions in all episodes together."""
        return int(self.lengths.sum())

    @property
    def observation_size(self) -> int:
        """Numbers in an observation."""
        return int(self.arrays["observation"].shape[1])

    @property
    def action_size(self) -> int:
        """Numbers in an action."""
        return int(self.arrays["action"].shape[1])

    def returns(self, task: str) -> Float32[np.ndarray, " episode"]:
        """The return of every episode for a task of this domain, as relabelled; UserError for another task."""
        if task not in self._returns:
            raise UserError(
                f"{self.path}: a store of {self.domain} has no rewards for {task}: choose {', '.join(self.tasks)}"
            )
        return self._returns[task]

    def episode(self, index: int) -> dict[str, np.ndarray]:
        """Episode `index` as read-only views of T+1 rows, row t being (s_t, a_{t-1}, r_{t-1}) and row 0 the reset.

        observation (T+1,O), action (T+1,A), reward as recorded (T+1,1 or one column per task) and discount (T+1,1), all
        float32; physics (T+1,P) float64; "reward/{task}" (T+1,) float32 for every task. IndexError outside
        0..num_episodes-1.
        """
        if not 0 <= index < self.num_episodes:
            raise IndexError(f"episode {index} of a store of {self.num_episodes}")
        start, end = self._starts[index], self._starts[index + 1]
        return {key: array[start:end] for key, array in self.arrays.items()}

    def verify(self) -> None:
        """Reads the whole file and compares it with its checksums; a UserError names the array that differs."""
        for key, array in self.arrays.items():
            if hashlib.sha256(array.data).hexdigest() != self._sha256[key]:
                raise UserError(f"{self.path}: {key} is damaged (its sha256 differs): import the archive again")
        if content_fingerprint(self.domain, self.lengths, self._sha256) != self.fingerprint:
            raise UserError(f"{self.path}: the fingerprint is not that of the content: import the archive again")

    def __len__(self) -> int:
        return self.num_episodes

    def __reduce__(self) -> tuple[type["EpisodeStore"], tuple[Path]]:
        return EpisodeStore, (self.path,)

    def __repr__(self) -> str:
        return f"EpisodeStore({str(self.path)!r}: {self.num_episodes} episodes of {self.domain})"


def content_fingerprint(domain: str, lengths: Int64[np.ndarray, " episode"], sha256: Mapping[str, str]) -> str:
    """The fingerprint of recorded content: sha256 over the domain, the lengths and each recorded array's sha256.

    Relabelled rewards are left out: they follow from the content, to a precision that depends on the machine.
    """
    recorded = {key: sha256[key] for key in recorded_columns(domain_named(domain))}
    return hashlib.sha256(json.dumps([domain, lengths.tolist(), recorded]).encode()).hexdigest()


def _refuse_foreign(file: h5py.File) -> None:
    if file.attrs.get("format") != FORMAT:
        raise UserError("an HDF5 file, but not an episode store: import an archive first (ringrl data import)")
    version = int(file.attrs["format_version"])
    if version > FORMAT_VERSION:
        raise UserError(
            f"written in format {version} by {file.attrs['created_by']}, this version reads up to format "
            f"{FORMAT_VERSION}: update ringrl"
        )
    if not file.attrs["complete"]:
        raise UserError("was never finished: import the archive again")


def _read_checked(dataset: h5py.Dataset) -> np.ndarray:
    """A small array, read at once and compared with its checksum; the large ones wait for `verify`."""
    array = dataset[:]
    if hashlib.sha256(array.data).hexdigest() != dataset.attrs["sha256"]:
        raise UserError(f"{dataset.name} is damaged (its sha256 differs): import the archive again")
    array.flags.writeable = False
    return array


def _checked_offsets(offsets: np.ndarray) -> Int64[np.ndarray, " episode_plus_1"]:
    if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError("no list of episodes")
    if offsets[0] != 0 or (np.diff(offsets) < 2).any():
        raise ValueError("episodes overlap")
    return offsets


def _view(mapped: np.memmap, dataset: h5py.Dataset) -> np.ndarray:
    """The dataset as a plain read-only array over the mapped file, whose ends are checked here."""
    offset = dataset.id.get_offset()  # None for chunked and compressed data
    return np.ndarray(dataset.shape, dataset.dtype, buffer=mapped, offset=offset)


def _require(array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, key: str) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{key} is {array.dtype} {array.shape}, expected {dtype} {shape}: the store is damaged or made for "
            "another version of the domain, import the archive again"
        )
