"""Agents: each file contains a whole algorithm, its policy, losses and update."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from ringrl.config import ModelConfig, TrainConfig
from ringrl.model.agents import imitation, td3
from ringrl.model.agents.agent import Agent, Policy, TrainState
from ringrl.model.parallel import ONE_DEVICE, Parallel

__all__ = ["Agent", "Policy", "TrainState", "make_agent", "make_policy"]


def make_policy(
    config: ModelConfig, observation_size: int, action_size: int, seed: int, parallel: Parallel = ONE_DEVICE
) -> Policy:
    """Return the configured policy with parameters drawn from the seed. `parallel` shards a policy with a context."""
    rngs = nnx.Rngs(params=seed)
    if config.kind == "td3_bc":
        return td3.ActorCritic(config, observation_size, action_size, rngs)
    if config.kind == "behaviour_cloning":
        return imitation.BehaviourCloning(config, observation_size, action_size, rngs)
    return imitation.AgenticTransformer(config, observation_size, action_size, rngs, parallel)


def make_agent(make_policy: Callable[[], Any], config: TrainConfig, parallel: Parallel = ONE_DEVICE) -> Agent:
    """Return the agent that trains the policy of `make_policy`. On a mesh, the policy is created in shards."""
    if config.model.kind == "td3_bc":
        return td3.make_agent(make_policy, config)
    return imitation.make_agent(make_policy, config, parallel)
