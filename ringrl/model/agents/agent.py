"""Interfaces of policies and agents.

state = agent.init()
state, metrics = agent.update(state, batch)                     # batch: contexts or transitions
policy = agent.policy(state.params)
memory = policy.reset(environments, tokens)
action, memory = policy.act(previous, current, memory)          # at every timestep
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32

from ringrl.context import Context


class Policy(nnx.Module):
    """A policy. It has no memory unless a subclass overrides `tokens_per_step`, `reset`, `prefill` and `act`."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens per timestep in the memory."""
        return 1

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """Return the action at every step, given the context up to that step."""
        raise NotImplementedError

    def reset(self, batch: int, capacity: int) -> Any:
        """Return an empty memory for `batch` contexts of `capacity` tokens."""
        return None

    def prefill(self, context: Context) -> Any:
        """Return the memory of one context (1, T, ...) in time order, the shared prefix of a batch of contexts."""
        return None

    def act(
        self, previous: Context | None, current: Context, memory: Any, prefix: Any = None
    ) -> tuple[Float32[Array, "batch action"], Any]:
        """Return the action of the next step and the new memory.

        `actions` returns the same action for the prefix and all steps so far.

        Args:
          previous: finished previous step, or None if the memory is empty (a prefix needs no previous step).
          current: step to act in. Its action, reward and completion are not used.
          memory, prefix: result of `reset` or of the previous call, and of `prefill`.
        """
        return self.actions(current)[:, -1], memory


class TrainState(NamedTuple):
    """Parameters, optimiser state and step count."""

    params: Any  # nested dict of float32 arrays
    optimiser: Any  # optax state
    step: jax.Array  # int32, steps taken


TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
"""A jitted optimiser step on a batch (contexts or transitions, see `Family.source`) that donates the state. Metrics are
scalars, among them loss, gradient_norm and skipped."""


@dataclasses.dataclass(frozen=True)
class Agent:
    """A trainable method. Agents are stateless: everything that is learned is in `TrainState`."""

    init: Callable[[], TrainState]  # returns the state before the first step, the same at every call
    update: TrainStep
    graph: Any  # structure of the policy, without parameters

    def policy(self, params: Any) -> Policy:
        """Return the policy with the parameters of a `TrainState`."""
        policy: Policy = nnx.merge(self.graph, params)
        return policy


def finish(
    state: TrainState, params: Any, optimiser: Any, loss: jax.Array, gradients: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Return the state after a step, and the metrics loss, gradient_norm (before clipping) and skipped (0 or 1).

    If loss, gradients or new parameters are not finite, the step is skipped: only integer counts change.
    """
    norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(is_finite, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    params, optimiser = jax.tree.map(choose, (params, optimiser), (state.params, state.optimiser))
    metrics = {"loss": loss, "gradient_norm": norm, "skipped": 1 - is_finite}
    return TrainState(params, optimiser, state.step + 1), metrics
