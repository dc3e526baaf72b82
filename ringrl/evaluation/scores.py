"""Normalised scores: 100 * (G - G_random) / (G_reference - G_random).

0 is the uniform random policy, 100 the reference. The rule for both constants is the same for every task:

- G_random is measured: the mean return of 100 to 1,000 episodes of actions drawn uniformly from [-1, 1].
- G_reference is the upper bound of the return: reward per step lies in [0, 1], so it is the number of steps of an
  episode. No policy reaches it exactly (an episode starts away from the goal); it is known, never changes, and does not
  depend on whose agent was the best so far. Scores are therefore lower than those taken relative to an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from ringrl.envs import domain_of
from ringrl.errors import UserError

# python benchmarks/random_returns.py walker_... cheetah_...    (5 seeds x 20 episodes: standard error at most 2 %)
# python benchmarks/random_returns.py --episodes 100 --seeds 10 cartpole_... jaco_...   (at most 2 %, jaco 8 %)
# python benchmarks/random_returns.py --episodes 100 --seeds 10 quadruped_... point_mass_maze_...   (at most 5 %, maze
# 11 %: a quadruped may start on its back, and the mass must happen to start near the goal of its own room)
# with dm_control 1.0.50 and MuJoCo 3.17.0
RANDOM_RETURNS: Mapping[str, float] = MappingProxyType(
    {
        "walker_stand": 129.9,
        "walker_walk": 32.7,
        "walker_run": 23.1,
        "walker_flip": 50.3,
        "cheetah_run": 3.8,
        "cheetah_run_backward": 20.3,
        "cheetah_flip": 152.5,
        "cheetah_flip_backward": 148.0,
        "cartpole_balance": 359.0,
        "cartpole_balance_sparse": 49.6,
        "cartpole_swingup": 27.1,
        "cartpole_swingup_sparse": 0.0,
        "jaco_reach_top_left": 11.6,
        "jaco_reach_top_right": 10.6,
        "jaco_reach_bottom_left": 12.3,
        "jaco_reach_bottom_right": 13.1,
        "quadruped_stand": 258.6,
        "quadruped_walk": 128.8,
        "quadruped_run": 129.3,
        "quadruped_jump": 192.9,
        "point_mass_maze_reach_top_left": 22.9,
        "point_mass_maze_reach_top_right": 0.0,
        "point_mass_maze_reach_bottom_left": 0.0,
        "point_mass_maze_reach_bottom_right": 0.0,
    }
)


@dataclass(frozen=True)
class Scale:
    """The two returns that a task's score is measured between."""

    random: float
    reference: float


def scale_of(task: str) -> Scale:
    """The constants of a task.

    Raises:
        UserError: the task is unknown, or its random return has not been measured yet.
    """
    domain = domain_of(task)
    if task not in RANDOM_RETURNS:
        raise UserError(f"{task}: has no normalised score yet; measure it with benchmarks/random_returns.py")
    return Scale(random=RANDOM_RETURNS[task], reference=float(domain.episode_length))


def normalised_score(task: str, returns: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."]:
    """Scores of undiscounted episode returns of a task, elementwise.

    Raises:
        UserError: as `scale_of`.
    """
    scale = scale_of(task)
    return 100 * (np.asarray(returns) - scale.random) / (scale.reference - scale.random)


def score_or_none(task: str, value: float | None) -> float | None:
    """Score of one return; None where there is no return, or the task has no constants."""
    try:
        return None if value is None else float(normalised_score(task, value))
    except UserError:
        return None
