"""Random network distillation (Burda et al. 2018, 1810.12894): a reward for states unlike those seen before."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ringrl.data.collect.td3 import Network, make_network

_WIDTH = 256
_OUTPUTS = 64
_LEARNING_RATE = 1e-4
_LARGEST_INPUT = 5.0  # standard deviations; observations beyond are clipped


class Moments(NamedTuple):
    """Running mean and variance of what has been seen, and how much that was."""

    mean: Array
    variance: Array
    number: Array


class RndState(NamedTuple):
    """A random network, the one that learns to predict it, and the scales of observations and errors."""

    target: Network
    predictor: Network
    optimiser: Any
    observation: Moments
    error: Moments


def initial_state(observation_size: int, key: Array) -> RndState:
    """The state before anything has been seen."""
    target, predictor = (make_network(key, observation_size, _WIDTH, _OUTPUTS, 1.0) for key in jax.random.split(key))
    optimiser = optax.adam(_LEARNING_RATE).init(predictor)
    return RndState(target, predictor, optimiser, _no_moments((observation_size,)), _no_moments(()))


def errors(state: RndState, observation: Float[Array, "*batch observation"]) -> Float[Array, "*batch"]:
    """The mean squared error of the prediction: high where little has been learned."""
    return _errors(state.predictor, state, observation)


def update(state: RndState, observation: Float[Array, "batch observation"]) -> tuple[RndState, Float[Array, " batch"]]:
    """Learns to predict these states; also gives their bonus as it was before, in standard deviations of all errors."""
    state = state._replace(observation=observe(state.observation, observation))

    def loss(predictor: Network) -> tuple[Array, Array]:
        found = _errors(predictor, state, observation)
        return found.mean(), found

    gradients, found = jax.grad(loss, has_aux=True)(state.predictor)
    updates, optimiser = optax.adam(_LEARNING_RATE).update(gradients, state.optimiser)
    predictor = optax.apply_updates(state.predictor, updates)
    state = state._replace(predictor=predictor, optimiser=optimiser, error=observe(state.error, found))
    return state, found / jnp.sqrt(state.error.variance + 1e-12)


def observe(moments: Moments, values: Float[Array, " batch *rest"]) -> Moments:
    """The moments with a batch of further values (Chan et al. 1979)."""
    number = values.shape[0]
    total = moments.number + number
    difference = values.mean(0) - moments.mean
    squares = moments.variance * moments.number + values.var(0) * number
    squares += difference**2 * moments.number * number / total
    return Moments(moments.mean + difference * number / total, squares / total, total)


def _errors(
    predictor: Network, state: RndState, observation: Float[Array, "*batch observation"]
) -> Float[Array, "*batch"]:
    x = (observation - state.observation.mean) / jnp.sqrt(state.observation.variance + 1e-6)
    x = jnp.clip(x, -_LARGEST_INPUT, _LARGEST_INPUT)
    return jnp.square(_outputs(predictor, x) - _outputs(state.target, x)).mean(-1)


def _outputs(network: Network, x: Float[Array, "*batch observation"]) -> Float[Array, "*batch outputs"]:
    """Plain layers: the learner's normalise theirs, which would hide how far away a state is."""
    *hidden, last = network
    for layer in hidden:
        x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
    return x @ last["weight"] + last["bias"]


def _no_moments(shape: tuple[int, ...]) -> Moments:
    return Moments(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(()))
