"""The sentences of a report: its conclusion, cautions and warnings, all computed from the tables."""

import json
from collections import defaultdict
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
import pandas as pd

from ringrl.evaluation.formatting import number
from ringrl.evaluation.statistics import Estimate
from ringrl.report.results import CELL, RUN, settings_of_any_length, usual_settings
from ringrl.report.tables import (
    Contrast,
    context_label,
    contrast,
    describe,
    ends,
    ends_of_curve,
    middle,
    prompt_returns,
    run_scores,
    scores_of,
    summarise,
)  # fmt: skip

ENOUGH_ODDS = 20
"""Differences that chance produces more often than once in this many times are called preliminary."""
_KINDS = ("steps", "timesteps", "tokens", "flops", "seconds")
_ALIKE = 1.25  # ratio up to which budgets count as equal: steps are whole, and seconds vary
_NAMED = 4  # names in a list of many
_RISE = 0.05  # least rise of a held-out loss that counts, as a fraction of the fall of the training loss


def verdicts(results: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return one comparison per task and method, and one per method with prompts.

    The longest context is compared with the shortest. If there is one length only, the rollout with memory is compared
    with its control. Prompts: the longest with the shortest, from the same starts.

    Columns: task, method, subject, compared, before, after, change, low, high, seeds, paired, kind ("helps", "hurts",
    "unclear", "one seed" or "not compared") and sentence.
    """
    runs, paired = run_scores(results), run_scores(results, "paired")
    prompts = prompt_returns(results[results["kind"] == "context"])
    rows = [
        _verdict(runs, paired, group)
        for _, group in table[table["length"].notna()].groupby(["task", "method"])
    ]  # fmt: skip
    key = ["task", "method", "train_trajectories", "test_trajectories"]
    rows += [_prompt_verdict(group) for _, group in prompts.groupby(key)]
    columns = ["task", "method", "subject", "compared", "before", "after", "change", "low", "high", "seeds", "paired"]
    return pd.DataFrame(rows, columns=[*columns, "kind", "sentence"])


def _verdict(runs: pd.DataFrame, paired: pd.DataFrame, cells: pd.DataFrame) -> dict[str, Any]:
    shortest, longest = ends_of_curve(cells)
    of_context = " of context" if longest["train_trajectories"] == longest["test_trajectories"] else ""
    prompt = longest["prompt_trajectories"]
    prompted = f", after a prompt of {prompt} trajector{'y' if prompt == 1 else 'ies'}," if prompt else ""
    claim = f"On {longest['task']} the {longest['method']}{prompted} returns"
    where = f"{_when(longest)}{of_context}"
    if shortest.name != longest.name:
        found = contrast([scores_of(runs, longest)], [scores_of(runs, shortest)])
        sentence = f"{claim} {number(found.levels[0])} {where} and {number(found.levels[1])} {_when(shortest)}: "
        sentence += _judge(found.change)
        if pd.notna(longest["control"]) and longest["test_trajectories"] > 1:
            sentence += f" With its memory reset before each episode it returns {number(longest['control'])}."
        return _row(longest, "A longer context", _between(shortest, longest), found, sentence)
    kept, reset = (scores_of(paired, longest, memory=memory) for memory in (True, False))
    if longest["test_trajectories"] > 1 and len(kept):
        gain = summarise(kept - reset.reindex(kept.index))
        found = Contrast(gain, gain, (middle(kept), middle(reset)), paired=True)
        sentence = f"{claim} {number(middle(kept))} {where} and {number(middle(reset))} when its memory is reset "
        sentence += f"before each episode: {_judge(gain)}"
        return _row(
            longest, "Memory across episodes", f"memory reset to kept, {context_label(longest)}", found, sentence
        )
    sentence = f"{claim} {number(longest['iqm'])} {where}. No other context length was measured."
    return _row(longest, "Context", context_label(longest), None, sentence)


def _prompt_verdict(runs: pd.DataFrame) -> dict[str, Any]:
    few, many = runs["prompt_trajectories"].min(), runs["prompt_trajectories"].max()
    sides = [runs[runs["prompt_trajectories"] == length].set_index("run")["value"] for length in (many, few)]
    found, cell = contrast([sides[0]], [sides[1]]), runs.iloc[0]
    sentence = (
        f"On {cell['task']} the {cell['method']} trained on {cell['train_trajectories']} returns "
        f"{number(found.levels[0])} after a prompt of {many} trajectories and {number(found.levels[1])} after {few}: "
        f"{_judge(found.change)}"
    )
    compared = f"prompt of {few} to {many}, trained on {cell['train_trajectories']}"
    return _row(cell, "A longer prompt", compared, found, sentence)


def _row(cell: pd.Series, subject: str, compared: str, found: Contrast | None, sentence: str) -> dict[str, Any]:
    row = {"task": cell["task"], "method": cell["method"], "subject": subject, "compared": compared}
    if found is None:
        return row | {"after": cell["iqm"], "seeds": 0, "paired": False, "kind": "not compared", "sentence": sentence}
    (low, high), change, kind = ends(found.change), found.change, "one seed"
    if change.interval:
        kind = "unclear" if 0 in change.interval else "helps" if change.value > 0 else "hurts"
    return row | {
        "before": found.levels[1], "after": found.levels[0], "change": change.value, "low": low, "high": high,
        "seeds": change.runs, "paired": found.paired, "kind": kind, "sentence": sentence,
    }  # fmt: skip


def headline(found: pd.DataFrame) -> str:
    """Return the conclusion in one sentence."""
    if found.empty:
        return "No rollouts show whether context helps."
    judged = found[found["kind"].isin(["helps", "hurts", "unclear"])]
    if judged.empty:
        if (found["kind"] == "one seed").any():
            return "One training seed cannot show whether context helps."
        return "Only one context length was measured."
    subjects = judged["subject"].unique()
    subject = subjects[0] if len(subjects) == 1 else "Context"
    claims = []
    for kind, bare in (("helps", "help"), ("hurts", "hurt")):
        rows = judged[judged["kind"] == kind]
        if len(rows):
            claim = f"seems to {bare}" if caution(rows) else kind
            if len(judged) == 1:
                return f"{subject} {claim}."
            claims.append(f"{claim} in {'all' if len(rows) == len(judged) else f'{len(rows)} of'} {len(judged)}")
    return f"{subject} {' and '.join(claims)} comparisons." if claims else f"{subject} makes no clear difference."


def odds(seeds: int, paired: bool) -> int:
    """Return n such that chance alone orders the training runs perfectly once in n times.

    Paired: all n runs change in the same direction. Otherwise all runs of one group of n exceed the other group.
    """
    return 2 ** max(seeds - 1, 0) if paired else comb(2 * seeds, seeds) // 2


def caution(clear: pd.DataFrame) -> str | None:
    """Return a sentence about few training seeds, for the weakest clear difference; None if all have enough seeds.

    Args:
        clear: clear differences: columns seeds, and paired (whether both sides have the same training runs).
    """
    pairs = [(int(seeds), bool(paired)) for seeds, paired in zip(clear["seeds"], clear["paired"], strict=True)]
    times, (seeds, paired) = min(((odds(*pair), pair) for pair in pairs), default=(ENOUGH_ODDS, (0, False)))
    if times >= ENOUGH_ODDS:
        return None
    chance = (
        f"all {seeds} runs change in the same direction" if paired else f"two groups of {seeds} runs do not overlap"
    )
    return (
        f"With {seeds} training seeds per point this result is preliminary. Without any difference, {chance} by chance "
        f"once in {times} times. Bootstrap intervals of so few seeds are too narrow."
    )


def _when(cell: pd.Series) -> str:
    train, test = int(cell["train_trajectories"]), int(cell["test_trajectories"])
    return f"with {context_label(cell)}" if train == test else f"when trained on {train} and rolled out for {test}"


def _between(shortest: pd.Series, longest: pd.Series) -> str:
    train, test = (
        [int(cell[name]) for cell in (shortest, longest)] for name in ("train_trajectories", "test_trajectories")
    )
    if test[0] == test[1]:
        return f"trained on {train[0]} to {train[1]}, rolled out for {test[1]}"
    if train[0] == train[1]:
        return f"trained on {train[1]}, rolled out for {test[0]} to {test[1]}"
    return f"{context_label(shortest)} to {context_label(longest)}"


def _judge(change: Estimate) -> str:
    size = number(change.value, sign=True)
    if change.interval is None:
        return f"{size}. One training seed gives no interval, so this may be chance."
    ends = f"95 % interval {number(change.interval.low, sign=True)} to {number(change.interval.high, sign=True)}"
    if 0 in change.interval:
        return f"{size}, no clear difference ({ends}, {change.runs} training seeds)."
    return f"{size} ({ends}, {change.runs} training seeds)."


def starts_of_cells(results: pd.DataFrame) -> pd.Series:
    """Return, for each cell, the distinct sets of starts of its training seeds."""
    rows = results[results["memory"] & (results["kind"] != "data")]
    return rows.groupby(RUN)["start"].agg(frozenset).groupby(CELL).agg(frozenset)


def starts_facts(results: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """Return a line per task: the number of starts, and for each policy if they differ between policies."""
    return [
        f"{task}: {_listed(found)}{', the same for all' if _alike(found) else ''}"
        for task, found in _starts_groups(results, table).items()
    ]


def starts_warning(results: pd.DataFrame, table: pd.DataFrame) -> str | None:
    """Return a warning if compared policies were rolled out from different starts; None if not."""
    unlike = [
        f"on {task} {_listed(found)}" for task, found in _starts_groups(results, table).items() if not _alike(found)
    ]
    if not unlike:
        return None
    return (
        f"Not all policies were rolled out from the same starts: {'; '.join(unlike)}. Some starts are harder than "
        "others, so the starts may explain a part of the differences."
    )


Starts = frozenset[frozenset[str]]  # of each training seed


def _starts_groups(results: pd.DataFrame, table: pd.DataFrame) -> dict[str, dict[Starts, list[pd.Series]]]:
    """Return task -> starts -> policies. Prompted rollouts are left out, since their chart has equal starts."""
    found: dict[str, dict[Starts, list[pd.Series]]] = defaultdict(lambda: defaultdict(list))
    starts = starts_of_cells(results)
    for _, cell in table[table["length"].notna() | (table["kind"] == "reference")].iterrows():
        found[cell["task"]][starts[tuple(cell[CELL])]].append(cell)
    return {task: dict(sorted(of.items(), key=lambda group: sorted(map(len, group[0])))) for task, of in found.items()}


def _alike(groups: dict[Starts, list[pd.Series]]) -> bool:
    return len(frozenset().union(*groups)) <= 1


def _listed(groups: dict[Starts, list[pd.Series]]) -> str:
    parts = []
    for starts, cells in groups.items():
        counts = sorted({len(one) for one in starts})
        part = f"{' or '.join(map(str, counts))} start{'s' if counts[-1] > 1 else ''}"
        part += ", which differ by training seed," if len(starts) > 1 else ""
        if not _alike(groups):
            more = f" and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
            part += f" for {', '.join(describe(cell) for cell in cells[:_NAMED])}{more}"
        parts.append(part)
    return ", ".join(parts)


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
        f"falls, at the earliest after step {min(step for step, _ in found):.0f} ({', '.join(names[:_NAMED])}{more}); "
        "`ringrl evaluate --checkpoint-kind best` evaluates the checkpoint of lowest held-out loss."
    )


def settings_warning(results: pd.DataFrame, table: pd.DataFrame) -> str | None:
    """Return a warning if settings or budgets differ along a curve besides the context length; None if not."""
    keys = pd.MultiIndex.from_frame(table.loc[table["length"].notna(), CELL])
    rows = results[results["memory"] & pd.MultiIndex.from_frame(results[CELL]).isin(keys)]
    unlike = [
        f"{method} on {task}: {'; '.join(found)}"
        for (task, method), group in rows.groupby(["task", "method"])
        if (found := _unlike_settings(group) + _unlike_budgets(group))
    ]
    if not unlike:
        return None
    return (
        f"Not only the context length differs along a curve. {'. '.join(unlike)}. These settings may explain a part of "
        "the differences."
    )


def _unlike_settings(rows: pd.DataFrame) -> list[str]:
    """Return the settings that are not equal at all lengths, with their values."""
    of_length = {
        length: settings_of_any_length(json.loads(group["settings"].iloc[-1]))
        for length, group in rows.groupby("train_trajectories")
    }
    usual, found = usual_settings(), []
    for name in sorted({name for settings in of_length.values() for name in settings}):
        values: dict[str, list[str]] = defaultdict(list)
        for length, settings in of_length.items():
            values[settings.get(name, usual.get(name, ""))].append(str(length))
        if len(values) > 1:
            found.append(f"{name} " + ", ".join(f"{value} with {' and '.join(at)}" for value, at in values.items()))
    return found


def _unlike_budgets(rows: pd.DataFrame) -> list[str]:
    """Return the steps of each length if the lengths share no budget (steps, data, tokens, FLOPs or time)."""
    runs = rows[rows["steps"].notna()].groupby(RUN, as_index=False)[["converged", *_KINDS]].first()
    if runs["converged"].all() or any(_is_shared(runs[kind].to_numpy(np.float64)) for kind in _KINDS):
        return []
    parts = [
        f"{' or '.join(f'{steps:,.0f}' for steps in sorted(group.unique()))} steps with {length}"
        for length, group in runs.groupby("train_trajectories")["steps"]
    ]
    return [f"training of {', '.join(parts)}"]


def _is_shared(amounts: Sequence[float] | np.ndarray) -> bool:
    return not np.isnan(amounts).any() and max(amounts) <= _ALIKE * min(amounts)
