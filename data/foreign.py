"""Domains that nothing here simulates: a store of such episodes carries the facts that a table holds for ExoRL's."""

import dataclasses
import json
import math
import re
from typing import Self

from ringrl.envs import DOMAINS, Domain

LONGEST_NAME = 200
LARGEST_ROW = 2**20  # numbers in an observation, an action or a physics state
UNKNOWN = 0  # stands in what only a simulation would tell


@dataclasses.dataclass(frozen=True)
class ForeignDomain(Domain):
    """The facts about a dataset from elsewhere; it has one task, whose rewards are those recorded.

    Actions of the store lie in [-1, 1]; the environment takes low + (action + 1) / 2 * (high - low).

    Attributes:
        action_low: the lowest action that the environment takes, one number per component.
        action_high: the highest.
        num_terminated: episodes that ended by themselves; the others were cut.
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
        """The domain of the dataset `name` with episodes of up to `episode_length` steps.

        Raises:
            ValueError: facts that cannot be.
        """
        if not re.fullmatch(rf"[A-Za-z0-9_-][A-Za-z0-9_/-]{{0,{LONGEST_NAME - 1}}}", name) or name in DOMAINS:
            raise ValueError(f"{name!r} cannot name a dataset from elsewhere")
        if not 1 <= observation_size <= LARGEST_ROW or not 0 <= physics_size <= LARGEST_ROW:
            raise ValueError(f"observations of {observation_size} numbers, physics of {physics_size}")
        if not 1 <= len(action_low) == len(action_high) <= LARGEST_ROW:
            raise ValueError(f"{len(action_low)} lowest and {len(action_high)} highest actions")
        for low, high in zip(action_low, action_high, strict=True):
            if not (low < high and math.isfinite(high - low)):
                raise ValueError(f"actions from {low} to {high}")
        if episode_length < 1 or num_terminated < 0:
            raise ValueError(f"{num_terminated} episodes of {episode_length} steps that ended by themselves")
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
        """One line of ASCII."""
        return json.dumps(
            {
                "name": self.name,
                "observation_size": self.observation_size,
                "physics_size": self.physics_size,
                "action_low": self.action_low,
                "action_high": self.action_high,
                "episode_length": self.episode_length,
                "num_terminated": self.num_terminated,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote; ValueError, KeyError or TypeError if it is anything else."""
        values = json.loads(text)
        types = {
            "name": str,
            "observation_size": int,
            "physics_size": int,
            "episode_length": int,
            "num_terminated": int,
        }
        for key, kind in types.items():
            if type(values[key]) is not kind:
                raise ValueError(f"{key} is no {kind.__name__}")
        for key in ("action_low", "action_high"):
            if not isinstance(values[key], list) or not all(type(number) is float for number in values[key]):
                raise ValueError(f"{key} is no list of numbers")
            values[key] = tuple(values[key])
        return cls.of(**values)

    def describe_actions(self) -> str:
        """How actions were scaled: "scaled to [-1, 1] from [-2, 2]"; bounds that differ are told for the first few."""
        bounds = dict.fromkeys(
            f"[{low:g}, {high:g}]" for low, high in zip(self.action_low, self.action_high, strict=True)
        )
        if list(bounds) == ["[-1, 1]"]:
            return "as recorded, in [-1, 1]"
        told = ", ".join(list(bounds)[:4]) + (", ..." if len(bounds) > 4 else "")
        return f"scaled to [-1, 1] from {told}"
