"""The episode store: one HDF5 file per dataset, read through one memory map.

HDF5 says where an array lies (`ringrl.data.layout` lists them); the array itself is a view of the mapped file, so an
episode costs a few slices and no copy. `ringrl.data.writer` writes these files.
"""

import json
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from ringrl.data.digest import DIGEST_BYTES, content_fingerprint, episode_digest
from ringrl.data.foreign import ForeignDomain
from ringrl.data.layout import RETURN_LEVELS, dataset_name
from ringrl.data.mapped import MappedArrays, read_text
from ringrl.data.provenance import Provenance
from ringrl.data.schema import recorded_columns, reward_key, reward_task
from ringrl.envs import Domain, domain_named
from ringrl.errors import UserError

FORMAT = "ringrl episode store"
FORMAT_VERSION = 2


class EpisodeStore:
    """All episodes of one imported dataset, relabelled for every task of its domain.

    Opening reads the description and the returns and maps the file; `episode(i)` gives views of the map, so memory
    does not grow with the steps of the dataset. Any number of readers, threads and processes may use
    one file: it never changes once it has its name. A pickled store opens the file again where it is unpickled.

    Raises UserError, naming the file, if it is not a whole store of a known format and domain.
    """

    path: Path
    domain: str
    facts: Domain  # about that domain: the table's for ExoRL's, a ForeignDomain out of the file for any other
    tasks: tuple[str, ...]
    provenance: Provenance  # where the episodes came from and what was done to them
    fingerprint: str  # sha256 of the recorded content: the same for the same episodes, however they were packed
    recorded_task: str | None  # the task whose reward was recorded, where one is known
    lengths: Int64[np.ndarray, " episode"]  # steps of each episode, its rows less one
    offsets: Int64[np.ndarray, " episode_plus_1"]
    arrays: Mapping[str, np.ndarray]  # every array over all rows: as recorded, and "reward/{task}"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        if self.path.is_dir():
            raise UserError(
                f"{path}: is a folder; import one of episodes (ringrl data import), or name the store's file (.h5)"
            )
        if not self.path.is_file():
            raise UserError(f"{path}: no such file, import an archive first (ringrl data import)")
        try:
            self._open()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except MemoryError:
            raise  # which says nothing about the file
        except PermissionError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): ask its owner for the permission") from error
        except Exception as error:  # HDF5 raises nearly anything when the bytes are damaged
            if zipfile.is_zipfile(self.path):
                raise UserError(f"{path}: is an archive, not a store: import it (ringrl data import)") from error
            raise UserError(
                f"{path}: not an episode store, or damaged or cut short: import the archive again"
            ) from error

    def _open(self) -> None:
        # Without HDF5's file lock: a finished store never changes, and network file systems often refuse locks.
        with h5py.File(self.path, "r", locking=False) as file:
            _refuse_foreign(file)
            self.facts = _read_facts(file)
            self.domain = self.facts.name
            self.tasks = _checked_tasks(self.facts, json.loads(read_text(file, "tasks")))
            self.provenance = Provenance.from_json(read_text(file, "provenance"))
            self.fingerprint = read_text(file, "fingerprint")
            self.recorded_task = _checked_recorded_task(self.tasks, read_text(file, "recorded_task"))
            arrays = MappedArrays(file, self.path)
            self._read_episodes(arrays)
            self._map_steps(arrays)
            arrays.refuse_overlap()
        self._starts: list[int] = self.offsets.tolist()  # slicing by Python integers is faster

    def _read_episodes(self, arrays: MappedArrays) -> None:
        """What there is once or more per episode; all of it is compared with its checksums."""
        self.offsets = arrays.small("episodes/offset", (arrays.length("episodes/offset"),), "<i8")
        if len(self.offsets) < 2 or self.offsets[0] != 0 or (np.diff(self.offsets) < 2).any():
            raise ValueError("no list of episodes")
        self.lengths = np.diff(self.offsets) - 1
        episodes = (self.num_episodes,)
        self._digests = {
            kind: arrays.small(f"episodes/{kind}_sha256", (*episodes, DIGEST_BYTES), "u1")
            for kind in ("recorded", "relabelled")
        }
        if content_fingerprint(self.domain, self.lengths, self._digests["recorded"]) != self.fingerprint:
            raise UserError("the fingerprint is not that of the content: import the archive again")
        self._returns = {task: arrays.small(f"returns/{task}", episodes, "<f4") for task in self.tasks}
        levels = (len(RETURN_LEVELS),)
        self._quantiles = {task: arrays.small(f"return_quantiles/{task}", levels, "<f8") for task in self.tasks}

    def _map_steps(self, arrays: MappedArrays) -> None:
        rows = int(self.offsets[-1])
        recorded = recorded_columns(self.facts).items()
        self.arrays = {
            key: arrays.view(dataset_name(key), (rows, column.width), column.dtype.str) for key, column in recorded
        }
        self.arrays |= {key: arrays.view(dataset_name(key), (rows,), "<f4") for key in map(reward_key, self.tasks)}

    @property
    def recorded_digests(self) -> UInt8[np.ndarray, "episode 32"]:
        """SHA-256 of what was recorded of each episode, by which the same episode is known in another store."""
        return self._digests["recorded"]

    @property
    def source(self) -> str:
        """Where the episodes came from, e.g. "walker/rnd.zip"."""
        return self.provenance.source

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

    def return_quantiles(self, task: str) -> Float64[np.ndarray, " level"]:
        """The quantiles of those returns at `ringrl.data.layout.RETURN_LEVELS`; UserError for another task."""
        self.returns(task)
        return self._quantiles[task]

    def episode(self, index: int) -> dict[str, np.ndarray]:
        """Episode `index` as read-only views of T+1 rows, row t being (s_t, a_{t-1}, r_{t-1}) and row 0 the reset.

        observation (T+1,O), action (T+1,A), reward as recorded (T+1,1 or one column per task) and discount (T+1,1), all
        float32; physics (T+1,P) float64, where the domain has any; "reward/{task}" (T+1,) float32 for every task.
        IndexError outside 0..num_episodes-1.
        """
        if not 0 <= index < self.num_episodes:
            raise IndexError(f"episode {index} of a store of {self.num_episodes}")
        start, end = self._starts[index], self._starts[index + 1]
        return {key: array[start:end] for key, array in self.arrays.items()}

    def verify(self) -> None:
        """Reads the whole file and compares it with its checksums; a UserError names the first damaged episode."""
        with ThreadPoolExecutor() as threads:
            for index, fault in enumerate(threads.map(self._fault, range(self.num_episodes))):
                if fault:
                    raise UserError(f"{self.path}: episode {index} is damaged ({fault}): import the archive again")
        for task in self.tasks:
            quantiles = np.quantile(self._returns[task].astype(np.float64), RETURN_LEVELS)
            if not np.array_equal(quantiles, self._quantiles[task]):
                raise UserError(
                    f"{self.path}: the quantiles of {task} are not those of its returns: import the archive again"
                )

    def _fault(self, index: int) -> str | None:
        rows = self.episode(index)
        for kind, keys in (
            ("recorded", [key for key in rows if not reward_task(key)]),
            ("relabelled", [key for key in rows if reward_task(key)]),
        ):
            if episode_digest(rows, keys) != self._digests[kind][index].tobytes():
                return f"the sha256 of what was {kind} differs"
        for task in self.tasks:
            if np.float32(rows[reward_key(task)].sum(dtype=np.float64)) != self._returns[task][index]:
                return f"its return of {task} is not the sum of its rewards"
        return None

    def __len__(self) -> int:
        return self.num_episodes

    def __reduce__(self) -> tuple[type["EpisodeStore"], tuple[Path]]:
        return EpisodeStore, (self.path,)

    def __repr__(self) -> str:
        return f"EpisodeStore({str(self.path)!r}: {self.num_episodes} episodes of {self.domain})"


