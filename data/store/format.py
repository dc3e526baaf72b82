"""The format of an episode store: arrays, their names in the HDF5 file, checksums, and provenance.

    /steps/{observation,action,reward,discount,physics}   (rows, width)   as recorded, all episodes end to end
    /rewards/{task}                                       (rows,) float32  relabelled, row 0 of every episode is 0
    /returns/{task}                                       (episodes,) float32
    /episodes/offset                                      (episodes + 1,) int64; episode i is rows offset[i]:offset[i+1]
    /episodes/recorded_sha256                             (episodes, 32) uint8 over the recorded arrays of an episode
    /episodes/relabelled_sha256                           (episodes, 32) uint8 over the rewards of an episode

Every dataset is contiguous and uncompressed. Episodes from other sources may have no physics. The attributes of the
file contain the domain, the tasks, the provenance and the fingerprint.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import pydantic
from jaxtyping import Int64, UInt8
from pydantic import Field

from ringrl import __version__
from ringrl.envs import DOMAINS, Domain, ForeignDomain, is_foreign, parse_foreign
from ringrl.errors import UserError

FORMAT = "ringrl episode store"
FORMAT_VERSION = 2
DIGEST_BYTES = hashlib.sha256().digest_size
LONGEST_TEXT = 2**16  # characters of an attribute
ROUNDED = 1e-5  # rounding may move an action out of [-1, 1] by this much

Rewards = Literal["control_aware", "recorded"]
"""Origin of a store's rewards: computed with the action that led to each state, or recorded (other sources)."""

LARGEST_ROW = 2**20  # numbers in an observation, an action or a physics state
UNKNOWN = 0  # placeholder for facts that only a simulation has

Episode = Mapping[str, np.ndarray]
"""Arrays of T+1 rows under the names of `recorded_arrays`; row t is (s_t, a_{t-1}, r_{t-1}), row 0 the reset."""


class ArraySpec(NamedTuple):
    """The width (numbers per row) and the dtype of one array of an episode."""

    width: int
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return self.width * self.dtype.itemsize


def recorded_arrays(domain: Domain) -> dict[str, ArraySpec]:
    """Return the recorded arrays of a domain's episodes, in the order in which they are stored and hashed."""
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
    per_row = sum(spec.row_bytes for spec in recorded_arrays(domain).values())
    return (length + 1) * (per_row + (4 * len(domain.tasks) if relabelled else 0))


class Record(NamedTuple):
    """The digests of an episode, and its return for every task of the store."""

    recorded: bytes
    relabelled: bytes
    returns: tuple[float, ...]


