"""Agents: each file contains a whole algorithm, its policy, losses and update.

`Family.agent` in `ringrl.methods` names the file. The file defines `make_policy` and `make_agent`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from flax import nnx

from ringrl.config import ModelConfig, TrainConfig
from ringrl.model.agents.agent import Agent, TrainState
from ringrl.model.agents.td3 import Goal
from ringrl.model.parallel import ONE_DEVICE, Parallel
from ringrl.model.policy import Policy

__all__ = ["Agent", "TrainState", "make_agent", "make_policy"]


def make_policy(
    config: ModelConfig,
    observation_size: int,
    action_size: int,
    seed: int,
    goal: Goal | None = None,
    parallel: Parallel = ONE_DEVICE,
) -> Policy:
    """Return the configured policy with parameters drawn from the seed.

    Args:
      config: settings of the model.
      observation_size: components of an observation.
      action_size: components of an action.
      seed: seed of the parameters.
      goal: goal position of the task. Only families with `has_goal` use it.
      parallel: mesh over which a policy with a context is sharded.
    """
    module, rngs = _module(config), nnx.Rngs(params=seed)
    policy: Policy = module.make_policy(config, observation_size, action_size, rngs, goal=goal, parallel=parallel)
    return policy


def make_agent(make_policy: Callable[[], Policy], config: TrainConfig, parallel: Parallel = ONE_DEVICE) -> Agent:
    """Return the agent that trains the configured policy. On a mesh, the policy is created in shards."""
    agent: Agent = _module(config.model).make_agent(make_policy, config, parallel)
    return agent


def _module(config: ModelConfig) -> Any:
    return import_module(f"{__name__}.{config.family.agent}")
