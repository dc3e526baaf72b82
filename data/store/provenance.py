"""The origin of a store: its provenance, and the facts about a domain that no task of this project simulates."""

import dataclasses
import json
import math
import os
import re
import time
from importlib.metadata import version
from typing import Literal, Self, get_args

from ringrl import __version__
from ringrl.envs import DOMAINS, Domain
from ringrl.errors import UserError

Relabelling = Literal["control_aware", "exorl_compat"]
"""How rewards are computed: with the action that led to the state, or with a control of zero, as ExoRL's code does."""

Rewards = Relabelling | Literal["recorded"]
"""How a store got its rewards. Episodes from other sources keep the recorded ones."""

REWARDS: tuple[Rewards, ...] = (*get_args(Relabelling), "recorded")
NAMED_SKIPPED = 5  # a store names this many skipped episodes and counts the others
LONGEST_NAME = 200
LARGEST_ROW = 2**20  # numbers in an observation, an action or a physics state
UNKNOWN = 0  # placeholder for facts that only a simulation has


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of the episodes of a store and how they were processed.

    Attributes:
        source: the end of the archive's path, "walker/rnd.zip".
        source_bytes: size of the zip file, or of all episode files of a folder.
        source_sha256: sha256 over the archive's list of episodes: path, size and, in a zip file, CRC of each.
        relabelling: see `Rewards`.
        subset: description of the imported episodes, "10 of 240 episodes, the first ones".
        num_skipped: number of damaged episodes that were left out.
        skipped: the first few of them, each with the reason.
        created: day of the import (UTC), "2026-11-21"; the variable SOURCE_DATE_EPOCH sets another.
        created_by: versions of the software, "ringrl 0.1.0, mujoco 3.17.0".
    """

    source: str
    source_bytes: int = 0
    source_sha256: str = ""
    relabelling: Rewards = "control_aware"
    subset: str = "all episodes"
    num_skipped: int = 0
    skipped: tuple[str, ...] = ()
    created: str = dataclasses.field(default_factory=lambda: _today())
    created_by: str = dataclasses.field(default_factory=lambda: software_versions())

    def to_json(self) -> str:
        """Return one line of ASCII."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the output of `to_json`. ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        if not isinstance(values["skipped"], list) or not all(isinstance(reason, str) for reason in values["skipped"]):
            raise ValueError("skipped is not a list of strings")
        values["skipped"] = tuple(values["skipped"])
        provenance = cls(**values)
        if len(values) != len(dataclasses.fields(cls)) or min(provenance.num_skipped, provenance.source_bytes) < 0:
            raise ValueError("incomplete provenance")
        for field in dataclasses.fields(cls):
            default = field.default if field.default is not dataclasses.MISSING else ""
            if type(getattr(provenance, field.name)) is not type(default):
                raise ValueError(f"{field.name} is not a {type(default).__name__}")
        if provenance.relabelling not in REWARDS:
            raise ValueError(f"unknown relabelling {provenance.relabelling}")
        return provenance


def software_versions() -> str:
    """Return the versions of the software that determines the content of a store."""
    return f"ringrl {__version__}, mujoco {version('mujoco')}"


def _today() -> str:
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(int(given) if given else None))
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(f"SOURCE_DATE_EPOCH: {given} is not a number of seconds since 1970; unset it") from error


@dataclasses.dataclass(frozen=True)
class ForeignDomain(Domain):
    """The facts about a dataset from another source. Its one task has the recorded rewards.

    Actions of the store are scaled to [-1, 1]. The environment takes low + (action + 1) / 2 * (high - low).

    Attributes:
        action_low: the lowest action that the environment takes, one number per component.
        action_high: the highest.
        num_terminated: number of episodes that terminated; the others were truncated.
    """

    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    num_terminated: int

    @classmethod
    def of(
        cls,
        name: str,
        *,
        observation_size: int,
        physics_size: int,
        action_low: tuple[float, ...],
        action_high: tuple[float, ...],
        episode_length: int,
        num_terminated: int,
    ) -> Self:
        """Return the domain of the dataset `name` with episodes of up to `episode_length` steps.

        Raises:
            ValueError: impossible facts.
        """
        if not re.fullmatch(rf"[A-Za-z0-9_-][A-Za-z0-9_/-]{{0,{LONGEST_NAME - 1}}}", name) or name in DOMAINS:
            raise ValueError(f"{name!r} cannot name a dataset from another source")
        if not 1 <= observation_size <= LARGEST_ROW or not 0 <= physics_size <= LARGEST_ROW:
            raise ValueError(f"observations of {observation_size} numbers, physics of {physics_size}")
        if not 1 <= len(action_low) == len(action_high) <= LARGEST_ROW:
            raise ValueError(f"{len(action_low)} lowest and {len(action_high)} highest actions")
        for low, high in zip(action_low, action_high, strict=True):
            if not (low < high and math.isfinite(high - low)):
                raise ValueError(f"actions from {low} to {high}")
        if episode_length < 1 or num_terminated < 0:
            raise ValueError(f"{num_terminated} terminated episodes of {episode_length} steps")
        return cls(
            name=name,
            tasks=(name.replace("/", "_"),),
            observation_size=observation_size,
            action_size=len(action_low),
            physics_size=physics_size,
            records_all_tasks=False,
            episode_length=episode_length,
            control_timestep=UNKNOWN,
            action_low=action_low,
            action_high=action_high,
            num_terminated=num_terminated,
        )

    def to_json(self) -> str:
        """Return one line of ASCII."""
        return json.dumps({name: getattr(self, name) for name in _FACTS})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the output of `to_json`. ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        for key, kind in _FACTS.items():
            if type(values[key]) is not kind:
                raise ValueError(f"{key} is not a {kind.__name__}")
        for key in ("action_low", "action_high"):
            if not all(type(number) is float for number in values[key]):
                raise ValueError(f"{key} is not a list of numbers")
            values[key] = tuple(values[key])
        return cls.of(**values)

    def describe_actions(self) -> str:
        """Return how actions were scaled: "scaled to [-1, 1] from [-2, 2]", with the first few different bounds."""
        bounds = list(
            dict.fromkeys(f"[{low:g}, {high:g}]" for low, high in zip(self.action_low, self.action_high, strict=True))
        )
        if bounds == ["[-1, 1]"]:
            return "as recorded, in [-1, 1]"
        return f"scaled to [-1, 1] from {', '.join(bounds[:4])}" + (", ..." if len(bounds) > 4 else "")


_FACTS = {
    "name": str,
    "observation_size": int,
    "physics_size": int,
    "action_low": list,
    "action_high": list,
    "episode_length": int,
    "num_terminated": int,
}
