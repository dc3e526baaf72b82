"""Interface of agents.

state = agent.init()
state, metrics = agent.update(state, batch)                     # batch: contexts or transitions
policy = agent.policy(state.params)
memory = policy.reset(environments, tokens)
action, memory = policy.act(previous, current, memory)          # at every timestep
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ringrl.model.policy import Policy

Tree = TypeVar("Tree")


class TrainState(NamedTuple):
    """Parameters, optimiser state and step count."""

    params: Any  # nested dict of float32 arrays
    optimiser: Any  # optax state
    step: jax.Array  # int32, steps taken


@dataclasses.dataclass(frozen=True)
class Agent:
    """A trainable method. Agents are stateless: everything that is learned is in `TrainState`.

    Attributes:
        init: returns the state before the first step, the same at every call.
        update: jitted optimiser step on a batch (contexts or transitions, see `Family.source`) that donates the state.
            Metrics are scalars, among them loss, gradient_norm and skipped.
        graph: structure of the policy, without parameters.
    """

    init: Callable[[], TrainState]
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    graph: Any

    def policy(self, params: Any) -> Policy:
        """Return the policy with the parameters of a `TrainState`."""
        policy: Policy = nnx.merge(self.graph, params)
        return policy


def accept(is_finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """Return the new values if they are finite, else the old ones. Integer counts always advance."""
    choose = lambda x, y: jnp.where(is_finite, x, y) if jnp.issubdtype(x.dtype, jnp.inexact) else x  # noqa: E731
    kept: Tree = jax.tree.map(choose, new, old)
    return kept
