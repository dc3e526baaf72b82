"""The ExoRL environments: dm_control tasks behind one Gymnasium interface.

`import ringrl.envs` is light: neither dm_control, MuJoCo nor OpenGL is imported before the first environment is made.
"""

from ringrl.envs.compatibility import check_mujoco
from ringrl.envs.domain import DOMAINS, TASKS, Domain, domain_named, domain_of
from ringrl.envs.environment import ExoRLEnv, goal_space, make
from ringrl.envs.goals import GoalSpace
from ringrl.envs.registration import register_gymnasium
from ringrl.envs.vector import ExoRLVectorEnv, make_vec

__all__ = [
    "DOMAINS",
    "TASKS",
    "Domain",
    "ExoRLEnv",
    "ExoRLVectorEnv",
    "GoalSpace",
    "domain_named",
    "domain_of",
    "goal_space",
    "make",
    "make_vec",
    "register_gymnasium",
]

check_mujoco()
register_gymnasium()
