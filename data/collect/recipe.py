"""How a domain's episodes are made: a controller, and where the search over its parameters begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

Controller = Callable[[int], Float64[np.ndarray, " action"]]
"""The action at a step of an episode. It may read the simulation's state; it need not keep within [-1, 1]."""


@dataclass(frozen=True)
class Recipe:
    """A family of controllers with a vector of parameters each.

    Attributes:
        controller: the controller with these parameters, on a simulation that has just been reset.
        mean: the mean of the parameters that the search tries first.
        deviation: their standard deviation.
        noise: the share of an action that is noise is drawn between zero and a limit, which goes from the first of
            these numbers to the second as the collection proceeds.
    """

    controller: Callable[[Simulation, Float64[np.ndarray, " parameters"]], Controller]
    mean: Float64[np.ndarray, " parameters"]
    deviation: Float64[np.ndarray, " parameters"]
    noise: tuple[float, float]
