"""Point mass maze: walk from room to room to one of the four goals, by way of the passages at the walls' ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from ringrl.data.collect.recipe import Controller, Recipe

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

# Metres. Passages from the top left room, where every episode starts, to the one on the right and to the one below it;
# the right passage leads on to the last room.
_TOP, _LEFT, _RIGHT = (0.0, 0.24), (-0.24, 0.0), (0.24, 0.0)
# In the order of the tasks: the places to go through, the goal last.
_WAYS = (
    ((-0.15, 0.15),),
    (_TOP, (0.15, 0.15)),
    (_LEFT, (-0.15, -0.15)),
    (_TOP, _RIGHT, (0.15, -0.15)),
)
_CLOSE = 0.03  # metres: so near, a place counts as reached
_GAIN = 40.0  # action per metre


def maze_recipe() -> Recipe:
    """A preference for each goal (the highest wins) and the logarithm of the gain relative to a good one.

    At first every goal is as likely as the others, so that the search has to find out which one the task is about.
    """
    return Recipe(controller=_walk, mean=np.zeros(5), deviation=np.ones(5), noise=(0.8, 0.3))


def _walk(simulation: Simulation, parameters: Float64[np.ndarray, " 5"]) -> Controller:
    data = simulation.data
    ahead = list(np.array(_WAYS[int(np.argmax(parameters[:4]))]))
    gain = _GAIN * np.exp(parameters[4])

    def act(step: int) -> Float64[np.ndarray, " 2"]:
        if len(ahead) > 1 and np.linalg.norm(ahead[0] - data.qpos) < _CLOSE:
            ahead.pop(0)
        return gain * (ahead[0] - data.qpos)

    return act
