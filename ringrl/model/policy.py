"""Policies: actions for a whole context, or step by step with a memory."""

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
    """Imitation losses of a policy with the attributes `head`, `features` and `loss_on`."""

    head: Head
    loss_on: str

    def loss(self, context: Context) -> Float32[Array, ""]:
        """Return the mean imitation loss of the context's actions."""
        return self.loss_sum(context) / self.loss_weight(context)

    def loss_weight(self, context: Context) -> Float32[Array, ""]:
        """Return the number of steps in the loss: all steps, or those of the last trajectory of each context."""
        return self._weights(context).sum()

    def loss_sum(self, context: Context) -> Float32[Array, ""]:
        """Return the imitation loss, summed over the steps in the loss."""
        loss = self.head.loss(self.features(context), jnp.asarray(context.action))
        return (loss * self._weights(context)).sum()

    def features(self, context: Context) -> Float[Array, "batch time width"]:
        """Return the features from which the action of each step is predicted."""
        raise NotImplementedError

    def _weights(self, context: Context) -> Float32[Array, "batch time"]:
        weight = jnp.asarray(context.weight)
        if self.loss_on == "all":
            return weight
        trajectory = jnp.where(weight > 0, context.trajectory, -1)
        return weight * (trajectory == trajectory.max(1, keepdims=True))


class AgenticTransformer(Imitation, nnx.Module):
    """Agentic Transformer: chain of hindsight over trajectories (Liu & Abbeel, 2305.16554)."""

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
        """Tokens per timestep."""
        return self.embedding.token_set.size

    def features(self, context: Context) -> Float[Array, "batch time width"]:
        """Return the features of each state token."""
        token_set = self.embedding.token_set
        x = self.transformer(self.embedding(context), self._positions(context))
        return x.reshape(*context.position.shape, token_set.size, -1)[:, :, len(token_set.before) - 1]

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """Return the action at every step, given the context up to that step."""
        return self.head.mode(self.features(context))

    def _positions(self, context: Context) -> Int32[Array, "batch tokens"]:
        size = self.tokens_per_step
        positions = size * jnp.asarray(context.position)[..., None] + jnp.arange(size)
        return positions.reshape(len(positions), -1)

    def reset(self, batch: int, capacity: int, dtype: jnp.dtype | None = None) -> KVCache:
        """Return an empty memory for `capacity` tokens. dtype: by default that of the computation."""
        return self.transformer.empty_cache(batch, capacity, dtype)

    def prefill(self, context: Context, dtype: jnp.dtype | None = None) -> KVCache:
        """Return the memory of one context (1, T, ...) in time order, the shared prefix of a batch of contexts."""
        steps, parallel = context.position.shape[1], self.transformer.parallel
        layout, devices = parallel.layout, parallel.ring_size
        context = jax.tree.map(lambda x: to_layout(pad_to_layout(x, layout, devices), layout, devices), context)
        position = layout_positions(layout, context.position.shape[1], devices)
        context = context._replace(position=position[None])  # the padding needs positions too
        tokens, positions = self.embedding(context), self._positions(context)
        return self.transformer.prefill(tokens, positions, steps * self.tokens_per_step, dtype)

    def act(
        self, previous: Context | None, current: Context, memory: KVCache, prefix: KVCache | None = None
    ) -> tuple[Float32[Array, "batch action"], KVCache]:
        """Return the action of the next step. It equals `actions` on the prefix and all steps so far.

        `previous` is the finished previous step, or None if the memory is empty (a prefix needs no previous step).
        """
        x, memory = self.transformer.decode(self.embedding.decode(previous, current), memory, prefix)
        return self.head.mode(x[:, -1]), memory


class BehaviourCloning(Imitation, Memoryless, nnx.Module):
    """Feed-forward policy of the current observation, without context or target return."""

    def __init__(self, config: ModelConfig, observation_size: int, action_size: int, rngs: nnx.Rngs) -> None:
        sizes = [observation_size] + [config.width] * config.layers
        self.loss_on = config.loss_on
        dtype = jnp.dtype(config.dtype)
        self.layers = nnx.List([nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes)])
        self.norms = nnx.List([nnx.LayerNorm(b, rngs=rngs) for b in sizes[1:]])
        self.head = make_head(config, action_size, rngs)

    def features(self, context: Context) -> Float[Array, "batch time width"]:
        """Return the features of each observation."""
        x = jnp.asarray(context.observation)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.gelu(norm(layer(x)))
        return x

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        """Return the action at every step."""
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
    """Return the configured policy with parameters drawn from the seed.

    Only td3_bc uses the goal, and only the transformer is sharded over the mesh.
    """
    rngs = nnx.Rngs(params=seed)
    if config.kind == "td3_bc":
        return ActorCritic(config, observation_size, action_size, rngs, goal)
    if config.kind == "behaviour_cloning":
        return BehaviourCloning(config, observation_size, action_size, rngs)
    return AgenticTransformer(config, observation_size, action_size, rngs, parallel)
