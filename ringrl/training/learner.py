"""How each kind of policy is trained: its first state and its step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from ringrl.config import TrainConfig
from ringrl.model import ActorCritic, Policy
from ringrl.model.parallel import ONE_DEVICE, Parallel
from ringrl.training.actor_critic import initial_actor_critic_state, make_actor_critic_step
from ringrl.training.optimiser import make_optimiser
from ringrl.training.step import TrainState, make_train_step, sharded_initial_state


class Learner(NamedTuple):
    """What training a policy takes."""

    state: TrainState  # before the first step
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]  # of a state and a batch of its sampler
    tokens_per_step: int  # that a timestep takes of a context


def make_learner(make_policy: Callable[[], Policy], config: TrainConfig, parallel: Parallel = ONE_DEVICE) -> Learner:
    """The learner of a policy: TD3+BC for an actor with critics, imitation for all others.

    The policy is made on the devices of the mesh, piece by piece.
    """
    if config.model.kind == "td3_bc":
        policy = make_policy()
        assert isinstance(policy, ActorCritic)
        state = initial_actor_critic_state(policy, config)
        return Learner(state, make_actor_critic_step(policy, config), policy.tokens_per_step)
    optimiser = make_optimiser(config.optimiser)
    shape = nnx.eval_shape(make_policy)
    graph, _ = nnx.split(shape, nnx.Param)
    state = sharded_initial_state(make_policy, optimiser, parallel)
    step = make_train_step(graph, optimiser, config.optimiser.accumulation)
    return Learner(state, step, shape.tokens_per_step)
