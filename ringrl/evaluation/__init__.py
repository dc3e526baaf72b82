"""Evaluation: rollouts by one protocol for all methods, records of their results, and statistics."""

from ringrl.evaluation.evaluate import evaluate_all, evaluate_policy, roll_out
from ringrl.evaluation.policy import Player, TrainedPolicy, load_policy
from ringrl.evaluation.progress import EvaluationProgress
from ringrl.evaluation.protocol import Evaluation, Protocol, policy_evaluation, random_evaluation
from ringrl.evaluation.records import EvaluationRecord, read_records
from ringrl.evaluation.video import VideoOptions

__all__ = [
    "Evaluation", "EvaluationProgress", "EvaluationRecord", "Player", "Protocol", "TrainedPolicy", "VideoOptions",
    "evaluate_all", "evaluate_policy", "load_policy", "policy_evaluation", "random_evaluation", "read_records",
    "roll_out",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
