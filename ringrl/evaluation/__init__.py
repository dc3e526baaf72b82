"""Evaluation: policies rolled out for n episodes in one context, what is written down of them, and statistics.

`evaluate_policy` and `evaluate_random` roll out what a `Protocol` says; `read_records` reads the results of `ringrl
evaluate`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringrl.evaluation.protocol import Protocol, evaluate_policy, evaluate_random
    from ringrl.evaluation.records import EvaluationRecord, read_records

__all__ = ["EvaluationRecord", "Protocol", "evaluate_policy", "evaluate_random", "read_records"]

_HOMES = {
    "Protocol": "protocol",
    "evaluate_policy": "protocol",
    "evaluate_random": "protocol",
    "EvaluationRecord": "records",
    "read_records": "records",
}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: the process that draws videos must choose its OpenGL before MuJoCo is imported."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
