"""Policies: context -> actions. All offer actions(context) and, step by step, reset, prefill and act.

Those that imitate offer loss(context); the actor-critic has losses of its own.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from ringrl.attention import layout_positions, pad_to_layout, to_layout
from ringrl.config import ModelConfig
from ringrl.context import Context
from ringrl.model.actor_critic import ActorCritic, Goal
from ringrl.model.cache import KVCache
from ringrl.model.heads import Head, make_head
from ringrl.model.memoryless import Memoryless
from ringrl.model.parallel import ONE_DEVICE, Parallel
from ringrl.model.tokens import TokenEmbedding
from ringrl.model.transformer import Transformer


class Imitation:
    """Losses of a policy that is to act as the data does; it has `head`, `features` and `loss_on`."""

    head: Head
    loss_on: str

    def loss(self, context: Context) -> Float32[Array, ""]:
        """Mean imitation loss of the context's actions."""
        return self.loss_sum(context) / self.loss_weight(context)

    def loss_weight(self, context: Context) -> Float32[Array, ""]:
        """What `loss_sum` is divided by: the steps that count, all or those of the last trajectory of each context."""
        return self._weights(context).sum()

    def loss_sum(self, context: Context) -> Float32[Array, ""]:
        """Imitation loss of the context's actions, summed over the steps that count."""
        loss = self.head.loss(self.features(context), jnp.asarray(context.action))
        return (loss * self._weights(context)).sum()

    def features(self, context: Context) -> Float[Array, "batch time width"]:
        """What is known at each step."""
        raise NotImplementedError

    def _weights(self, context: Context) -> Float32[Array, "batch time"]:
        weight = jnp.asarray(context.weight)
        if self.loss_on == "all":
            return weight
        trajectory = jnp.where(weight > 0, context.trajectory, -1)
        return weight * (trajectory == trajectory.max(1, keepdims=True))


class AgenticTransformer(Imitation, nnx.Module):
    """Chain of hindsight over trajectories (Liu & Abbeel, 2305.16554)."""

    def __init__(
        self,
        config: ModelConfig,
        observation_size: int,
        action_size: int,
        rngs: nnx.Rngs,
        parallel: Parallel = ONE_DEVICE,
    ) -> None:
        self.loss_on = config.loss_on
        self.embedding = TokenEmbedding(config, observation_size, action_size, rngs)
        self.transformer = Transformer(config, rngs, parallel)
        self.head = make_head(config, action_size, rngs)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a timestep takes of the context."""
        return self.embedding.token_set.size

    def features(self, context: Context) -> Float[Array, "batch time width"]:
        """What the model knows at each state token."""
        token_set = self.embedding.token_set
        x = self.transformer(self.embedding(context), self._positions(context))
        return x.reshape(*context.position.shape, token_set.size, -1)[:, :, len(token_set.before) - 1]

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """The action at every step, given the context up to it."""
        return self.head.mode(self.features(context))

    def _positions(self, context: Context) -> Int32[Array, "batch tokens"]:
        size = self.tokens_per_step
        positions = size * jnp.asarray(context.position)[..., None] + jnp.arange(size)
        return positions.reshape(len(positions), -1)

    def reset(self, batch: int, capacity: int, dtype: jnp.dtype | None = None) -> KVCache:
        """Memory of nothing, with room for `capacity` tokens; kept in the computation's dtype or another."""
        return self.transformer.empty_cache(batch, capacity, dtype)

    def prefill(self, context: Context, dtype: jnp.dtype | None = None) -> KVCache:
        """Memory of one whole context (1, T, ...) in the order of time, for all contexts of a batch to begin with."""
        steps, parallel = context.position.shape[1], self.transformer.parallel
        layout, devices = parallel.layout, parallel.ring_size
        context = jax.tree.map(lambda x: to_layout(pad_to_layout(x, layout, devices), layout, devices), context)
        position = layout_positions(layout, context.position.shape[1], devices)
        context = context._replace(position=position[None])  # of the padding too
        tokens, positions = self.embedding(context), self._positions(context)
        return self.transformer.prefill(tokens, positions, steps * self.tokens_per_step, dtype)

    def act(
        self, previous: Context | None, current: Context, memory: KVCache, prefix: KVCache | None = None
    ) -> tuple[Float32[Array, "batch action"], KVCache]:
        """The action of one more step; equals `actions` on the whole context so far, the prefix included.

        `previous` is the step before, as it ended; None where memory is empty (a prefix is whole).
        """
        x, memory = self.transformer.decode(self.embedding.decode(previous, current), memory, prefix)
        return self.head.mode(x[:, -1]), memory


class BehaviourCloning(Imitation, Memoryless, nnx.Module):
    """A feed-forward policy of the present observation: the same data and training loop, no context, no target."""

    def __init__(self, config: ModelConfig, observation_size: int, action_size: int, rngs: nnx.Rngs) -> None:
        sizes = [observation_size] + [config.width] * config.layers
        self.loss_on = config.loss_on
        dtype = jnp.dtype(config.dtype)
        self.layers = nnx.List([nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes)])
        self.norms = nnx.List([nnx.LayerNorm(b, rngs=rngs) for b in sizes[1:]])
        self.head = make_head(config, action_size, rngs)

    def features(self, context: Context) -> Float[Array, "batch time width"]:
        """Features of each step's observation."""
        x = jnp.asarray(context.observation)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.gelu(norm(layer(x)))
        return x

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """The action at every step."""
        return self.head.mode(self.features(context))


Policy = AgenticTransformer | BehaviourCloning | ActorCritic


def make_policy(
    config: ModelConfig,
    observation_size: int,
    action_size: int,
    seed: int,
    goal: Goal | None = None,
    parallel: Parallel = ONE_DEVICE,
) -> Policy:
    """The policy that the configuration names, with parameters drawn from the seed.

    td3_bc is told the goal; the transformer is split over the mesh.
    """
    rngs = nnx.Rngs(params=seed)
    if config.kind == "td3_bc":
        return ActorCritic(config, observation_size, action_size, rngs, goal)
    if config.kind == "behaviour_cloning":
        return BehaviourCloning(config, observation_size, action_size, rngs)
    return AgenticTransformer(config, observation_size, action_size, rngs, parallel)
