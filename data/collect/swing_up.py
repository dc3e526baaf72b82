"""Cartpole: swing the pole up by its energy, then balance it by linear feedback."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from ringrl.data.collect.recipe import Controller, Recipe

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

_POLE = 2  # world, cart, pole
_GRAVITY = 9.81

# Gains of a swing-up that reaches the ceiling: energy, the cart's position and velocity.
_SWING = np.array((1.0, 0.3, 0.3))
# And of the linear-quadratic regulator for the upright pole (state cost 1, 1, .1, .1, control cost 1): the pole's angle
# and velocity, the cart's position and velocity.
_BALANCE = np.array((6.7, 1.8, 1.0, 1.1))
_UPRIGHT_COSINE = 0.8  # from here on the pole is balanced


def swing_up_recipe() -> Recipe:
    """The logarithms of the seven gains, relative to good ones, and a shift of the angle where balancing begins.

    The search starts from gains that are too small and mostly fail, under noise that is mostly too strong.
    """
    return Recipe(
        controller=_swing_up,
        mean=np.array((-0.7, -0.7, -0.7, -0.2, -0.2, -0.2, -0.2, 0.0)),
        deviation=np.array((1.0, 1.0, 1.0, 0.4, 0.4, 0.4, 0.4, 0.05)),
        noise=(1.0, 0.3),
    )


def _swing_up(simulation: Simulation, parameters: Float64[np.ndarray, " 8"]) -> Controller:
    """Åström and Furuta 2000, "Swinging up a pendulum by energy control"."""
    model, data = simulation.model, simulation.data
    mass, length = model.body_mass[_POLE], model.body_ipos[_POLE, 2]
    weight = mass * _GRAVITY * length
    inertia = model.body_inertia[_POLE, 1] + mass * length**2
    energy_gain, swing_position, swing_velocity = _SWING * np.exp(parameters[:3])
    angle_gain, spin_gain, position_gain, velocity_gain = _BALANCE * np.exp(parameters[3:7])
    upright_cosine = _UPRIGHT_COSINE + parameters[7]

    def act(step: int) -> Float64[np.ndarray, " 1"]:
        (position, angle), (velocity, spin) = data.qpos, data.qvel
        cosine = math.cos(angle)
        if cosine > upright_cosine:
            force = angle_gain * math.sin(angle) + spin_gain * spin
            return np.array([force + position_gain * position + velocity_gain * velocity])
        excess = 0.5 * inertia * spin**2 / weight + cosine - 1  # energy, zero when upright and at rest
        return np.array([energy_gain * excess * spin * cosine - swing_position * position - swing_velocity * velocity])

    return act
