"""Target return of an evaluation: the return-to-go at the start of every episode, chosen by `--target`."""

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from jaxtyping import Float

from ringrl.data import EpisodeStore
from ringrl.data.sampling.held_out import held_out
from ringrl.data.sampling.sampler import eligible_episodes
from ringrl.errors import UserError
from ringrl.evaluation.formatting import all_digits
from ringrl.training.checkpoints import RunInfo

NO_TARGET = "none"  # name of the rule in records of methods without a target return


@dataclass(frozen=True)
class TargetPolicy:
    """A rule for the target return."""

    kind: Literal["given", "factor", "quantile"]  # a return; a multiple of the data's best return; a quantile of them
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse "best", "0.9x" (of the best), "q0.75" (quantile) or a return. UserError for anything else."""
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
        """Name of the rule in records: "data_best", "0.9x data_best", "data_quantile_0.75" or "given"."""
        value = all_digits(self.value)
        if self.kind == "quantile":
            return f"data_quantile_{value}"
        if self.kind == "factor":
            return "data_best" if self.value == 1 else f"{value}x data_best"
        return "given"

    def needs_dataset(self, info: RunInfo, task: str) -> bool:
        """Return whether the target in a task depends on returns that the checkpoint of a run does not contain."""
        return self.kind == "quantile" or (self.kind == "factor" and task != info.config.task)

    def choose(self, returns: Float[np.ndarray, " episodes"]) -> float:
        """Return the target return, given the returns of the training data."""
        if self.kind == "quantile":
            return float(np.quantile(returns.astype(np.float64), self.value))
        return self.value * float(returns.max()) if self.kind == "factor" else self.value


def trained_returns(info: RunInfo, task: str, store: EpisodeStore | None) -> Float[np.ndarray, " episodes"]:
    """Return the returns, in a task, of the episodes that training would select for this task.

    Without the store, return the best of them in the run's own task, which the checkpoint contains.
    """
    if store is None:
        return np.array([info.best_return])
    config, context = info.config, info.config.context
    selection = context.max_transitions, context.best_fraction, held_out(store, config)
    chosen = eligible_episodes(store, task, config.seed, *selection)
    return store.returns(task)[chosen]
