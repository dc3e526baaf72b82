"""Models: a context of trajectories in, actions out."""

from ringrl.model.cache import KVCache, grow
from ringrl.model.policy import AgenticTransformer, BehaviourCloning, Policy, make_policy
from ringrl.model.tokens import TOKEN_SETS

__all__ = ["TOKEN_SETS", "AgenticTransformer", "BehaviourCloning", "KVCache", "Policy", "grow", "make_policy"]
