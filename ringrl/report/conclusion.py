"""The sentences of a report: its conclusion, cautions and warnings, all computed from the tables."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ringrl.evaluation.records import default_recipe
from ringrl.evaluation.statistics import LEVEL, holm
from ringrl.methods import METHODS
from ringrl.report.results import CELL, RUN, UNPROMPTED, is_control, settings_of_any_length
from ringrl.report.tables import (
    context_label,
    contrast,
    ends_of_curve,
    levels,
    prompt_returns,
    run_scores,
    scores_of,
)

RIVAL, LENGTH, MEMORY = "Another method", "A longer context", "Memory across episodes"
"""Subjects of comparisons: between methods, between lengths, and with the control."""
ENOUGH_SEEDS = 4
"""Least number of training seeds a side for a verdict of higher or lower."""
_NAMED = 4  # names in a list of many
_RISE = 0.05  # least rise of a held-out loss that counts, as a fraction of the fall of the training loss


def verdicts(results: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return the comparisons of a report, one per row.

    For each task and method, the longest context is compared with the shortest, with its control (memory reset), with
    each trained method without context, and with the method whose variant it is, at the longest length that both have.
    The longest prompt is compared with the shortest, from the same starts, and with the method's own controls of its
    length: changed prompts, and policies made of the prompt alone.

    The largest difference comes first. "before" and "after" are interquartile means, "wins" is the probability that a
    run after beats a run before, "seeds" are those of the smaller side. NaN: a side has one seed.
    """
    runs, paired = run_scores(results), run_scores(results, "paired")
    prompts = prompt_returns(results[results["kind"] == "context"])
    curves = table[table["length"].notna()].groupby(["task", "method"])
    rows = [row for _, group in curves for row in _compare(runs, paired, group)]
    rows += [_compare_methods(runs, cell, other) for cell, other in _rivals(table)]
    rows += [_compare_prompts(group) for _, group in prompts.groupby(UNPROMPTED)]
    return judge(pd.DataFrame(rows, columns=_COLUMNS))


_COLUMNS = ["task", "method", "subject", "compared", "before", "after", "change", "low", "high", "detectable", "p",
            "wins", "wins_low", "wins_high", "seeds", "paired"]  # fmt: skip


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """Add p_holm, corrected for all comparisons of the table, and the verdict. Sort by the size of the difference.

    The verdict is "higher" or "lower" if there are enough seeds, the corrected p-value is below LEVEL and the interval
    excludes zero. Otherwise it is "not resolved", or "not compared" without a difference.
    """
    p_holm = holm(table["p"].to_numpy(np.float64))
    counts = (table["seeds"] >= ENOUGH_SEEDS) & (p_holm < LEVEL)
    cases = [table["change"].isna(), counts & (table["low"] > 0), counts & (table["high"] < 0)]
    verdict = np.select(cases, ["not compared", "higher", "lower"], "not resolved")
    table = table.assign(p_holm=p_holm, verdict=verdict)
    return table.sort_values("change", key=np.abs, ascending=False, kind="stable", ignore_index=True)


def _compare(runs: pd.DataFrame, paired: pd.DataFrame, cells: pd.DataFrame) -> list[dict[str, Any]]:
    (shortest, longest), rows = ends_of_curve(cells), []
    if shortest.name != longest.name:
        sides = scores_of(runs, longest), scores_of(runs, shortest)
        rows.append(_row(longest, LENGTH, _between(shortest, longest), *sides))
    kept, reset = (scores_of(paired, longest, memory=memory) for memory in (True, False))
    if longest["test_trajectories"] > 1 and len(kept):
        rows.append(_row(longest, MEMORY, f"memory reset to kept, {context_label(longest)}", kept, reset))
    return rows or [_row(longest, "Context", context_label(longest))]


