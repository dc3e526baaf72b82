"""Networks, policies and agents."""

from ringrl.model.agents import Agent, Policy, TrainState, make_agent, make_policy
from ringrl.model.agents.imitation import AgenticTransformer, BehaviourCloning
from ringrl.model.agents.td3 import ActorCritic
from ringrl.model.cache import KVCache, grow
from ringrl.model.tokens import TOKEN_SETS

__all__ = [
    "TOKEN_SETS", "ActorCritic", "Agent", "AgenticTransformer", "BehaviourCloning", "KVCache", "Policy", "TrainState",
    "grow", "make_agent", "make_policy",
]  # fmt: skip
