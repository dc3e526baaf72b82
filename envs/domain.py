"""The domains and their tasks: facts only, so that looking one up imports nothing heavy.

What a domain does (its model, starts, observations and rewards) stands in the file of its name beside this one.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ringrl.errors import UserError


@dataclass(frozen=True)
class Domain:
    """The facts about one ExoRL domain.

    Attributes:
        name: "walker", ...; also the name of the module of `ringrl.envs` that simulates it.
        tasks: full task names, "walker_walk", ...
        observation_size: width of the float32 observation.
        action_size: width of the float32 action, each in [-1, 1].
        physics_size: width of the float64 physics state: positions, velocities, activations of the actuators.
        records_all_tasks: whether archives record the rewards of all tasks at once, one column each, and not of one.
        episode_length: steps per episode; an episode is cut there and never ends earlier.
        control_timestep: seconds between two actions.
    """

    name: str
    tasks: tuple[str, ...]
    observation_size: int
    action_size: int
    physics_size: int
    records_all_tasks: bool
    episode_length: int
    control_timestep: float

    def recorded_tasks(self, task: str) -> tuple[str, ...]:
        """The tasks whose rewards are recorded when `task` is: one per column of an archive's float32 reward."""
        return self.tasks if self.records_all_tasks else (task,)


def _domain(
    name: str,
    tasks: str,
    *,
    observation: int,
    action: int,
    positions: int,
    velocities: int,
    activations: int = 0,
    records_all_tasks: bool = False,
    steps: int,
    seconds: float,
) -> Domain:
    return Domain(
        name=name,
        tasks=tuple(f"{name}_{task}" for task in tasks.split()),
        observation_size=observation,
        action_size=action,
        physics_size=positions + velocities + activations,
        records_all_tasks=records_all_tasks,
        episode_length=steps,
        control_timestep=seconds,
    )


_ALL = (
    _domain(
        "walker", "stand walk run flip",
        observation=24, action=6, positions=9, velocities=9, steps=1000, seconds=0.025,
    ),
    _domain(
        "cheetah", "run run_backward flip flip_backward",
        observation=17, action=6, positions=9, velocities=9, steps=1000, seconds=0.01,
    ),
    _domain(
        "cartpole", "balance balance_sparse swingup swingup_sparse",
        observation=5, action=1, positions=2, velocities=2, steps=1000, seconds=0.01,
    ),
    _domain(
        "jaco", "reach_top_left reach_top_right reach_bottom_left reach_bottom_right",
        observation=42, action=9, positions=9, velocities=9, steps=250, seconds=0.04,
    ),
    _domain(
        "quadruped", "stand walk run jump",
        observation=78, action=12, positions=23, velocities=22, activations=12, steps=1000, seconds=0.02,
    ),
    _domain(
        "point_mass_maze", "reach_top_left reach_top_right reach_bottom_left reach_bottom_right",
        observation=4, action=2, positions=2, velocities=2, records_all_tasks=True, steps=1000, seconds=0.02,
    ),
)  # fmt: skip

DOMAINS: Mapping[str, Domain] = MappingProxyType({domain.name: domain for domain in _ALL})
TASKS: tuple[str, ...] = tuple(task for domain in _ALL for task in domain.tasks)


def domain_named(name: str) -> Domain:
    """The domain of this name.

    Raises:
        UserError: there is none; the message lists those of a similar name.
    """
    if name not in DOMAINS:
        raise UserError(f"unknown domain {name!r}; {_suggestion(name, DOMAINS)}")
    return DOMAINS[name]


def domain_of(task: str) -> Domain:
    """The domain that a task such as "walker_walk" belongs to.

    Raises:
        UserError: no domain has the task; the message lists the tasks of a similar name.
    """
    for domain in DOMAINS.values():
        if task in domain.tasks:
            return domain
    raise UserError(f"unknown task {task!r}; {_suggestion(task, TASKS)}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(name).lower(), known, n=4, cutoff=0.6)
    near += [other for other in known if other.startswith(f"{name}_") and other not in near]
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
