"""All domains and tasks by name, and their Gymnasium ids. A new domain is a file like `walker.py` and an entry here."""

import difflib
from collections.abc import Iterable, Mapping

import gymnasium

from ringrl.envs.cartpole import CartpoleSimulation
from ringrl.envs.cheetah import CheetahSimulation
from ringrl.envs.domain import Domain
from ringrl.envs.foreign import foreign_domain, is_foreign
from ringrl.envs.jaco import JacoSimulation
from ringrl.envs.point_mass_maze import PointMassMazeSimulation
from ringrl.envs.quadruped import QuadrupedSimulation
from ringrl.envs.simulation import Simulation
from ringrl.envs.walker import WalkerSimulation
from ringrl.errors import UserError

_SIMULATIONS: tuple[type[Simulation], ...] = (
    WalkerSimulation, CheetahSimulation, CartpoleSimulation, JacoSimulation, QuadrupedSimulation,
    PointMassMazeSimulation,
)  # fmt: skip

DOMAINS: Mapping[str, Domain] = {one.domain.name: one.domain for one in _SIMULATIONS}
TASKS: tuple[str, ...] = tuple(task for domain in DOMAINS.values() for task in domain.tasks)


def domain_named(name: str) -> Domain:
    """Return the ExoRL domain of this name. UserError for an unknown name, which lists similar names."""
    if name not in DOMAINS:
        raise UserError(f"unknown domain {name!r}; {_suggestion(name, DOMAINS)}")
    return DOMAINS[name]


def domain_of(task: str) -> Domain:
    """Return the domain of a task such as "walker_walk" or "gymnasium:Hopper-v5". UserError for an unknown task."""
    if is_foreign(task):
        return foreign_domain(task)
    for domain in DOMAINS.values():
        if domain.has_task(task):
            return domain
    raise UserError(f"unknown task {task!r}; {_suggestion(task, TASKS)}")


def load_simulation(task: str) -> Simulation:
    """Compile the model of an ExoRL task, in about 0.1 s. The first call imports MuJoCo. UserError for other tasks."""
    if is_foreign(task):
        raise UserError(f"{task}: is simulated by another package; record it with Minari's DataCollector")
    domain = domain_of(task)
    (simulation,) = (one for one in _SIMULATIONS if one.domain is domain)
    return simulation(task)


def register_gymnasium() -> None:
    """Register every task as `ringrl/<task>-v0`; a second call changes nothing."""
    for domain in DOMAINS.values():
        for task in domain.tasks:
            name = f"ringrl/{task}-v0"
            if name not in gymnasium.registry:
                gymnasium.register(
                    name,
                    entry_point="ringrl.envs.environment:ExoRLEnv",
                    max_episode_steps=domain.episode_length,
                    kwargs={"task": task},
                )


def _suggestion(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(name).lower(), known, n=4, cutoff=0.6)
    near += [other for other in known if other.startswith(f"{name}_") and other not in near]
    return f"did you mean {', '.join(near)}?" if near else f"known names: {', '.join(known)}"