class Layout:
    """The arrays of one store. Raises ValueError for no episodes, or an episode without steps."""

    domain: Domain
    tasks: tuple[str, ...]  # tasks with stored rewards
    lengths: Int64[np.ndarray, " episode"]  # steps of each episode
    starts: Int64[np.ndarray, " episode_plus_1"]  # first row of each episode and the number of all rows
    arrays: dict[str, ArraySpec]  # arrays over all rows: `recorded_arrays` and "reward/{task}"

    def __init__(self, domain: Domain, tasks: Sequence[str], lengths: Sequence[int] | np.ndarray) -> None:
        self.domain, self.tasks = domain, tuple(tasks)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if len(self.lengths) == 0 or self.lengths.min() < 1:
            raise ValueError(f"a store needs episodes of at least one step, got lengths {lengths}")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths + 1)])
        self.arrays = recorded_arrays(domain) | {reward_key(task): ArraySpec(1, np.dtype("<f4")) for task in self.tasks}

    def shape(self, key: str, rows: int) -> tuple[int, ...]:
        """Return the shape of `rows` rows of an array. The reward of a task has no second axis."""
        return (rows,) if reward_task(key) else (rows, self.arrays[key].width)

    def per_episode(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return the shape and dtype of every dataset that has an entry per episode, by its name."""
        episodes = len(self.lengths)
        return {
            "episodes/offset": ((episodes + 1,), np.dtype("<i8")),
            "episodes/recorded_sha256": ((episodes, DIGEST_BYTES), np.dtype("u1")),
            "episodes/relabelled_sha256": ((episodes, DIGEST_BYTES), np.dtype("u1")),
            **{f"returns/{task}": ((episodes,), np.dtype("<f4")) for task in self.tasks},
        }

    def record(self, episode: Episode) -> Record:
        """Return the sha256 over the bytes of an episode's recorded and relabelled arrays, and its returns."""
        recorded, relabelled = hashlib.sha256(), hashlib.sha256()
        for key in self.arrays:
            (relabelled if reward_task(key) else recorded).update(np.ascontiguousarray(episode[key]).data)
        returns = (float(episode[reward_key(task)].sum(dtype=np.float64)) for task in self.tasks)
        return Record(recorded.digest(), relabelled.digest(), tuple(returns))


def content_fingerprint(
    domain: str, lengths: Int64[np.ndarray, " episode"], digests: UInt8[np.ndarray, "episode 32"]
) -> str:
    """Return the sha256 over domain, lengths and recorded arrays. Relabelled rewards are left out: they may vary."""
    fingerprint = hashlib.sha256(json.dumps([domain, lengths.tolist()]).encode())
    fingerprint.update(np.ascontiguousarray(digests).data)
    return fingerprint.hexdigest()


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of the episodes of a store and how they were processed."""

    source: str  # the end of the archive's path, "walker/rnd.zip"
    source_bytes: pydantic.NonNegativeInt = 0  # size of the zip file, or of all episode files of a folder
    source_sha256: str = ""  # over the archive's list of episodes: path, size and, in a zip file, CRC of each
    relabelling: Rewards = "control_aware"
    subset: str = "all episodes"  # "10 of 240 episodes, the first ones"
    created: str = dataclasses.field(default_factory=lambda: _today())  # day of the import (UTC), "2026-11-21"
    created_by: str = dataclasses.field(default_factory=lambda: f"ringrl {__version__}, mujoco {version('mujoco')}")

    def to_json(self) -> str:
        """Return one line of ASCII."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the output of `to_json`. ValueError or TypeError for anything else."""
        if missing := {field.name for field in dataclasses.fields(cls)} - {*json.loads(text)}:
            raise ValueError(f"a provenance without {', '.join(missing)}")
        return pydantic.TypeAdapter(cls).validate_json(text, strict=True)


def _today() -> str:
    """Return the date of today, or of the variable SOURCE_DATE_EPOCH."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(int(given) if given else None))
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(f"SOURCE_DATE_EPOCH: {given} is not a number of seconds since 1970; unset it") from error


class ForeignFacts(pydantic.BaseModel, frozen=True, strict=True, extra="forbid"):
    """The stored facts about a dataset from another source."""

    name: str
    observation_size: Annotated[int, Field(ge=1, le=LARGEST_ROW)]
    physics_size: Annotated[int, Field(ge=0, le=LARGEST_ROW)]
    action_low: Annotated[tuple[float, ...], Field(min_length=1, max_length=LARGEST_ROW)]
    action_high: tuple[float, ...]
    is_discrete: bool = False
    episode_length: Annotated[int, Field(ge=1)]  # of the longest episode
    num_terminated: Annotated[int, Field(ge=0)]
    reference_returns: tuple[float, float] | None = None
    observation: dict[str, int] = {}
    minari: dict[str, str] = {}

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if is_foreign(self.name):
            parse_foreign(self.name)
        elif not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_/-]{0,199}", self.name) or self.name in DOMAINS:
            raise ValueError(f"{self.name!r} cannot name a dataset from another source; rename it")
        for low, high in zip(self.action_low, self.action_high, strict=True):
            if not ((low < high or self.is_discrete) and math.isfinite(high - low)):
                raise ValueError(f"actions from {low} to {high}")
        if self.reference_returns and not 0 < self.reference_returns[1] - self.reference_returns[0] < math.inf:
            raise ValueError(
                "reference returns {:g} and {:g}; give the lower one first".format(*self.reference_returns)
            )
        return self


@dataclasses.dataclass(frozen=True)
class StoredDomain(ForeignDomain):
    """The facts about a dataset from another source. The only task has the recorded rewards."""

    num_terminated: int = dataclasses.field(kw_only=True)  # episodes; the others were truncated
    reference_returns: tuple[float, float] | None = None  # mean returns of random actions and of an expert, if known
    # Texts of Minari's metadata, which an export repeats: observation_space, action_space and env_spec.
    minari: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, facts: ForeignFacts) -> Self:
        """Return the domain of a dataset."""
        return cls(
            tasks=(facts.name if is_foreign(facts.name) else facts.name.replace("/", "_"),),
            action_size=len(facts.action_low),
            control_timestep=UNKNOWN,
            **facts.model_dump(),
        )

    def to_json(self) -> str:
        """Return one line of ASCII."""
        return json.dumps({name: getattr(self, name) for name in ForeignFacts.model_fields})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the output of `to_json`. ValueError for anything else."""
        try:
            return cls.of(ForeignFacts.model_validate_json(text))
        except UserError as error:
            raise ValueError(str(error)) from error
