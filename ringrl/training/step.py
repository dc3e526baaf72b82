"""One optimiser step as a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ringrl.context import Context


class TrainState(NamedTuple):
    """Everything that training changes."""

    params: Any  # nested dict of float32 arrays
    optimiser: Any  # optax state
    step: jax.Array  # int32, steps taken


def initial_state(policy: nnx.Module, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params = nnx.to_pure_dict(nnx.state(policy, nnx.Param))
    return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32))


def with_params(graph: Any, params: Any) -> Any:
    """The policy of a graph definition with the given nested dict of parameters."""
    return nnx.merge(graph, params)


def make_train_step(
    policy: nnx.Module, optimiser: optax.GradientTransformation
) -> Callable[[TrainState, Context], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted step; the state is donated. Metrics: loss and gradient_norm (before clipping)."""
    graph, _ = nnx.split(policy, nnx.Param)

    def loss_of(params: Any, batch: Context) -> jax.Array:
        return with_params(graph, params).loss(batch)

    def train_step(state: TrainState, batch: Context) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, gradients = jax.value_and_grad(loss_of)(state.params, batch)
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(params, optimiser_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)
