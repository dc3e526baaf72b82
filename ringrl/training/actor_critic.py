"""One step of TD3+BC (2106.06860) as a pure function of the state and a batch of transitions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ringrl.config import TrainConfig
from ringrl.context import Transitions
from ringrl.model import ActorCritic
from ringrl.training.optimiser import make_optimiser
from ringrl.training.step import TrainState, accept, with_params

LEARNED = ("actor", "critics")  # the other parameters follow these; each has an optimiser of its own


def make_optimisers(config: TrainConfig) -> dict[str, optax.GradientTransformation]:
    """One for the critics, and one for the actor, whose schedule is over its own, fewer updates."""
    settings, delay = config.optimiser, config.actor_critic.actor_delay
    fewer = {"steps": -(-settings.steps // delay), "warmup_steps": settings.warmup_steps // delay}
    return {"actor": make_optimiser(settings.model_copy(update=fewer)), "critics": make_optimiser(settings)}


def initial_actor_critic_state(policy: nnx.Module, config: TrainConfig) -> TrainState:
    """The state before the first step; targets equal what they follow."""
    params = nnx.to_pure_dict(nnx.state(policy, nnx.Param))
    params |= {f"target_{name}": jax.tree.map(jnp.copy, params[name]) for name in LEARNED}  # memory of their own
    optimisers = {name: optimiser.init(params[name]) for name, optimiser in make_optimisers(config).items()}
    return TrainState(params, optimisers, jnp.zeros((), jnp.int32))


def make_actor_critic_step(
    policy: ActorCritic, config: TrainConfig
) -> Callable[[TrainState, Transitions], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted step: the critics', and every `actor_delay`-th time the actor's and the targets'.

    The state is donated; noise follows from the seed and the state's step. Metrics: loss and gradient_norm (before
    clipping) of the critics, value, the mean of what they are asked to say, and skipped (0 or 1), as in
    `make_train_step`.
    """
    graph, _ = nnx.split(policy, nnx.Param)
    optimisers, settings = make_optimisers(config), config.actor_critic

    def apply(name: str, gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
        updates, inner = optimisers[name].update(gradients, state[name], params[name])
        return params | {name: optax.apply_updates(params[name], updates)}, state | {name: inner}

    def update_actor(params: Any, state: Any, batch: Transitions) -> tuple[Any, Any]:
        def loss_of(actor: Any) -> jax.Array:
            return with_params(graph, params | {"actor": actor}).actor_loss(batch, settings.behaviour_cloning)

        params, state = apply("actor", jax.grad(loss_of)(params["actor"]), params, state)
        return _follow(params, settings.target_rate), state

    def train_step(state: TrainState, batch: Transitions) -> tuple[TrainState, dict[str, jax.Array]]:
        params = state.params
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        noise = settings.target_noise * jax.random.normal(key, batch.action.shape)
        noise = jnp.clip(noise, -settings.target_noise_clip, settings.target_noise_clip)
        target = with_params(graph, params).target_value(batch, noise)

        def loss_of(critics: Any) -> jax.Array:
            return with_params(graph, params | {"critics": critics}).critic_loss(batch, target)

        loss, gradients = jax.value_and_grad(loss_of)(params["critics"])
        params, optimiser = apply("critics", gradients, params, state.optimiser)
        params, optimiser = jax.lax.cond(
            state.step % settings.actor_delay == 0,
            lambda: update_actor(params, optimiser, batch),
            lambda: (params, optimiser),
        )
        norm = optax.tree.norm(gradients)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))
        params, optimiser = accept(is_finite, (params, optimiser), (state.params, state.optimiser))
        metrics = {"loss": loss, "gradient_norm": norm, "value": target.mean(), "skipped": 1 - is_finite}
        return TrainState(params, optimiser, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def _follow(params: Any, rate: float) -> Any:
    """Each target moved towards what it follows."""
    moved = {
        f"target_{name}": optax.incremental_update(params[name], params[f"target_{name}"], rate) for name in LEARNED
    }
    return params | moved
