"""How each kind of policy is trained: its first state and its step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ringrl.config import TrainConfig
from ringrl.model import ActorCritic, Policy
from ringrl.training.actor_critic import initial_actor_critic_state, make_actor_critic_step
from ringrl.training.optimiser import make_optimiser
from ringrl.training.step import TrainState, initial_state, make_train_step


class Learner(NamedTuple):
    """What training a policy takes."""

    state: TrainState  # before the first step
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]  # of a state and a batch of its sampler


def make_learner(policy: Policy, config: TrainConfig) -> Learner:
    """The learner of a policy: TD3+BC for an actor with critics, imitation for all others."""
    if isinstance(policy, ActorCritic):
        return Learner(initial_actor_critic_state(policy, config), make_actor_critic_step(policy, config))
    optimiser = make_optimiser(config.optimiser)
    return Learner(initial_state(policy, optimiser), make_train_step(policy, optimiser))
