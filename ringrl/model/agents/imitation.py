"""Imitation: behaviour cloning, Decision Transformer, Agentic Transformer and Algorithm Distillation.

The four methods share loss and update. They differ in the policy (a feed-forward network for behaviour cloning, a
transformer for the others) and in the contexts that the sampler draws (`ringrl.methods`).
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32

from ringrl.attention import layout_positions, pad_to_layout, to_layout
from ringrl.config import ModelConfig, TrainConfig
from ringrl.context import Context
from ringrl.model.agents.agent import Agent, Policy, TrainState, TrainStep, finish
from ringrl.model.cache import KVCache
from ringrl.model.heads import Head, make_head
from ringrl.model.optimiser import make_optimiser
from ringrl.model.parallel import ONE_DEVICE, Parallel
from ringrl.model.tokens import TokenEmbedding
from ringrl.model.transformer import Place, Transformer


class ImitationPolicy(Policy):
    """Base of policies that imitate the actions of the data. Subclasses set `head` and `loss_on`."""

    head: Head
    loss_on: str

    def features(self, context: Context) -> Float[Array, "batch time width"]:
        """Return the features from which the action of each step is predicted."""
        raise NotImplementedError

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        return self.head.action(self.features(context))

    def loss(self, context: Context, total: jax.Array | None = None) -> Float32[Array, ""]:
        """Return the imitation loss, summed by `weights` and divided by `total` (by default, the sum of `weights`)."""
        total = self.weights(context).sum() if total is None else total
        return (self.losses(context) * self.weights(context)).sum() / total

    def losses(self, context: Context) -> Float32[Array, "batch time"]:
        """Return the imitation loss of every step, padding included."""
        return self.head.loss(self.features(context), jnp.asarray(context.action))

    def weights(self, context: Context) -> Float32[Array, "batch time"]:
        """Return the weight of every step in the loss: of all steps, or of the last trajectory of each context."""
        weight = jnp.asarray(context.weight)
        if self.loss_on == "all":
            return weight
        trajectory = jnp.where(weight > 0, context.trajectory, -1)
        return weight * (trajectory == trajectory.max(1, keepdims=True))


class AgenticTransformer(ImitationPolicy):
    """Agentic Transformer (Liu & Abbeel, 2305.16554): imitates several trajectories, sorted by return, in one context.

    Decision Transformer (2106.01345) is the case of one trajectory. Algorithm Distillation (2210.14215) is the case of
    trajectories in the order of collection, without a target return.
    """

    def __init__(
        self, config: ModelConfig, observation_size: int, action_size: int, rngs: nnx.Rngs, parallel: Parallel
    ) -> None:
        self.loss_on = config.loss_on
        self.embedding = TokenEmbedding(config, observation_size, action_size, rngs)
        self.transformer = Transformer(config, rngs, parallel)
        self.head = make_head(config, action_size, rngs)

    @property
    def tokens_per_step(self) -> int:
        return self.embedding.token_set.size

    def features(self, context: Context) -> Float[Array, "batch time width"]:
        """Return the features of each state token."""
        token_set = self.embedding.token_set
        x = self.transformer(self.embedding(context), self._place(context))
        return x.reshape(*context.position.shape, token_set.size, -1)[:, :, len(token_set.before) - 1]

    def _place(self, context: Context) -> Place:
        size = self.tokens_per_step
        positions = size * jnp.asarray(context.position)[..., None] + jnp.arange(size)
        starts = jnp.repeat(size * jnp.asarray(context.start), size, axis=1)
        return Place(positions.reshape(starts.shape), starts)

    def reset(self, batch: int, capacity: int) -> KVCache:
        return self.transformer.empty_cache(batch, capacity)

    def prefill(self, context: Context) -> KVCache:
        steps, parallel = context.position.shape[1], self.transformer.parallel
        layout, devices = parallel.layout, parallel.ring_size
        context = jax.tree.map(lambda x: to_layout(pad_to_layout(x, layout, devices), layout, devices), context)
        position = layout_positions(layout, context.position.shape[1], devices)
        context = context._replace(position=position[None])  # the padding needs positions too
        tokens, place = self.embedding(context), self._place(context)
        return self.transformer.prefill(tokens, place, steps * self.tokens_per_step)

    def act(
        self, previous: Context | None, current: Context, memory: KVCache, prefix: KVCache | None = None
    ) -> tuple[Float32[Array, "batch action"], KVCache]:
        before, after = len(self.embedding.token_set.before), len(self.embedding.token_set.after)
        steps = [(current, before)] if previous is None else [(previous, after), (current, before)]
        starts = jnp.concatenate([jnp.repeat(jnp.asarray(step.start), size, axis=1) for step, size in steps], axis=1)
        tokens = self.embedding.decode(previous, current)
        x, memory = self.transformer.decode(tokens, memory, prefix, self.tokens_per_step * starts)
        return self.head.action(x[:, -1]), memory

    def action_after(self, prefix: KVCache | None, segment: Context, step: jax.Array) -> Float32[Array, "batch action"]:
        """Return the action at one step of a segment (B, T, ...) that follows a prefix. Later steps are not seen."""
        token_set = self.embedding.token_set
        tokens = self.embedding(segment)
        memory = self.transformer.empty_cache(len(tokens), tokens.shape[1])
        starts = token_set.size * jnp.repeat(jnp.asarray(segment.start)[0], token_set.size)
        only = token_set.size * step + len(token_set.before) - 1
        x, _ = self.transformer.decode(tokens, memory, prefix, starts, only)
        return self.head.action(x[:, 0])


class BehaviourCloning(ImitationPolicy):
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


def make_agent(make_policy: Callable[[], ImitationPolicy], config: TrainConfig, parallel: Parallel) -> Agent:
    """Return the agent that minimises the imitation loss."""
    graph, _ = nnx.split(nnx.eval_shape(make_policy), nnx.Param)
    optimiser = make_optimiser(config.optimiser)
    update = make_train_step(graph, optimiser, config.optimiser.accumulation)
    return Agent(lambda: initial_state(make_policy, optimiser, parallel), update, graph)


@lru_cache(maxsize=8)  # runs of equal policies in one process are traced and compiled once
def make_train_step(graph: Any, optimiser: optax.GradientTransformation, accumulation: int = 1) -> TrainStep:
    """Return a jitted step that donates the state. It computes the gradient in `accumulation` parts of the batch."""

    def train_step(state: TrainState, batch: Context) -> tuple[TrainState, dict[str, jax.Array]]:
        weight = nnx.merge(graph, state.params).weights(batch).sum()
        value_and_grad = jax.value_and_grad(lambda params, part: nnx.merge(graph, params).loss(part, weight))

        def add(total: Any, part: Context) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(state.params, part)), None

        if accumulation == 1:
            loss, gradients = value_and_grad(state.params, batch)
        else:
            start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (loss, gradients), _ = jax.lax.scan(add, start, _parts(batch, accumulation))
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, state.params)
        return finish(state, optax.apply_updates(state.params, updates), optimiser_state, loss, gradients)

    return jax.jit(train_step, donate_argnums=0)


def _parts(batch: Context, number: int) -> Context:
    """Reshape (B, ...) to (number, B / number, ...). Every device keeps its own contexts."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, number, *x.shape[1:]), 1, 0), batch)


