"""Interface of agents, and their optimiser.

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
import optax
from flax import nnx

from ringrl.config import OptimiserConfig
from ringrl.model.policy import Policy

DECAYED = ("kernel", "embedding")  # by name: the stacked biases of all layers are two-dimensional too

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


def learning_rate(config: OptimiserConfig) -> optax.Schedule:
    """Return linear warm-up from zero to the peak, then cosine decay to the final fraction at step `config.steps`.

    Steps count from 0. With any warm-up, the rate of the first step is zero.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, config.steps - 1),
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_learning_rate,
    )


def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW with weight decay on matrices only (not on biases and norm scales)."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), b2=config.beta2, weight_decay=config.weight_decay, mask=decayed),
    )


def accept(is_finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """Return the new values if they are finite, else the old ones. Integer counts always advance."""
    choose = lambda x, y: jnp.where(is_finite, x, y) if jnp.issubdtype(x.dtype, jnp.inexact) else x  # noqa: E731
    kept: Tree = jax.tree.map(choose, new, old)
    return kept
