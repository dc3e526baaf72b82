"""The study: `read_plan` reads a plan of many runs, `ablate` trains and evaluates its cells."""

from ringrl.study.plan import AblationPlan, read_plan
from ringrl.study.runner import ablate

__all__ = ["AblationPlan", "ablate", "read_plan"]
