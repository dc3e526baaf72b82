"""The study: many runs of one plan, and the page that compares them.

`read_plan` reads a plan, `ablate` trains and evaluates what it crosses, `write_report` makes the page from the results
and `write_comparison` one of the differences between two sets of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringrl.study.plan import AblationPlan, read_plan
    from ringrl.study.report import write_report
    from ringrl.study.report_compare import write_comparison
    from ringrl.study.runner import ablate

__all__ = ["AblationPlan", "ablate", "read_plan", "write_comparison", "write_report"]

_HOMES = {
    "AblationPlan": "plan",
    "ablate": "runner",
    "read_plan": "plan",
    "write_comparison": "report_compare",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: a report needs no MuJoCo, and a plan no Matplotlib."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
