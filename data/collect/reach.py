"""Jaco: reach for one of the four targets through the damped inverse of the hand's Jacobian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from ringrl.data.collect.recipe import Controller, Recipe

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

_ARM = 6  # joints and actuators of the arm; three of the fingers follow
_DAMPING = 0.1  # metres per radian: near a singularity the arm slows down instead of jerking
_PINCH_SITE = "jaco_arm/jaco_hand/pinchsite"
# The four targets are mirror images of each other; the task's own comes first.
_MIRRORS = np.array([(1, 1, 1), (-1, 1, 1), (1, -1, 1), (-1, -1, 1)])


def reach_recipe() -> Recipe:
    """A preference for each target (the highest wins), the logarithm of the gain (1/s) and the fingers' action.

    At first every target is as likely as the others, so that the search has to find out which one the task is about.
    """
    return Recipe(
        controller=_reach,
        mean=np.zeros(6),
        deviation=np.array((1.0, 1.0, 1.0, 1.0, 1.0, 0.3)),
        noise=(1.0, 0.5),
    )


def _reach(simulation: Simulation, parameters: Float64[np.ndarray, " 6"]) -> Controller:
    """Wampler 1986, "Manipulator inverse kinematic solutions based on vector formulations and damped least-squares"."""
    import mujoco  # only when an episode is recorded, so that importing the recipes stays light

    model, data = simulation.model, simulation.data
    site = model.site(_PINCH_SITE).id
    target = model.site("target_site").pos * _MIRRORS[np.argmax(parameters[:4])]
    gain = np.exp(parameters[4])
    fastest = model.actuator_ctrlrange[:_ARM, 1]  # radians per second: the arm's actuators are velocity servos
    jacobian = np.empty((3, model.nv))
    action = np.full(model.nu, parameters[5])

    def act(step: int) -> Float64[np.ndarray, " 9"]:
        mujoco.mj_jacSite(model, data, jacobian, None, site)
        arm = jacobian[:, :_ARM]
        wanted = gain * (target - data.site_xpos[site])
        velocities = arm.T @ np.linalg.solve(arm @ arm.T + _DAMPING**2 * np.eye(3), wanted)
        action[:_ARM] = velocities / fastest
        return action

    return act
