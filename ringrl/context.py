"""What a model is trained on: long contexts of several trajectories, or single transitions."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32

Array = jax.Array | np.ndarray


class Outcome(NamedTuple):
    """What a step led to: all that was not known before its action."""

    action: Float32[Array, "batch time action"]
    reward: Float32[Array, "batch time"]
    completion: Float32[Array, "batch time"]


class Context(NamedTuple):
    """A batch of contexts; the time axis runs over all steps of all trajectories.

    Step t holds the state, the action taken in it and the reward received for that action (not ExoRL's rows, where
    action and reward belong to the state before). Observations, rewards and returns-to-go are scaled by
    `Normalisation`: of ExoRL's data, rewards stay as the task gives them (0 to 1 per step) and returns-to-go are
    divided by the episode length, so that they too lie between 0 and 1.

    The steps may lie in another order than in time, as the layout of a ring wants them: `position` says when each
    was, and `previous` brings what came before it. Shorter contexts of a batch are padded at the end in time, where
    causal attention never sees it; there everything but the position is zero.
    """

    observation: Float32[Array, "batch time observation"]
    action: Float32[Array, "batch time action"]
    reward: Float32[Array, "batch time"]
    return_to_go: Float32[Array, "batch time"]
    completion: Float32[Array, "batch time"]  # 1 on the last step of a trajectory that reaches the target, else 0
    timestep: Int32[Array, "batch time"]  # within the episode, from 0
    trajectory: Int32[Array, "batch time"]  # index of the trajectory in the context, from 0
    position: Int32[Array, "batch time"]  # index of the step in the context, from 0
    weight: Float32[Array, "batch time"]  # in the loss: 1 for a step of the data, 0 for padding
    previous: Outcome  # of the step before in the context, in the trajectory before at its end; zeros at the first


class Transitions(NamedTuple):
    """A batch of n-step transitions, each scored for a goal of its own.

    Observations are normalised, actions lie in [-1, 1]. The episode goes on after `following`: its value, times
    `discount`, is what the rewards after the n-th are worth.
    """

    observation: Float32[Array, "batch observation"]
    action: Float32[Array, "batch action"]
    reward: Float32[Array, " batch"]  # of the n steps, each discounted by what lies before it
    discount: Float32[Array, " batch"]  # to the power n, fewer at an episode's end
    following: Float32[Array, "batch observation"]  # n steps later
    goal: Float32[Array, "batch goal"]  # metres; no columns where the task is not to reach a place
