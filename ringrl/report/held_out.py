"""Held-out loss against return: whether the loss on held-out episodes predicts the return of a policy."""

import numpy as np
import pandas as pd

from ringrl.evaluation.statistics import rank_correlation
from ringrl.report.results import usual_settings
from ringrl.report.tables import recorded_runs

ENOUGH_RUNS = 5
"""Least number of runs for a correlation."""
_KEY = ["task", "method", "train_trajectories", "seed"]
_COLUMNS = ["task", "runs", "correlation", "low", "high"]


def loss_points(results: pd.DataFrame, table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the held-out loss and the return of each training run that has both.

    The loss is the last one up to the evaluated step, on the scale of the run's action head. Columns: task (with the
    action head if it is not the default), method, train_trajectories, seed, loss and value (return per episode).

    Args:
        results: the table of `read_results`.
        table: the table of `returns_table`.
        runs: the table of `provenance.training_runs`.
    """
    known = recorded_runs(results, table).merge(runs[[*_KEY, "steps", "held_out"]], on=_KEY)
    usual, found = usual_settings()["model.action_head"], []
    for _, run in known.iterrows():
        until = np.inf if pd.isna(run["steps_trained"]) else run["steps_trained"]
        losses = run["held_out"][np.isfinite(run["held_out"]) & (run["steps"] <= until)]
        head = run["settings"]["model.action_head"]
        task = run["task"] if head == usual else f"{run['task']}, {head} head"
        if len(losses):
            found.append((task, *run[_KEY[1:]], losses[-1], run["mean"]))
    return pd.DataFrame(found, columns=[*_KEY, "loss", "value"])


def loss_correlations(points: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation of held-out loss and return, one row per task with enough runs.

    Columns: task, runs, correlation, low and high (bootstrap over runs).
    """
    rows = []
    for task, group in points.groupby("task"):
        if len(group) >= ENOUGH_RUNS:
            found = rank_correlation(*group[["loss", "value"]].to_numpy().T)
            rows.append((task, found.runs, found.value, found.low, found.high))
    return pd.DataFrame(rows, columns=_COLUMNS)


def loss_sentence(correlations: pd.DataFrame) -> str:
    """Return on how many tasks a lower held-out loss goes with a higher return."""
    clear, total = int((correlations["high"] < 0).sum()), len(correlations)
    return f"Held-out loss predicts return on {clear} of {total} task{'s' if total > 1 else ''}."
