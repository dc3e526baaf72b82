"""Tasks that ask for a place to be reached: which one, and what being anywhere is worth for any such place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class GoalSpace:
    """The places that the tasks of a domain ask for; what hindsight (1707.01495) needs to know of a domain.

    Attributes:
        goals: full task name -> its place (3,), metres.
        observation: where the observation holds the position that is to get there, metres.
        reward: `(positions (*batch, 3), goals (*batch, 3)) -> rewards (*batch)`; the tasks' own rewards use it too.
    """

    goals: Mapping[str, tuple[float, float, float]]
    observation: slice
    reward: Callable[[Float[np.ndarray, "*batch 3"], Float[np.ndarray, "*batch 3"]], Float[np.ndarray, "*batch"]]
