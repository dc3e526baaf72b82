"""The study: many runs of one plan.

`read_plan` reads a plan, `ablate` trains and evaluates its cells. `ringrl.report` makes a page from the results.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringrl.study.plan import AblationPlan, read_plan
    from ringrl.study.runner import ablate

__all__ = ["AblationPlan", "ablate", "read_plan"]

_HOMES = {"AblationPlan": "plan", "ablate": "runner", "read_plan": "plan"}


def __getattr__(name: str) -> Any:
    """Import a name when it is used first: reading a plan needs no JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
