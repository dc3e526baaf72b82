"""The study: many runs of one plan.

`read_plan` reads a plan, `ablate` trains and evaluates its cells. `ringrl.report` makes a page from the results.
"""

from ringrl.study.plan import AblationPlan, read_plan
from ringrl.study.runner import ablate

__all__ = ["AblationPlan", "ablate", "read_plan"]
