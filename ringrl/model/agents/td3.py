"""TD3 (Fujimoto et al., 1802.09477) and TD3+BC (Fujimoto & Gu, 2106.06860).

`ringrl train` uses this agent on a fixed dataset, `ringrl data collect` as a learner that collects its own data.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32

from ringrl.config import ActorCriticConfig, ModelConfig, OptimiserConfig, TrainConfig
from ringrl.context import Array as AnyArray
from ringrl.context import Context, Transitions
from ringrl.model.agents.agent import Agent, Policy, TrainState, TrainStep, finish
from ringrl.model.optimiser import make_optimiser

LEARNED = ("actor", "critics")  # each has its own optimiser and its targets


class NetworkStyle(NamedTuple):
    """Normalisation and initial weights of an MLP."""

    norm: Literal["every", "first"]  # layer norm before the ReLU of each hidden layer, or with tanh in the first only
    hidden: nnx.Initializer  # of the weights of hidden layers
    last: nnx.Initializer  # of the weights of the last layer
    largest_input: float  # observations are clipped to this magnitude


# Layer normalisation of every layer keeps values bounded on actions that the data lacks (ReBRAC, 2305.09836).
REBRAC = NetworkStyle("every", nnx.initializers.lecun_normal(), nnx.initializers.normal(0.01), 5.0)
# ExoRL's learners see observations of any scale.
EXORL = NetworkStyle("first", nnx.initializers.orthogonal(2**0.5), nnx.initializers.orthogonal(0.01), float("inf"))


class MLP(nnx.Module):
    """Feed-forward network with ReLU. `sizes`: inputs, hidden layers, outputs."""

    def __init__(self, sizes: Sequence[int], style: NetworkStyle, rngs: nnx.Rngs, dtype: str = "float32") -> None:
        *hidden, outputs = sizes
        normed = hidden[1:] if style.norm == "every" else hidden[1:2]
        linear = partial(nnx.Linear, kernel_init=style.hidden, dtype=jnp.dtype(dtype), rngs=rngs)
        self.layers = nnx.List([linear(a, b) for a, b in pairwise(hidden)])
        self.norms = nnx.List([nnx.LayerNorm(size, use_bias=False, use_scale=False, rngs=rngs) for size in normed])
        self.last = nnx.Linear(hidden[-1], outputs, kernel_init=style.last, rngs=rngs)
        self.squashes_first = style.norm == "first"

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float32[Array, "*batch outputs"]:
        """Return the outputs of the last layer."""
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index < len(self.norms):
                x = self.norms[index](x)
            x = jnp.tanh(x) if self.squashes_first and index == 0 else jax.nn.relu(x)
        return self.last(x).astype(jnp.float32)


class ActorCritic(Policy):
    """Actor, two critics and their target networks. The policy acts by the target actor."""

    def __init__(
        self, config: ModelConfig, observation_size: int, action_size: int, rngs: nnx.Rngs, style: NetworkStyle = REBRAC
    ) -> None:
        self.largest_input, hidden = style.largest_input, [config.width] * config.layers
        self.actor = MLP([observation_size, *hidden, action_size], style, rngs, config.dtype)
        inputs = observation_size + action_size
        self.critics = nnx.List([MLP([inputs, *hidden, 1], style, rngs, config.dtype) for _ in range(2)])
        self.target_actor = nnx.clone(self.actor)
        self.target_critics = nnx.clone(self.critics)

    def inputs(self, observation: Float[AnyArray, "*batch observation"]) -> Float[Array, "*batch observation"]:
        """Return the network inputs of a state: the observation, clipped."""
        return jnp.clip(jnp.asarray(observation), -self.largest_input, self.largest_input)

    def target_value(self, batch: Transitions, noise: Float32[Array, "batch action"]) -> Float32[Array, " batch"]:
        """Return the regression target: rewards plus the lower target critic at the target actor's noisy action."""
        x = self.inputs(batch.following)
        action = jnp.clip(jnp.tanh(self.target_actor(x)) + noise, -1, 1)
        return jnp.asarray(batch.reward) + batch.discount * _values(self.target_critics, x, action).min(0)

    def critic_loss(self, batch: Transitions, target: Float32[Array, " batch"]) -> Float32[Array, ""]:
        """Return the mean squared error of both critics, summed over the two."""
        x = self.inputs(batch.observation)
        return jnp.square(_values(self.critics, x, jnp.asarray(batch.action)) - target).sum(0).mean()

    def actor_loss(self, batch: Transitions, behaviour_cloning: float) -> Float32[Array, ""]:
        """Return minus the first critic's value, scaled to magnitude one, plus the squared distance to the data."""
        x = self.inputs(batch.observation)
        action = jnp.tanh(self.actor(x))
        value = _values(self.critics[:1], x, action)[0]
        scale = jax.lax.stop_gradient(jnp.abs(value).mean()) + 1e-3
        return -value.mean() / scale + behaviour_cloning * jnp.square(action - batch.action).mean()

    def imitation_error(self, batch: Transitions) -> Float32[Array, ""]:
        """Return the mean squared error of the actor's actions, over batch and components."""
        x = self.inputs(batch.observation)
        return jnp.square(jnp.tanh(self.actor(x)) - batch.action).mean()

    def actions(self, context: Context) -> Float32[Array, "batch time action"]:
        return jnp.tanh(self.target_actor(self.inputs(context.observation)))