def _rivals(table: pd.DataFrame) -> Iterator[tuple[pd.Series, pd.Series]]:
    """Yield the longest context of each method, and its longest prompt, with each cell that it is compared with."""
    for (task, method), group in table[table["length"].notna()].groupby(["task", "method"]):
        cell, others = ends_of_curve(group)[1], levels(table, task)
        for _, other in others[~others["family"].isin(["random", "data"])].iterrows():
            yield cell, other
        lengths = ["train_trajectories", "test_trajectories", "prompt_trajectories"]
        base = METHODS[cell["family"]].title if cell["family"] in METHODS else method
        bases = table[(table["task"] == task) & (table["method"] == base) & (base != method)]
        pairs = [(own, other) for _, own in group.iterrows() for _, other in bases.iterrows()]
        yield from [pair for pair in pairs if (pair[0][lengths] == pair[1][lengths]).all()][-1:]
    prompted = table[(table["kind"] == "context") & (table["prompt_trajectories"] > 0)]
    for (task, _), group in prompted.groupby(["task", "method"]):
        cell = group.sort_values(["train_trajectories", "prompt_trajectories"]).iloc[-1]
        controls = table[(table["task"] == task) & (table["kind"] == "prompt control")]
        controls = controls[controls["train_trajectories"].isin([0, cell["train_trajectories"]])]  # 0: the prompt alone
        for _, other in controls[controls["prompt_trajectories"] == cell["prompt_trajectories"]].iterrows():
            if is_control(other["variant"], cell["variant"]):
                yield cell, other


def _compare_methods(runs: pd.DataFrame, cell: pd.Series, other: pd.Series) -> dict[str, Any]:
    prompt = f" after a prompt of {cell['prompt_trajectories']:.0f}" if cell["prompt_trajectories"] else ""
    compared = f"{other['method']} to {context_label(cell)}{prompt}"
    return _row(cell, RIVAL, compared, scores_of(runs, cell), scores_of(runs, other))


def _compare_prompts(runs: pd.DataFrame) -> dict[str, Any]:
    few, many = runs["prompt_trajectories"].min(), runs["prompt_trajectories"].max()
    sides = [runs[runs["prompt_trajectories"] == length].set_index("run")["value"] for length in (many, few)]
    cell = runs.iloc[0]
    compared = f"prompt of {few} to {many}, trained on {cell['train_trajectories']}"
    return _row(cell, "A longer prompt", compared, *sides)


def _row(cell: pd.Series, subject: str, compared: str, *sides: pd.Series) -> dict[str, Any]:
    row = {"task": cell["task"], "method": cell["method"], "subject": subject, "compared": compared}
    return row | (contrast(*sides) if sides else {"after": cell["iqm"], "seeds": 0, "paired": False})


def headline(found: pd.DataFrame, like_random: Sequence[str]) -> str:
    """Return the conclusion in one sentence, from `verdicts` and `tasks_like_random`."""
    found = found[found["subject"] != RIVAL]
    if (found["subject"] == LENGTH).any():  # a policy may need memory, and not beat a shorter context
        found = found[found["subject"] != MEMORY]
    if found.empty:
        return "No rollouts show whether context helps."
    compared = found[found["verdict"] != "not compared"]
    if compared.empty:
        return "Only one context length was measured."
    subjects = compared["subject"].unique()
    subject = subjects[0] if len(subjects) == 1 else "Context"
    question, claims = f"whether {subject[0].lower()}{subject[1:]} helps", []
    for verdict, claim in (("higher", "helps"), ("lower", "hurts")):
        # On tasks where no policy clearly beats the random policy, a difference means nothing.
        if rows := int(((compared["verdict"] == verdict) & ~compared["task"].isin(like_random)).sum()):
            every = "both" if rows == 2 else f"all {rows}"
            part = f" in {every if rows == len(compared) else f'{rows} of {len(compared)}'}"
            claims.append(claim + part if len(compared) > 1 else claim)
    plural = " comparisons" if len(compared) > 1 else ""
    answer = f"{subject} {' and '.join(claims)}{plural}." if claims else f"It is not resolved {question}."
    return _shortcomings(question, compared, like_random, answer)


def against_rivals(found: pd.DataFrame, like_random: Sequence[str]) -> str:
    """Return on which tasks a policy with context clearly beats all methods it is compared with; empty if unknown."""
    rivals = found[(found["subject"] == RIVAL) & ~found["task"].isin(like_random)]
    if not (rivals["seeds"] >= ENOUGH_SEEDS).any():
        return ""
    wins = (rivals["verdict"] == "higher").groupby([rivals["task"], rivals["method"]]).all().groupby("task").any()
    where = wins.index[0] if len(wins) == 1 else f"{wins.sum() or 'any'} of {len(wins)} tasks"
    who = "A" if wins.any() else "No"
    return f"{who} policy with context clearly returns more than every method that it is compared with on {where}."


