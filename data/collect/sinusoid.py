"""Open-loop sinusoids for the walkers: one frequency, and an amplitude, an offset and a phase per actuator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from ringrl.data.collect.recipe import Controller, Recipe

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation


def sinusoid_recipe(action_size: int, frequency: float) -> Recipe:
    """Sinusoids whose search starts around a frequency in hertz; 1 + 3 * action_size parameters.

    About a tenth of the actions is noise, from the first episode to the last: the search itself brings the variety.
    """

    def parameters(log_frequency: float, amplitude: float, offset: float, phase: float) -> Float64[np.ndarray, " p"]:
        return np.concatenate(([log_frequency], np.repeat((amplitude, offset, phase), action_size)))

    return Recipe(
        controller=partial(_sinusoid, action_size),
        mean=parameters(np.log(frequency), 0.5, 0.0, 0.0),
        deviation=parameters(0.4, 0.3, 0.3, 2.0),
        noise=(0.2, 0.2),
    )


def _sinusoid(action_size: int, simulation: Simulation, parameters: Float64[np.ndarray, " parameters"]) -> Controller:
    frequency = np.exp(parameters[0])
    amplitude, offset, phase = parameters[1:].reshape(3, action_size)
    domain = simulation.domain
    seconds = domain.control_timestep * np.arange(domain.episode_length)[:, None]
    actions = offset + amplitude * np.sin(2 * np.pi * frequency * seconds + phase)
    return lambda step: actions[step]
