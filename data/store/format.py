"""The format of an episode store: its arrays, their names in the HDF5 file, and their checksums.

    /steps/{observation,action,reward,discount,physics}   (rows, width)   as recorded, all episodes end to end
    /rewards/{task}                                       (rows,) float32  relabelled, row 0 of every episode is 0
    /returns/{task}                                       (episodes,) float32
    /return_quantiles/{task}                              (levels,) float64 of the returns, at RETURN_LEVELS
    /episodes/offset                                      (episodes + 1,) int64; episode i is rows offset[i]:offset[i+1]
    /episodes/recorded_sha256                             (episodes, 32) uint8 over the recorded arrays of each
    /episodes/relabelled_sha256                           (episodes, 32) uint8 over its rewards

Every dataset is contiguous and uncompressed. Episodes from other sources may have no physics. The file's attributes
hold the domain, the tasks, the provenance and the fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from ringrl.envs import Domain

FORMAT = "ringrl episode store"
FORMAT_VERSION = 2
RETURN_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
DIGEST_BYTES = hashlib.sha256().digest_size
LONGEST_TEXT = 2**16  # characters of an attribute
ROUNDED = 1e-5  # rounding may move an action out of [-1, 1] by this much

Episode = Mapping[str, np.ndarray]
"""Arrays of T+1 rows under the names of `recorded_arrays`; row t is (s_t, a_{t-1}, r_{t-1}), row 0 the reset."""


class ArraySpec(NamedTuple):
    """The width (numbers per row) and the dtype of one array of an episode."""

    width: int
    dtype: np.dtype


def recorded_arrays(domain: Domain) -> dict[str, ArraySpec]:
    """Return the recorded arrays of a domain's episodes, in the order in which they are stored and hashed.

    Physics is left out where the domain has none.
    """
    float32, float64 = np.dtype("<f4"), np.dtype("<f8")
    arrays = {
        "observation": ArraySpec(domain.observation_size, float32),
        "action": ArraySpec(domain.action_size, float32),
        "reward": ArraySpec(len(domain.recorded_tasks(domain.tasks[0])), float32),
        "discount": ArraySpec(1, float32),
        "physics": ArraySpec(domain.physics_size, float64),
    }
    return {key: spec for key, spec in arrays.items() if spec.width}


def reward_key(task: str) -> str:
    """Return the key of a task's relabelled reward, float32 (T+1,), in an episode: "reward/walker_walk"."""
    return f"reward/{task}"


def reward_task(key: str) -> str | None:
    """Return the task of a relabelled reward's key, None for a recorded array."""
    prefix, _, task = key.partition("/")
    return task if prefix == "reward" and task else None


def dataset_name(key: str) -> str:
    """Return the name in the file of an array of an episode: "steps/physics", "rewards/walker_walk"."""
    task = reward_task(key)
    return f"rewards/{task}" if task else f"steps/{key}"


def episode_bytes(domain: Domain, length: int, *, relabelled: bool) -> int:
    """Return the size of one uncompressed episode of `length` steps, with or without a reward for every task."""
    per_row = sum(spec.width * spec.dtype.itemsize for spec in recorded_arrays(domain).values())
    return (length + 1) * (per_row + (4 * len(domain.tasks) if relabelled else 0))


class Layout:
    """The arrays of one store.

    Attributes:
        domain: the facts about the domain.
        tasks: the tasks whose rewards are stored.
        lengths: steps of each episode, (episodes,) int64.
        starts: first row of each episode and the number of all rows, (episodes + 1,) int64.
        arrays: every array over all rows: those of `recorded_arrays`, and "reward/{task}".

    Raises ValueError for no episodes, or an episode without steps.
    """

    def __init__(self, domain: Domain, tasks: Sequence[str], lengths: Sequence[int] | np.ndarray) -> None:
        self.domain, self.tasks = domain, tuple(tasks)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if len(self.lengths) == 0 or self.lengths.min() < 1:
            raise ValueError(f"a store needs episodes of at least one step, got lengths {lengths}")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths + 1)])
        self.arrays = recorded_arrays(domain) | {reward_key(task): ArraySpec(1, np.dtype("<f4")) for task in self.tasks}

    def shape(self, key: str, rows: int) -> tuple[int, ...]:
        """Return the shape of `rows` rows of an array: the reward of a task has no second axis."""
        return (rows,) if reward_task(key) else (rows, self.arrays[key].width)

    def row_bytes(self, key: str) -> int:
        """Return the size of one row of an array."""
        return self.arrays[key].width * self.arrays[key].dtype.itemsize

    def per_episode(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return the shape and dtype of every dataset that has an entry per episode or per task, by its name."""
        episodes = len(self.lengths)
        return {
            "episodes/offset": ((episodes + 1,), np.dtype("<i8")),
            "episodes/recorded_sha256": ((episodes, DIGEST_BYTES), np.dtype("u1")),
            "episodes/relabelled_sha256": ((episodes, DIGEST_BYTES), np.dtype("u1")),
            **{f"returns/{task}": ((episodes,), np.dtype("<f4")) for task in self.tasks},
            **{f"return_quantiles/{task}": ((len(RETURN_LEVELS),), np.dtype("<f8")) for task in self.tasks},
        }


def episode_digest(episode: Episode, keys: Iterable[str]) -> bytes:
    """Return the sha256 over the bytes of an episode's arrays, in the order of `keys`."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(np.ascontiguousarray(episode[key]).data)
    return digest.digest()


def content_fingerprint(
    domain: str, lengths: Int64[np.ndarray, " episode"], digests: UInt8[np.ndarray, "episode 32"]
) -> str:
    """Return the fingerprint of recorded content: sha256 over the domain, the lengths and every episode's digest.

    Relabelled rewards are left out. They follow from the content, to a precision that depends on the machine.
    """
    fingerprint = hashlib.sha256(json.dumps([domain, lengths.tolist()]).encode())
    fingerprint.update(np.ascontiguousarray(digests).data)
    return fingerprint.hexdigest()
