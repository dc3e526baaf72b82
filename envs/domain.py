"""The facts about a domain. Nothing here imports MuJoCo."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64


@dataclass(frozen=True)
class Camera:
    """The camera of a domain's videos.

    Attributes:
        center: point that the camera looks at, metres.
        distance: from the camera to this point, metres.
        azimuth: direction of view, degrees; 90 looks along y, with x to the right.
        elevation: of the direction of view, degrees; -90 looks down.
        follows: number of horizontal coordinates of `center` that are replaced by the body's centre of mass.
    """

    center: tuple[float, float, float]
    distance: float
    azimuth: float = 90.0
    elevation: float = -10.0
    follows: int = 0


@dataclass(frozen=True)
class Domain:
    """The facts about one ExoRL domain.

    Attributes:
        name: "walker", ...
        tasks: full task names, "walker_walk", ...
        observation_size: width of the float32 observation.
        action_size: width of the float32 action, each component in [-1, 1].
        physics_size: width of the float64 physics state: positions, velocities, activations of the actuators.
        episode_length: steps per episode; episodes are truncated there and never terminate.
        control_timestep: seconds between two actions.
        records_all_tasks: whether archives record the rewards of all tasks, one column each, instead of one task's.
        random_returns: full task name -> mean return of uniform random actions, by benchmarks/random_returns.py with
            dm_control 1.0.50 and MuJoCo 3.17.0. Normalised scores are 0 there.
        has_more: returns whether a name that is not in `tasks` is a task, too, such as a task with numbers in its name.
        camera: the camera of videos.
        observation: quantity -> width, in the order of the observation.
        rewards: full task name -> the reward of a step in one or two sentences.
    """

    name: str
    tasks: tuple[str, ...]
    observation_size: int
    action_size: int
    physics_size: int
    episode_length: int
    control_timestep: float
    records_all_tasks: bool = field(default=False, kw_only=True)
    random_returns: Mapping[str, float] = field(default_factory=dict, kw_only=True, hash=False)
    has_more: Callable[[str], bool] | None = field(default=None, kw_only=True)
    camera: Camera | None = field(default=None, kw_only=True)
    observation: Mapping[str, int] = field(default_factory=dict, kw_only=True, hash=False)
    rewards: Mapping[str, str] = field(default_factory=dict, kw_only=True, hash=False)

    @property
    def reference_return(self) -> float:
        """Return the upper bound of an episode's return, where normalised scores are 100: 1 per step."""
        return float(self.episode_length)

    def has_task(self, name: str) -> bool:
        """Return whether the domain has this task. Raises UserError for a goal that cannot be reached."""
        return name in self.tasks or (self.has_more is not None and self.has_more(name))

    def recorded_tasks(self, task: str) -> tuple[str, ...]:
        """Return the tasks whose rewards an archive of `task` records, one per column of its float32 reward."""
        return self.tasks if self.records_all_tasks else (task,)


@dataclass(frozen=True)
class ForeignDomain(Domain):
    """The facts about an environment of another package, or about a dataset from another source.

    Attributes:
        action_low: the lowest action that the environment takes. RingRL scales actions to [-1, 1]. The environment
            takes low + (action + 1) / 2 * (high - low).
        action_high: the highest action.
        is_discrete: whether an action is one of `action_size` choices. Data has 1 for the choice and 0 for the others,
            and the environment takes the choice with the largest number. The bounds are the first and last choice.
    """

    action_low: tuple[float, ...] = field(kw_only=True)
    action_high: tuple[float, ...] = field(kw_only=True)
    is_discrete: bool = field(default=False, kw_only=True)

    def taken(self, action: Float[np.ndarray, "*batch action"]) -> Float64[np.ndarray, "*batch action"]:
        """Return actions in [-1, 1] as the environment takes them."""
        low, high = np.array(self.action_low), np.array(self.action_high)
        return (high + low) / 2 + action * ((high - low) / 2)

    def scaled(self, action: Float[np.ndarray, "*batch action"]) -> Float64[np.ndarray, "*batch action"]:
        """Return actions as the environment takes them, scaled to [-1, 1]."""
        low, high = np.array(self.action_low), np.array(self.action_high)
        return (action - (high + low) / 2) / ((high - low) / 2)
