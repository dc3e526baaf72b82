"""Target-return policies: how the return that a policy is asked for is chosen."""

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from jaxtyping import Float

from ringrl.errors import UserError
from ringrl.evaluation.formatting import all_digits

NO_TARGET = "none"  # the policy of methods that are asked for no return


@dataclass(frozen=True)
class TargetPolicy:
    """The return asked for, by a rule.

    Attributes:
        kind: "given": the value itself; "factor": so many times the best return of the data that was trained on;
            "quantile": that quantile of its returns.
        value: return, factor or quantile.
    """

    kind: Literal["given", "factor", "quantile"]
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "best", "0.9x" (of the best), "q0.75" (quantile) or a return.

        Raises:
          UserError: anything else.
        """
        text = text.strip().lower()
        if text == "best":
            return cls("factor", 1.0)
        try:
            if text.endswith("x"):
                found = cls("factor", float(text[:-1]))
            elif text.startswith("q"):
                found = cls("quantile", float(text[1:]))
            else:
                found = cls("given", float(text))
        except ValueError:
            found = cls("given", math.nan)
        if not math.isfinite(found.value) or (found.kind == "quantile" and not 0 <= found.value <= 1):
            raise UserError(
                f'--target: {text!r} is not a target; give "best", a return (800), "0.9x" (of the best) or "q0.75"'
            )
        return found

    @property
    def name(self) -> str:
        """As it stands in results: "data_best", "0.9x data_best", "data_quantile_0.75" or "given"."""
        value = all_digits(self.value)
        if self.kind == "quantile":
            return f"data_quantile_{value}"
        if self.kind == "factor":
            return "data_best" if self.value == 1 else f"{value}x data_best"
        return "given"

    def choose(self, returns: Float[np.ndarray, " episodes"]) -> float:
        """The return asked for where the data's episodes have these returns."""
        if self.kind == "quantile":
            return float(np.quantile(returns.astype(np.float64), self.value))
        return self.value * float(returns.max()) if self.kind == "factor" else self.value
