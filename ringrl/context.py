"""What a model reads: the timesteps of several trajectories, one after another, as one long context."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32

Array = jax.Array | np.ndarray


class Context(NamedTuple):
    """A batch of contexts; the time axis runs over all steps of all trajectories, in order.

    Step t holds the state, the action taken in it and the reward received for that action (not ExoRL's rows, where
    action and reward belong to the state before). Observations are normalised by the data's statistics; rewards are
    as the task gives them (0 to 1 per step); returns-to-go are divided by the episode length, so that they too lie
    between 0 and 1.
    """

    observation: Float32[Array, "batch time observation"]
    action: Float32[Array, "batch time action"]
    reward: Float32[Array, "batch time"]
    return_to_go: Float32[Array, "batch time"]
    completion: Float32[Array, "batch time"]  # 1 on the last step of a trajectory that reaches the target, else 0
    timestep: Int32[Array, "batch time"]  # within the episode, from 0
    trajectory: Int32[Array, "batch time"]  # index of the trajectory in the context, from 0
