"""Policies that map a context of trajectories to actions."""

from ringrl.model.actor_critic import ActorCritic, Goal
from ringrl.model.cache import KVCache, grow
from ringrl.model.policy import AgenticTransformer, BehaviourCloning, Policy, make_policy
from ringrl.model.tokens import TOKEN_SETS

__all__ = [
    "TOKEN_SETS",
    "ActorCritic",
    "AgenticTransformer",
    "BehaviourCloning",
    "Goal",
    "KVCache",
    "Policy",
    "grow",
    "make_policy",
]
