"""Aggregates of the results: one row per training run, per point of a chart, per comparison."""

import json
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ringrl.evaluation.records import ReferenceReturns, default_recipe
from ringrl.evaluation.scores import random_return, score_or_none
from ringrl.evaluation.statistics import (
    LEVEL,
    difference,
    estimate,
    holm,
    interquartile_mean,
    mean_test,
    probability_of_improvement,
    rank_correlation,
)
from ringrl.report.results import CELL, CONTEXT_KINDS, RUN, TRAINING, UNPROMPTED

METRICS = ["mean", "first", "last", "best"]
ENOUGH_RUNS = 5
"""Least number of runs for a correlation of held-out loss and return."""
RETURNS = [
    *CELL, "mean", "iqm", "low", "high", "control", "first", "last", "last_control", "best", "best_control", "score",
    "seeds", "episodes", "failed",
]  # fmt: skip
"""Columns of the table of returns."""


def strata(scores: Sequence[pd.Series]) -> tuple[list[np.ndarray], list[int]]:
    """Return the scores (runs,) of each task and a label per task: tasks of one label have the same training runs.

    Where training runs were measured in several tasks, only the runs measured in each of these tasks count there.
    """
    shared: dict[int, pd.Index] = {}
    labels = []
    for index, runs in enumerate(scores):
        label = next((label for label, names in shared.items() if len(names.intersection(runs.index))), index)
        names = shared.get(label, runs.index)
        shared[label] = names[names.isin(runs.index)]
        labels.append(label)
    kept = [runs.loc[shared[label]] for runs, label in zip(scores, labels, strict=True)]
    return [runs.to_numpy(np.float64) for runs in kept], labels


def contrast(ours: pd.Series, theirs: pd.Series) -> dict[str, Any]:
    """Return the difference of two cells of one task, given their scores indexed by training run.

    The result has the columns from "before" (theirs) to "paired" of `conclusion.verdicts`. Cells with the same seeds
    are compared seed by seed, because a seed selects the training data and the held-out episodes. If the cells share
    training runs, only the shared runs count, and they are pairs, too.
    """
    by_seed = [runs.rename(index=lambda run: run.rpartition("#")[2]) for runs in (ours, theirs)]
    if set(by_seed[0].index) == set(by_seed[1].index):
        ours, theirs = by_seed
    shared = ours.index[ours.index.isin(theirs.index)]
    paired = len(shared) > 0
    sides = [(runs.loc[shared] if paired else runs).to_numpy(np.float64) for runs in (ours, theirs)]
    change, test = difference(*sides, paired=paired), mean_test(*sides, paired=paired)
    row = {
        "before": middle(sides[1]), "after": middle(sides[0]), "change": change.value, "low": change.low,
        "high": change.high, "seeds": change.runs, "paired": paired,
    }  # fmt: skip
    if test is None:
        return row
    wins = probability_of_improvement(*sides, paired=paired)
    # The test is of means, so it is no evidence where the interquartile means have the opposite order.
    p_value = test.p_value if test.difference * change.value > 0 else 1.0
    row |= {"detectable": test.detectable, "p": p_value}
    return row | {"wins": wins.value, "wins_low": wins.low, "wins_high": wins.high}


def run_scores(results: pd.DataFrame, counted: str = "counts") -> pd.DataFrame:
    """Return the scores of each training run: mean, first, last and best return, averaged over its streams.

    The last episode of a stream that failed is missing. No earlier episode takes its place. The column `counted`
    selects episodes: "counts", or "paired" for episodes with and without memory.
    """
    rows = results[results[counted] & (results["kind"] != "data")]
    rows = rows.assign(
        first=rows["return"].where(rows["episode"] == 1),
        last=rows["return"].where(rows["episode"] == rows["test_trajectories"]),
    )
    streams = rows.groupby([*RUN, "memory", "stream"], as_index=False).agg(
        mean=("return", "mean"), first=("first", "max"), last=("last", "max"), best=("return", "max"),
        episodes=("return", "size"), run=("run", "first"), kind=("kind", "first"), variant=("variant", "first"),
        family=("family", "first"),
    )  # fmt: skip
    means = {name: (name, "mean") for name in METRICS}
    firsts = {name: (name, "first") for name in ("run", "kind", "variant", "family")}
    runs = streams.groupby([*RUN, "memory"], as_index=False).agg(**means, episodes=("episodes", "sum"), **firsts)
    return runs.set_index([*CELL, "memory"], drop=False).rename_axis([None] * (len(CELL) + 1)).sort_index(kind="stable")