def abstract_state(
    make_policy: Callable[[], nnx.Module], optimiser: optax.GradientTransformation, parallel: Parallel
) -> TrainState:
    """Return the shapes, dtypes and (with a mesh) shardings of `initial_state`, without allocating memory."""
    parameters = nnx.state(nnx.eval_shape(make_policy), nnx.Param)
    params = nnx.to_pure_dict(parameters)
    state = TrainState(params, jax.eval_shape(optimiser.init, params), jax.ShapeDtypeStruct((), jnp.int32))  # type: ignore[arg-type]
    if parallel.mesh is None:
        return state
    shardings, replicated = parallel.parameter_shardings(parameters), parallel.sharding()

    def place(x: Any, sharding: Any = replicated) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    moments = optax.tree.map_params(optimiser, place, state.optimiser, shardings, transform_non_params=place)
    return TrainState(jax.tree.map(place, params, shardings), moments, place(state.step))


def initial_state(
    make_policy: Callable[[], nnx.Module], optimiser: optax.GradientTransformation, parallel: Parallel = ONE_DEVICE
) -> TrainState:
    """Return the state before the first step. On a mesh, every array is created in shards."""

    def made() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(make_policy(), nnx.Param))
        return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32))

    if parallel.mesh is None:
        return made()
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(make_policy, optimiser, parallel))
    return jax.jit(made, out_shardings=shardings)()
