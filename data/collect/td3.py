"""TD3 (Fujimoto et al. 2018, 1802.09477) with n-step targets, as pure functions of a state and a batch.

Floats only, no environment: what gathers the data and calls this stands in learner.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

Layer = dict[str, Any]
"""A linear layer: weight (inputs, outputs) and bias (outputs,)."""

Network = list[Layer]
"""The layers of a network, first to last."""


@dataclass(frozen=True)
class Td3Settings:
    """The learner's settings.

    Attributes:
        width: units of each of the two hidden layers.
        discount: per step.
        steps: n of the n-step targets; ExoRL's learners take three.
        learning_rate: of both Adams.
        target_rate: the share by which targets follow at each of the actor's updates.
        target_noise: standard deviation of the noise on the target's action.
        target_noise_clip: the most that this noise may be.
        actor_delay: critic updates per update of the actor and the targets.
    """

    width: int = 256
    discount: float = 0.99
    steps: int = 3
    learning_rate: float = 1e-3
    target_rate: float = 0.01
    target_noise: float = 0.2
    target_noise_clip: float = 0.5
    actor_delay: int = 2


class Batch(NamedTuple):
    """Transitions over up to n steps.

    `reward` is the discounted sum of the rewards on the way, `discount` what the value of `following` counts.
    """

    observation: Float[Array, "*batch observation"]
    action: Float[Array, "*batch action"]
    reward: Float[Array, "*batch"]
    discount: Float[Array, "*batch"]
    following: Float[Array, "*batch observation"]


class Td3State(NamedTuple):
    """Actor, two critics, the targets that follow them, the optimisers' states, and the updates made so far."""

    actor: Network
    critics: tuple[Network, Network]
    target_actor: Network
    target_critics: tuple[Network, Network]
    actor_optimiser: Any
    critics_optimiser: Any
    updates: Array


def make_network(key: Array, inputs: int, width: int, outputs: int, last_gain: float = 0.01) -> Network:
    """Two hidden layers of `width` units; orthogonal weights, biases zero, the last layer near zero by default."""
    sizes = [inputs, width, width, outputs]
    gains = [2**0.5, 2**0.5, last_gain]
    return [
        {
            "weight": jax.nn.initializers.orthogonal(gain)(subkey, (rows, columns), jnp.float32),
            "bias": jnp.zeros(columns),
        }
        for subkey, gain, (rows, columns) in zip(jax.random.split(key, 3), gains, pairwise(sizes), strict=True)
    ]


def apply_network(network: Network, x: Any, numpy: Any = jnp) -> Any:
    """The outputs for inputs (*batch, inputs), in JAX's numpy or in NumPy itself.

    The first layer is normalised and squashed, as ExoRL's, so that observations of any scale are fit to learn from.
    """
    first, second, last = network
    x = x @ first["weight"] + first["bias"]
    x = x - x.mean(-1, keepdims=True)
    x = numpy.tanh(x / numpy.sqrt(numpy.square(x).mean(-1, keepdims=True) + 1e-5))
    x = numpy.maximum(x @ second["weight"] + second["bias"], 0)
    return x @ last["weight"] + last["bias"]


def act(actor: Network, observation: np.ndarray) -> np.ndarray:
    """Actions (*batch, action) in [-1, 1], in NumPy: for a few rows that is faster than a call of JAX."""
    return np.tanh(apply_network(actor, observation, np))


def initial_state(settings: Td3Settings, observation_size: int, action_size: int, key: Array) -> Td3State:
    """The state before the first update; targets equal what they follow."""
    keys = jax.random.split(key, 3)
    actor = make_network(keys[0], observation_size, settings.width, action_size)
    first, second = (make_network(key, observation_size + action_size, settings.width, 1) for key in keys[1:])
    critics = (first, second)
    adam = optax.adam(settings.learning_rate)
    return Td3State(
        actor=actor,
        critics=critics,
        target_actor=jax.tree.map(jnp.copy, actor),
        target_critics=jax.tree.map(jnp.copy, critics),
        actor_optimiser=adam.init(actor),
        critics_optimiser=adam.init(critics),
        updates=jnp.zeros((), jnp.int32),
    )


def values(
    critics: tuple[Network, Network], observation: Float[Array, "*batch observation"], action: Float[Array, "*batch a"]
) -> Float[Array, " 2 *batch"]:
    """What each critic says of the actions."""
    x = jnp.concatenate([observation, action], -1)
    return jnp.stack([apply_network(critic, x)[..., 0] for critic in critics])


def target_value(
    settings: Td3Settings, state: Td3State, batch: Batch, noise: Float[Array, "batch action"]
) -> Float[Array, " batch"]:
    """What the critics should say: the rewards, and then the lower target critic on the target actor's noisy action.

    `noise` has variance one; it is scaled and clipped here.
    """
    noise = jnp.clip(settings.target_noise * noise, -settings.target_noise_clip, settings.target_noise_clip)
    action = jnp.tanh(apply_network(state.target_actor, batch.following))
    action = jnp.clip(action + noise, -1, 1)
    return batch.reward + batch.discount * values(state.target_critics, batch.following, action).min(0)


def update(settings: Td3Settings, state: Td3State, batch: Batch, noise: Float[Array, "batch action"]) -> Td3State:
    """One step of the critics, and every `actor_delay`-th time one of the actor and the targets."""
    target = target_value(settings, state, batch, noise)

    def critics_loss(critics: tuple[Network, Network]) -> Array:
        return jnp.square(values(critics, batch.observation, batch.action) - target).mean(1).sum()

    gradients = jax.grad(critics_loss)(state.critics)
    critics, critics_optimiser = _descend(settings, gradients, state.critics_optimiser, state.critics)
    state = state._replace(critics=critics, critics_optimiser=critics_optimiser, updates=state.updates + 1)
    return jax.lax.cond(
        state.updates % settings.actor_delay == 0, lambda: _update_actor(settings, state, batch), lambda: state
    )


def _update_actor(settings: Td3Settings, state: Td3State, batch: Batch) -> Td3State:
    def actor_loss(actor: Network) -> Array:
        action = jnp.tanh(apply_network(actor, batch.observation))
        return -values(state.critics, batch.observation, action)[0].mean()

    gradients = jax.grad(actor_loss)(state.actor)
    actor, actor_optimiser = _descend(settings, gradients, state.actor_optimiser, state.actor)
    return state._replace(
        actor=actor,
        actor_optimiser=actor_optimiser,
        target_actor=optax.incremental_update(actor, state.target_actor, settings.target_rate),
        target_critics=optax.incremental_update(state.critics, state.target_critics, settings.target_rate),
    )


def _descend(settings: Td3Settings, gradients: Any, optimiser: Any, parameters: Any) -> tuple[Any, Any]:
    updates, optimiser = optax.adam(settings.learning_rate).update(gradients, optimiser, parameters)
    return optax.apply_updates(parameters, updates), optimiser