def _values(
    critics: nnx.List, x: Float[Array, "*batch inputs"], action: Float[Array, "*batch action"]
) -> Float32[Array, " critics *batch"]:
    together = jnp.concatenate([x, action], -1)
    return jnp.stack([critic(together)[..., 0] for critic in critics])


class TD3:
    """Update rule of TD3 for the structure `graph` of an `ActorCritic`. `seed`: noise on target actions.

    A behaviour cloning weight of zero is TD3, a positive weight TD3+BC.
    """

    def __init__(self, graph: Any, optimiser: OptimiserConfig, settings: ActorCriticConfig, seed: int) -> None:
        self.graph, self.settings, self.seed = graph, settings, seed
        delay = settings.actor_delay
        fewer = {"steps": -(-optimiser.steps // delay), "warmup_steps": optimiser.warmup_steps // delay}
        self.optimisers = {
            "actor": make_optimiser(optimiser.model_copy(update=fewer)),  # its schedule counts the actor's updates
            "critics": make_optimiser(optimiser),
        }

    def init(self, policy: ActorCritic) -> TrainState:
        """Return the state before the first step. Target networks equal the learned networks."""
        params = nnx.to_pure_dict(nnx.state(policy, nnx.Param))
        params |= {f"target_{name}": jax.tree.map(jnp.copy, params[name]) for name in LEARNED}  # not shared: donated
        optimisers = {name: optimiser.init(params[name]) for name, optimiser in self.optimisers.items()}
        return TrainState(params, optimisers, jnp.zeros((), jnp.int32))

    def update(self, state: TrainState, batch: Transitions) -> tuple[TrainState, dict[str, jax.Array]]:
        """Update the critics and, at every `actor_delay`-th step, the actor and the target networks.

        Metrics: those of `finish` for the critics, and value (mean regression target).
        """
        settings, params = self.settings, state.params
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        noise = settings.target_noise * jax.random.normal(key, batch.action.shape)
        noise = jnp.clip(noise, -settings.target_noise_clip, settings.target_noise_clip)
        target = nnx.merge(self.graph, params).target_value(batch, noise)

        def loss_of(critics: Any) -> jax.Array:
            return nnx.merge(self.graph, params | {"critics": critics}).critic_loss(batch, target)

        loss, gradients = jax.value_and_grad(loss_of)(params["critics"])
        params, optimiser = self._apply("critics", gradients, params, state.optimiser)
        params, optimiser = jax.lax.cond(
            state.step % settings.actor_delay == 0,
            lambda: self._update_actor(params, optimiser, batch),
            lambda: (params, optimiser),
        )
        state, metrics = finish(state, params, optimiser, loss, gradients)
        return state, metrics | {"value": target.mean()}

    def _update_actor(self, params: Any, optimiser: Any, batch: Transitions) -> tuple[Any, Any]:
        def loss_of(actor: Any) -> jax.Array:
            policy = nnx.merge(self.graph, params | {"actor": actor})
            return policy.actor_loss(batch, self.settings.behaviour_cloning)

        params, optimiser = self._apply("actor", jax.grad(loss_of)(params["actor"]), params, optimiser)
        targets = {f"target_{name}": params[name] for name in LEARNED}
        rate = self.settings.target_rate
        moved = {name: optax.incremental_update(new, params[name], rate) for name, new in targets.items()}
        return params | moved, optimiser

    def _apply(self, name: str, gradients: Any, params: Any, optimiser: Any) -> tuple[Any, Any]:
        updates, inner = self.optimisers[name].update(gradients, optimiser[name], params[name])
        return params | {name: optax.apply_updates(params[name], updates)}, optimiser | {name: inner}


def make_agent(make_policy: Callable[[], ActorCritic], config: TrainConfig) -> Agent:
    """Return the agent that trains on one device with batches of transitions."""
    graph, _ = nnx.split(nnx.eval_shape(make_policy), nnx.Param)
    td3, update = _compiled(graph, config.optimiser, config.actor_critic, config.seed)
    return Agent(lambda: td3.init(make_policy()), update, graph)


@lru_cache(maxsize=8)  # runs of equal policies in one process are traced and compiled once
def _compiled(graph: Any, optimiser: OptimiserConfig, settings: ActorCriticConfig, seed: int) -> tuple[TD3, TrainStep]:
    td3 = TD3(graph, optimiser, settings, seed)
    return td3, jax.jit(td3.update, donate_argnums=0)