def _refuse_foreign(file: h5py.File) -> None:
    if "format" not in file.attrs or read_text(file, "format") != FORMAT:
        raise UserError("an HDF5 file, but not an episode store: import an archive first (ringrl data import)")
    version = int(file.attrs["format_version"])
    if version != FORMAT_VERSION:
        what_to_do = "update ringrl" if version > FORMAT_VERSION else "import the archive again"
        raise UserError(
            f"written in format {version} by {read_text(file, 'created_by')}, this version reads format "
            f"{FORMAT_VERSION}: {what_to_do}"
        )


def _read_facts(file: h5py.File) -> Domain:
    name = read_text(file, "domain")
    if "facts" not in file.attrs:
        return domain_named(name)
    facts = ForeignDomain.from_json(read_text(file, "facts"))
    if facts.name != name:
        raise ValueError(f"facts about {facts.name}, not about {name}")
    return facts


def _checked_tasks(domain: Domain, tasks: object) -> tuple[str, ...]:
    if not isinstance(tasks, list) or not set(tasks) <= set(domain.tasks) or len(set(tasks)) < len(tasks):
        raise UserError(f"the tasks {tasks} are not those of {domain.name}: import the archive again")
    return tuple(tasks)


def _checked_recorded_task(tasks: tuple[str, ...], task: str) -> str | None:
    if task not in (*tasks, "none"):
        raise ValueError(f"recorded for {task}")
    return None if task == "none" else task
