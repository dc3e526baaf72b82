"""The ExoRL environments: dm_control tasks with a Gymnasium interface.

`import ringrl.envs` imports neither dm_control's physics nor MuJoCo nor OpenGL; the first environment does.
"""

from ringrl.envs.domain import Actions, Camera, Domain, ForeignDomain
from ringrl.envs.environment import ExoRLEnv, make
from ringrl.envs.foreign import (
    ForeignEnv,
    actions_of,
    d4rl_returns,
    foreign_domain,
    foreign_spec,
    foreign_task,
    import_environments,
    is_foreign,
    native_actions,
    parse_foreign,
)
from ringrl.envs.registry import DOMAINS, TASKS, domain_named, domain_of, load_simulation, register_gymnasium
from ringrl.envs.simulation import Simulation, check_mujoco
from ringrl.envs.vector import STEP_TIMEOUT, ExoRLVectorEnv, ForeignVectorEnv, make_vec

__all__ = [
    "DOMAINS", "STEP_TIMEOUT", "TASKS", "Actions", "Camera", "Domain", "ExoRLEnv", "ExoRLVectorEnv", "ForeignDomain",
    "ForeignEnv", "ForeignVectorEnv", "Simulation", "actions_of", "d4rl_returns",
    "domain_named", "domain_of", "foreign_domain", "foreign_spec", "foreign_task", "import_environments",
    "is_foreign", "load_simulation", "make", "make_vec", "native_actions", "parse_foreign", "register_gymnasium",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


check_mujoco()
register_gymnasium()
