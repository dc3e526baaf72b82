"""One interface for everything that is trained: init, update, policy. What tells methods apart stays behind it.

    state = agent.init()
    state, metrics = agent.update(state, batch)                     # with every batch of the method's sampler
    policy = agent.policy(state.params)
    memory = policy.reset(streams, tokens)
    action, memory = policy.act(previous, current, memory)          # at every timestep

An agent holds no numbers: what it learned is in the state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ringrl.config import TrainConfig
from ringrl.model import ActorCritic, Policy
from ringrl.model.parallel import ONE_DEVICE, Parallel
from ringrl.training.actor_critic import initial_actor_critic_state, make_actor_critic_step
from ringrl.training.optimiser import make_optimiser
from ringrl.training.step import TrainState, make_train_step, sharded_initial_state, with_params


@dataclasses.dataclass(frozen=True)
class Agent:
    """A method that is trained.

    Attributes:
        init: the state before the first step; the same whenever it is called.
        update: one optimiser step with a batch of contexts (transitions, for an actor with critics). It is jitted and
            takes the given state's memory; metrics are scalars, among them loss, gradient_norm and skipped.
        graph: the policy's structure, without its parameters.
        tokens_per_step: that a timestep takes of a context.
    """

    init: Callable[[], TrainState]
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    graph: Any
    tokens_per_step: int

    def policy(self, params: Any) -> Policy:
        """The policy with these parameters (of a TrainState)."""
        policy: Policy = with_params(self.graph, params)
        return policy


def make_agent(make_policy: Callable[[], Policy], config: TrainConfig, parallel: Parallel = ONE_DEVICE) -> Agent:
    """The agent of a policy: TD3(+BC) for an actor with critics, imitation for all others.

    The policy is made on the devices of the mesh, piece by piece.
    """
    shape = nnx.eval_shape(make_policy)
    graph, _ = nnx.split(shape, nnx.Param)
    if isinstance(shape, ActorCritic):
        return Agent(
            init=lambda: initial_actor_critic_state(make_policy(), config),
            update=make_actor_critic_step(shape, config),
            graph=graph,
            tokens_per_step=shape.tokens_per_step,
        )
    optimiser = make_optimiser(config.optimiser)
    return Agent(
        init=lambda: sharded_initial_state(make_policy, optimiser, parallel),
        update=make_train_step(graph, optimiser, config.optimiser.accumulation),
        graph=graph,
        tokens_per_step=shape.tokens_per_step,
    )
