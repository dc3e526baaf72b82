"""What an ExoRL episode consists of: one table that the archive reader, the store and the importer share."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ringrl.envs import Domain

Episode = Mapping[str, np.ndarray]
"""Arrays of T+1 rows under the names of `recorded_columns`; row t is (s_t, a_{t-1}, r_{t-1}), row 0 the reset."""

ROUNDED = 1e-5  # by which rounding may bring an action out of [-1, 1]


class Column(NamedTuple):
    """The width (numbers per row) and the dtype of one array of an episode."""

    width: int
    dtype: np.dtype


def recorded_columns(domain: Domain) -> dict[str, Column]:
    """The arrays recorded in every episode of a domain, in the order in which they are stored and hashed.

    Physics is among them where the domain has any: datasets from elsewhere may have none.
    """
    float32, float64 = np.dtype("<f4"), np.dtype("<f8")
    columns = {
        "observation": Column(domain.observation_size, float32),
        "action": Column(domain.action_size, float32),
        "reward": Column(len(domain.recorded_tasks(domain.tasks[0])), float32),
        "discount": Column(1, float32),
        "physics": Column(domain.physics_size, float64),
    }
    return {key: column for key, column in columns.items() if column.width}


def reward_key(task: str) -> str:
    """The key of a task's relabelled reward, float32 (T+1,), in an episode: "reward/walker_walk"."""
    return f"reward/{task}"


def reward_task(key: str) -> str | None:
    """The task of a relabelled reward's key, None for a recorded array."""
    prefix, _, task = key.partition("/")
    return task if prefix == "reward" and task else None


def episode_bytes(domain: Domain, length: int, *, relabelled: bool) -> int:
    """Bytes of one uncompressed episode of `length` steps, with or without a reward for every task of the domain."""
    per_row = sum(column.width * column.dtype.itemsize for column in recorded_columns(domain).values())
    return (length + 1) * (per_row + (4 * len(domain.tasks) if relabelled else 0))


def episode_file_name(number: int, length: int) -> str:
    """The name of an episode's file in an ExoRL buffer: episode_000012_1000.npz."""
    return f"episode_{number:06d}_{length}.npz"


def parse_episode_file_name(name: str) -> tuple[int, int] | None:
    """(number, length) of an episode's file name, None for any other name."""
    match = re.fullmatch(r"episode_([0-9]{1,12})_([0-9]{1,9})\.npz", name)
    return (int(match[1]), int(match[2])) if match else None