def scores_of(runs: pd.DataFrame, cell: Any, metric: str = "mean", *, memory: bool = True) -> pd.Series:
    """Return a metric of a cell, or of its control, from `run_scores`, by training run in the order of seeds."""
    key = (*(cell[name] for name in CELL), memory)
    return runs.loc[key:key].set_index("run")[metric].dropna()  # a slice also of one row or none


def recorded_runs(results: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return a row of `run_scores` per training run, from its longest rollout, with steps_trained and all settings."""
    cells = table.loc[table["length"].notna() | (table["kind"] == "reference"), CELL]
    recorded = results.groupby(RUN)[["steps_trained", "settings"]].first().reset_index()
    scores = run_scores(results).query("memory").reset_index(drop=True)
    found = scores.merge(cells, on=CELL).merge(recorded, on=RUN).sort_values("test_trajectories")
    found["settings"] = [default_recipe() | json.loads(settings) for settings in found["settings"]]
    return found.drop_duplicates(TRAINING, keep="last")


def middle(scores: pd.Series | np.ndarray) -> float:
    """Return the interquartile mean; NaN if there are no scores."""
    return float(interquartile_mean(np.asarray(scores, np.float64))) if len(scores) else float("nan")


def returns_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method, task and context length: the columns of RETURNS, "kind", "variant", "family" and
    the place on a curve ("curve", "length").

    Per task the methods without context come first, then the dataset, then the curves. NaN is not measured.
    """
    runs = run_scores(results)
    failed = results[results["return"].isna()].groupby(CELL).size()
    recorded = _reference_returns(results)
    rows = [
        _return_row(runs, group.iloc[0], failed, recorded[str(key[0])])
        for key, group in runs[runs["memory"]].groupby(CELL)
    ]
    for task, group in results[results["kind"] == "data"].groupby("task"):
        returns = group["return"].dropna()
        for name, value, episodes in (
            ("Dataset, all episodes", returns.mean(), len(returns)), ("Dataset, best episode", returns.max(), 1),
        ):  # fmt: skip
            named = {"task": task, "method": name, "kind": "data", "variant": name, "family": "data"}
            score = score_or_none(str(task), value, recorded[task])
            rows.append(named | {"mean": value, "iqm": value, "score": score, "episodes": episodes, "failed": 0})
    table = pd.DataFrame(rows, columns=[*RETURNS, "kind", "variant", "family"])
    counts = [*CELL[2:], "seeds", "episodes", "failed"]
    table[counts] = table[counts].astype("float64").astype("Int64")
    values = [name for name in RETURNS if name not in (*CELL, *counts)]
    table[values] = table[values].astype("float64")
    order = table["kind"].map({"reference": 0, "data": 2, "context": 3, "prompt control": 4})
    order = order.where(table["family"] == "random", order + 1)
    table = table.assign(order=order).sort_values(["task", "order", *CELL[1:]], ignore_index=True)
    return _place_on_curves(table.drop(columns="order"))


def _reference_returns(results: pd.DataFrame) -> dict[str, ReferenceReturns]:
    """Return the returns that score 0 and 100, by task; None if the dataset does not name them."""
    return {
        str(task): next((returns for returns in group if isinstance(returns, tuple)), None)
        for task, group in results.groupby("task")["reference_returns"]
    }


def _return_row(runs: pd.DataFrame, cell: pd.Series, failed: pd.Series, recorded: ReferenceReturns) -> dict[str, Any]:
    scores = {metric: scores_of(runs, cell, metric) for metric in METRICS}
    # Without context the episodes of a stream are independent, and the first episode remembers none: its own control.
    is_own = cell["kind"] == "reference" or cell["test_trajectories"] == 1
    control = {metric: scores_of(runs, cell, metric, memory=is_own) for metric in METRICS}
    found = estimate([scores["mean"]])
    return {name: cell[name] for name in [*CELL, "kind", "variant", "family"]} | {
        "mean": scores["mean"].mean(),
        "iqm": found.value,
        "low": found.low,
        "high": found.high,
        "control": middle(control["mean"]),
        **{f"{metric}_control": middle(control[metric]) for metric in ("last", "best")},
        **{metric: middle(scores[metric]) for metric in ("first", "last", "best")},
        "score": score_or_none(cell["task"], found.value, recorded),
        "seeds": found.runs,
        "episodes": scores_of(runs, cell, "episodes").sum(),
        "failed": failed.get(tuple(cell[CELL]), 0),
    }


def _place_on_curves(table: pd.DataFrame) -> pd.DataFrame:
    """Add "curve" and "length": the curve against context length that a row is a point of; NaN if it is on none.

    If every training length has one rollout length, the curve is over training lengths. Otherwise each training length
    has a curve over rollout lengths. Rollouts with a prompt, and the rollouts without one that they are compared with,
    are points of the chart of prompts. If all rollouts of a method on a task have prompts of one length, these are on
    the curve.
    """
    curve, length = pd.Series(None, table.index, dtype=object), pd.Series(np.nan, table.index)
    is_alike = table.groupby(["task", "method"])["prompt_trajectories"].transform("nunique") == 1
    on_curves = table[(table["kind"] == "context") & (is_alike | (table["prompt_trajectories"] == 0))]
    prompted = table[~is_alike & (table["prompt_trajectories"] > 0)]
    compared = pd.MultiIndex.from_frame(on_curves[UNPROMPTED]).isin(pd.MultiIndex.from_frame(prompted[UNPROMPTED]))
    on_curves = on_curves[~compared | (on_curves["train_trajectories"] == on_curves["test_trajectories"])]
    for _, group in on_curves.groupby(["task", "method"]):
        if group["train_trajectories"].is_unique:
            curve[group.index], length[group.index] = "", group["train_trajectories"]
        else:
            curve[group.index] = [f"trained on {count:.0f}" for count in group["train_trajectories"]]
            length[group.index] = group["test_trajectories"]
    return table.assign(curve=curve, length=length)


def levels(table: pd.DataFrame, task: str) -> pd.DataFrame:
    """Return the rows of a task without context, of each method the row of the most episodes."""
    rows = table[(table["task"] == task) & (table["kind"] == "reference")]
    return rows.loc[sorted(rows.groupby("method", sort=False)["episodes"].idxmax())]


def tasks_like_random(results: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """Return the tasks in which no policy clearly beats the random policy.

    A policy clearly beats it if the p-value of its runs against the random policy's return, corrected for all policies
    (Holm), is below LEVEL. The random policy has no training runs, so its return counts as exact: the measured return,
    or else the domain's constant. Tasks without either are left out.
    """
    runs, measured = run_scores(results), table[table["family"] == "random"].dropna(subset="iqm").groupby("task")["iqm"]
    policies = table[table["kind"].isin(["context", "reference"]) & (table["family"] != "random")]
    recorded = _reference_returns(results)
    known = {task: random_return(task, recorded[task]) for task in policies["task"]} | measured.first().to_dict()
    policies, p_values = policies[policies["task"].map(known).notna()], []
    for _, cell in policies.iterrows():
        scores = scores_of(runs, cell).to_numpy(np.float64)
        test = mean_test(scores, np.full_like(scores, known[cell["task"]]), paired=True)
        p_values.append(test.p_value if test and test.difference > 0 else 1.0)
    clear = policies["task"][holm(np.array(p_values)) < LEVEL]
    return sorted({*policies["task"]} - {*clear})


def normalised_scores(results: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return normalised scores over all tasks, at the context lengths that every task has one curve through.

    Columns: method, length, iqm, low, high, seeds.
    """
    runs, rows, points = run_scores(results), [], table[table["length"].notna()]
    points = points[points.groupby(["task", "method"])["curve"].transform("nunique") == 1]
    tasks = table.loc[table["length"].notna(), "task"].unique()
    recorded = _reference_returns(results)
    if len(tasks) < 2 or any(score_or_none(task, 0.0, recorded[task]) is None for task in tasks):
        points = points.iloc[:0]
    for key, cells in points.groupby(["method", "length"]):
        if len(cells) == len(tasks) and set(cells["task"]) == set(tasks):
            own = [
                (cell, partial(score_or_none, cell["task"], recorded=recorded[cell["task"]]))
                for _, cell in cells.iterrows()
            ]
            scores, together = strata([scores_of(runs, cell).map(score) for cell, score in own])
            rows.append((*key, *astuple(estimate(scores, together=together))))
    return pd.DataFrame(rows, columns=["method", "length", "iqm", "low", "high", "seeds"])


def ends_of_curve(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return a method's rows of the shortest and longest context on the curve of its longest training length."""
    longest = rows[rows["curve"] == rows.loc[rows["train_trajectories"].idxmax(), "curve"]].sort_values("length")
    return longest.iloc[0], longest.iloc[-1]


def intervals(scores: pd.DataFrame, by: Sequence[str], value: str = "value") -> pd.DataFrame:
    """Return the interquartile mean of the column `value` in each group of training runs: iqm, low, high and seeds."""
    groups = scores.groupby(list(by))[value]
    rows = [(*key, *astuple(estimate([values]))) for key, values in groups]
    return pd.DataFrame(rows, columns=[*by, "iqm", "low", "high", "seeds"])


def episode_returns(results: pd.DataFrame) -> pd.DataFrame:
    """Return the interquartile mean return of each episode of a rollout, one row per cell, memory and episode."""
    rows = results[results["counts"] & (results["kind"] == "context") & (results["prompt_trajectories"] == 0)]
    runs = rows.groupby([*RUN, "memory", "episode"], as_index=False)["return"].mean()
    return intervals(runs, [*CELL, "memory", "episode"], "return")


def prompt_returns(results: pd.DataFrame) -> pd.DataFrame:
    """Return the mean return after prompts of each length, one row per cell, over starts common to all lengths.

    Lengths are compared within one method, training length and rollout length. Starts that lack one of the lengths are
    left out. A start counts once, however many prompts it follows.
    """
    rows = results[results["counts"] & results["memory"] & results["kind"].isin(CONTEXT_KINDS)]
    several = rows.groupby(UNPROMPTED)["prompt_trajectories"].transform("nunique")
    lengths = rows.groupby([*UNPROMPTED, "seed", "start"])["prompt_trajectories"].transform("nunique")
    common = rows[(several > 1) & (lengths == several)]
    starts = common.groupby([*RUN, "run", "start"], as_index=False)["return"].mean()
    return starts.groupby([*RUN, "run"], as_index=False).agg(value=("return", "mean"))


def training_table(results: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the training cost of each method and length. steps_trained is NaN if the last step was evaluated."""
    by = ["task", "method", "train_trajectories"]
    costs = (
        results[~results["kind"].isin(["data", "prompt control"])]
        .groupby([*by, "seed"])[["steps", "steps_trained", "converged", "tokens", "flops", "seconds"]]
        .first()
    )
    means = costs.astype("float64").groupby(by).mean()
    means["steps_trained"] = means["steps_trained"].where(means["steps_trained"] < means["steps"])
    logs = runs.groupby(by).agg(
        tokens_per_second=("tokens_per_second", lambda speeds: middle(speeds.dropna())),
        peak_memory=("peak_memory", "max"),
    )
    table = means.join(logs, how="outer").astype("float64").dropna(how="all").reset_index()
    return table.assign(train_trajectories=table["train_trajectories"].replace(0, np.nan))


def context_label(cell: Any) -> str:
    """Return the context length in words: "4 trajectories", or both lengths if training and rollout differ."""
    train, test = int(cell["train_trajectories"]), int(cell["test_trajectories"])
    if train == test:
        return f"{test} trajector{'y' if test == 1 else 'ies'}"
    return f"trained on {train}, rolled out for {test}"


def loss_points(results: pd.DataFrame, table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the held-out loss and the return of each training run of `provenance.training_runs` that has both.

    The loss is the last one up to the evaluated step, on the scale of the run's action head. Columns: task (with the
    action head if it is not the default), method, train_trajectories, seed, loss and value (return per episode).
    """
    known = recorded_runs(results, table).merge(runs[[*TRAINING, "steps", "held_out"]], on=TRAINING)
    usual, found = default_recipe()["model.action_head"], []
    for _, run in known.iterrows():
        until = np.inf if pd.isna(run["steps_trained"]) else run["steps_trained"]
        losses = run["held_out"][np.isfinite(run["held_out"]) & (run["steps"] <= until)]
        head = run["settings"]["model.action_head"]
        task = run["task"] if head == usual else f"{run['task']}, {head} head"
        if len(losses):
            found.append((task, *run[TRAINING[1:]], losses[-1], run["mean"]))
    return pd.DataFrame(found, columns=[*TRAINING, "loss", "value"])


def loss_correlations(points: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation of held-out loss and return, one row per task with enough runs.

    Columns: task, runs, correlation, low and high (bootstrap over runs).
    """
    rows = []
    for task, group in points.groupby("task"):
        if len(group) >= ENOUGH_RUNS:
            found = rank_correlation(*group[["loss", "value"]].to_numpy().T)
            rows.append((task, found.runs, found.value, found.low, found.high))
    return pd.DataFrame(rows, columns=["task", "runs", "correlation", "low", "high"])


def loss_sentence(correlations: pd.DataFrame) -> str:
    """Return on how many tasks a lower held-out loss goes with a higher return."""
    clear, total = int((correlations["high"] < 0).sum()), len(correlations)
    return f"Held-out loss predicts return on {clear} of {total} task{'s' if total > 1 else ''}."
