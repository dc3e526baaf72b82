"""The facts about a domain. Nothing here imports MuJoCo."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Float, Float64


@dataclass(frozen=True)
class Camera:
    """The camera of a domain's videos."""

    center: tuple[float, float, float]  # the point that the camera looks at, metres
    distance: float  # from the camera to this point, metres
    azimuth: float = 90.0  # direction of view, degrees; 90 looks along y, with x to the right
    elevation: float = -10.0  # degrees; -90 looks down
    follows: int = 0  # horizontal coordinates of `center` that are replaced by the body's centre of mass


@dataclass(frozen=True)
class Domain:
    """The facts about one ExoRL domain."""

    name: str  # "walker"
    tasks: tuple[str, ...]  # full names, "walker_walk"
    observation_size: int  # width of the float32 observation
    action_size: int  # width of the float32 action, each component in [-1, 1]
    physics_size: int  # width of the float64 physics state: positions, velocities, activations of the actuators
    episode_length: int  # steps; ExoRL's episodes are truncated there and never terminate
    control_timestep: float  # seconds between two actions
    # Whether archives record the rewards of all tasks, one column each, instead of one task's.
    records_all_tasks: bool = field(default=False, kw_only=True)
    # Full task name -> mean return of uniform random actions (benchmarks/random_returns.py, dm_control 1.0.50,
    # MuJoCo 3.17.0). Normalised scores are 0 there.
    random_returns: Mapping[str, float] = field(default_factory=dict, kw_only=True, hash=False)
    # Returns None for a name that is no task. For tasks with numbers in their names, which `tasks` lacks.
    has_more: Callable[[str], object] | None = field(default=None, kw_only=True)
    camera: Camera | None = field(default=None, kw_only=True)
    # Quantity -> width, in the order of the observation.
    observation: Mapping[str, int] = field(default_factory=dict, kw_only=True, hash=False)
    # Full task name -> the reward of a step in one or two sentences.
    rewards: Mapping[str, str] = field(default_factory=dict, kw_only=True, hash=False)

    @property
    def reference_return(self) -> float:
        """Return the upper bound of an episode's return, where normalised scores are 100: 1 per step."""
        return float(self.episode_length)

    def has_task(self, name: str) -> bool:
        """Return whether the domain has this task. Raises UserError for a goal that cannot be reached."""
        return name in self.tasks or (self.has_more is not None and self.has_more(name) is not None)

    def spaces(self) -> tuple[Box, Box]:
        """Return the spaces of an environment's float32 observations and of its actions in [-1, 1]."""
        observations = Box(-np.inf, np.inf, (self.observation_size,), np.float32)
        return observations, Box(-1.0, 1.0, (self.action_size,), np.float32)

    def recorded_tasks(self, task: str) -> tuple[str, ...]:
        """Return the tasks whose rewards an archive of `task` records, one per column of its float32 reward."""
        return self.tasks if self.records_all_tasks else (task,)


class Actions(NamedTuple):
    """The actions of an environment: lowest and highest, or first and last choice for each of the choices."""

    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    is_discrete: bool = False


@dataclass(frozen=True)
class ForeignDomain(Domain):
    """The facts about an environment of another package, or about a dataset from another source.

    RingRL scales actions to [-1, 1]. If actions are choices, data has 1 for the choice and 0 for the `action_size` - 1
    others, and the environment takes the choice with the largest number.
    """

    action_low: tuple[float, ...] = field(kw_only=True)  # the lowest action that the environment takes, or first choice
    action_high: tuple[float, ...] = field(kw_only=True)
    is_discrete: bool = field(default=False, kw_only=True)  # whether actions are choices

    @property
    def actions(self) -> Actions:
        """The actions that the environment takes."""
        return Actions(self.action_low, self.action_high, self.is_discrete)

    def taken(self, action: Float[np.ndarray, "*batch action"]) -> Float64[np.ndarray, "*batch action"]:
        """Return actions in [-1, 1] as the environment takes them."""
        low, high = np.array(self.action_low), np.array(self.action_high)
        return (high + low) / 2 + action * ((high - low) / 2)

    def scaled(self, action: Float[np.ndarray, "*batch action"]) -> Float64[np.ndarray, "*batch action"]:
        """Return actions as the environment takes them, scaled to [-1, 1]."""
        low, high = np.array(self.action_low), np.array(self.action_high)
        return (action - (high + low) / 2) / ((high - low) / 2)