def _shortcomings(question: str, compared: pd.DataFrame, like_random: Sequence[str], answer: str) -> str:
    """Return a headline that first says where seeds are too few or no policy beats the random policy."""
    few = compared["seeds"] < ENOUGH_SEEDS
    like = compared["task"].isin(like_random) & ~few
    if few.all():
        return f"Fewer than {ENOUGH_SEEDS} training seeds a side cannot show {question}."
    has = f"{few.sum()} of {len(few)} comparisons {'has' if few.sum() == 1 else 'have'}"
    first = f"{has} fewer than {ENOUGH_SEEDS} training seeds a side. " if few.any() else ""
    if (few | like).all():
        return f"{first}No policy clearly beats the random policy, so these results cannot show {question}."
    if like.any():
        first += f"No policy clearly beats the random policy on {', '.join(sorted(set(compared['task'][like])))}. "
    return first + answer


def _between(shortest: pd.Series, longest: pd.Series) -> str:
    lengths = "train_trajectories", "test_trajectories"
    train, test = ([int(cell[name]) for cell in (shortest, longest)] for name in lengths)
    if test[0] == test[1]:
        return f"trained on {train[0]} to {train[1]}, rolled out for {test[1]}"
    if train[0] == train[1]:
        return f"trained on {train[1]}, rolled out for {test[0]} to {test[1]}"
    return f"{context_label(shortest)} to {context_label(longest)}"


def starts_warning(results: pd.DataFrame, table: pd.DataFrame) -> str | None:
    """Return a warning if compared policies have different starts, other than after prompts; None if not."""
    rows, unlike = results[results["memory"]], []
    cells = table.loc[table["length"].notna() | (table["kind"] == "reference"), CELL]
    starts = rows.merge(cells, on=CELL).groupby(RUN)["start"].agg(frozenset)
    for task, of_runs in starts.groupby("task"):
        if of_runs.nunique() > 1:
            counts = sorted(set(of_runs.map(len)))
            unlike.append(f"{task} ({' or '.join(map(str, counts))} starts)")
    if not unlike:
        return None
    return (
        f"Not all policies and training seeds were rolled out from the same starts: {', '.join(unlike)}. Some starts "
        "are harder than others, so the starts may explain a part of the differences."
    )


def overfitting_warning(losses: pd.DataFrame) -> str | None:
    """Return a warning if the held-out loss of runs rises while their training loss falls; None if not."""
    found, total = [], 0
    for _, run in losses.sort_values("step").groupby("run"):
        training, held_out = run[~run["held_out"]], run[run["held_out"]]
        if training.empty or held_out.empty:
            continue
        total += 1
        lowest, last = held_out.loc[held_out["loss"].idxmin()], training["loss"].iloc[-1]
        fall = training["loss"].iloc[0] - last
        falls = last < np.interp(lowest["step"], training["step"], training["loss"])
        if falls and held_out["loss"].iloc[-1] - lowest["loss"] > _RISE * fall:
            found.append((lowest["step"], f"{run['method'].iloc[0]} on {run['task'].iloc[0]}"))
    if not found:
        return None
    names = sorted({name for _, name in found})
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"In {len(found)} of {total} runs with held-out episodes, the held-out loss rises while the training loss "
        f"falls, at the earliest after step {min(step for step, _ in found):.0f} ({', '.join(names[:_NAMED])}{more}). "
        "Use `ringrl evaluate --checkpoint-kind best` to evaluate the checkpoint of lowest held-out loss."
    )


def settings_warning(results: pd.DataFrame, table: pd.DataFrame) -> str | None:
    """Return a warning if not only the context length but also settings differ along a curve; None if not."""
    rows = results[results["memory"]].merge(table.loc[table["length"].notna(), CELL], on=CELL)
    usual, unlike = default_recipe(), []
    for (task, method), group in rows.groupby(["task", "method"]):
        last = group.groupby("train_trajectories")["settings"].last()
        known = [usual | dict(settings_of_any_length(json.loads(settings))) for settings in last]
        if names := [name for name in sorted(set().union(*known)) if len({one.get(name) for one in known}) > 1]:
            unlike.append(f"{method} on {task}: {', '.join(names)}")
    if not unlike:
        return None
    return (
        f"Not only the context length differs along a curve. {'. '.join(unlike)}. These settings may explain a part of "
        "the differences."
    )
