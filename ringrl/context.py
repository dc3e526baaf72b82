"""Batches for training: contexts of several trajectories, or single transitions."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32

Array = jax.Array | np.ndarray


class Outcome(NamedTuple):
    """Action, reward and completion of a step: the values that are unknown before acting."""

    action: Float32[Array, "batch time action"]
    reward: Float32[Array, "batch time"]
    completion: Float32[Array, "batch time"]


class Context(NamedTuple):
    """A batch of contexts. The time axis runs over all steps of all trajectories.

    Step t holds the state, the action taken in it, and the reward for that action. (In ExoRL's rows, action and reward
    belong to the previous state.) `Normalisation` scales observations, rewards and returns-to-go. For ExoRL data,
    rewards are unchanged (0 to 1 per step) and returns-to-go are divided by the episode length (0 to 1).

    The layout of a ring may permute the steps. `position` is the index of a step in time, and `previous` holds the
    outcome of the step before it in time. Short contexts of a batch are padded at the end in time, where causal
    attention does not see the padding. All padded values except the position are zero.
    """

    observation: Float32[Array, "batch time observation"]
    action: Float32[Array, "batch time action"]
    reward: Float32[Array, "batch time"]
    return_to_go: Float32[Array, "batch time"]
    completion: Float32[Array, "batch time"]  # 1 on the last step of a trajectory that reaches the target, else 0
    timestep: Int32[Array, "batch time"]  # within the episode, from 0
    trajectory: Int32[Array, "batch time"]  # index of the trajectory in the context, from 0
    position: Int32[Array, "batch time"]  # index of the step in the context, from 0
    start: Int32[Array, "batch time"]  # position of the first step of its trajectory
    weight: Float32[Array, "batch time"]  # weight in the loss: 1 for a step of the data, 0 for padding
    previous: Outcome  # outcome of the previous step in the context, zeros at the first step


class Transitions(NamedTuple):
    """A batch of n-step transitions.

    Observations are normalised and actions are in [-1, 1]. The n-step target is `reward` plus `discount` times the
    value of `following`.
    """

    observation: Float32[Array, "batch observation"]
    action: Float32[Array, "batch action"]
    reward: Float32[Array, " batch"]  # discounted sum over n steps
    discount: Float32[Array, " batch"]  # discount^n, a smaller power at the end of an episode, 0 after termination
    following: Float32[Array, "batch observation"]  # observation n steps later
