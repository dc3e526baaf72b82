"""Two sets of results compared: the differences of the returns, and the settings that differ."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import rich.table
from rich import box
from rich.console import Group
from rich.markup import escape

from ringrl.errors import UserError, printable
from ringrl.evaluation.formatting import ABSENT, MINUS, number
from ringrl.report.conclusion import claimed, judge, measured, starts_of_cells, with_shortcomings
from ringrl.report.page import DIFFERENCE_COLUMNS, SEEDS, Column, render, save_report, table_files, with_notes
from ringrl.report.provenance import facts
from ringrl.report.results import CELL, UNKNOWN_RUN, read_results, usual_settings
from ringrl.report.tables import contrast, describe, returns_table, run_scores, scores_of, tasks_like_random

COMPARISON = "comparison.html"  # next to the page of a report in the same folder
CHANGE = f"B {MINUS} A"
_RECORDED = ("target_policy", "target_return", "data_fingerprint", "device", "steps_trained", "token_set", "train_task",
             "prompt_trajectories", "prompt_control", "cache_dtype")  # fmt: skip
_MANY = 4  # names in a list of many
_COLUMNS = [
    Column("task", "Task"), Column("method", "Method"), Column("before", "A", "interquartile mean over training seeds"),
    Column("after", "B", "as A"), DIFFERENCE_COLUMNS[0]._replace(heading=CHANGE), *DIFFERENCE_COLUMNS[1:], SEEDS,
]  # fmt: skip
_SETTING_COLUMNS = [Column("Setting"), Column("A"), Column("B")]


class Comparison(NamedTuple):
    """The matched cells of two sets of results, and their differences."""

    pairs: pd.DataFrame  # columns of _COLUMNS and `conclusion.judge`, "same_starts"; one row per cell in both sets
    unmatched: list[str]  # a line per cell without a counterpart
    settings: pd.DataFrame  # Setting, A, B; where the two differ
    results: tuple[pd.DataFrame, pd.DataFrame]
    like_random: list[str]  # tasks in which no policy clearly beats the random policy


def compare(a: Sequence[Path], b: Sequence[Path]) -> Comparison:
    """Match the cells of two sets of results and return their differences.

    Cells match if task, method, settings and lengths are equal. Other cells match if task, method and lengths are equal
    and each side has one such cell; the page lists their other differences. Results of the same training runs are
    compared run by run.

    Raises:
        UserError: either set has no results, cannot be read, or they have no cell in common.
    """
    results = read_results(a), read_results(b)
    whole = [returns_table(side) for side in results]
    tables = [table.query("kind != 'data' and family != 'random'") for table in whole]  # nothing was trained
    matched = _match(*tables)
    if not matched:
        raise UserError(
            f"{_listed(a)} and {_listed(b)} have no task, method and context length in common; give results that match"
        )
    runs, starts = [run_scores(side) for side in results], [starts_of_cells(side) for side in results]
    rows = []
    for one, other in matched:
        cells = tables[0].loc[one], tables[1].loc[other]
        ours, theirs = (scores_of(side, cell) for side, cell in zip(runs, cells, strict=True))
        theirs = theirs.rename(index=lambda run: f"B {run}" if run.startswith(UNKNOWN_RUN) else run)  # no runs of A
        named = {"task": cells[0]["task"], "method": describe(cells[0])}
        same_starts = starts[0][tuple(cells[0][CELL])] == starts[1][tuple(cells[1][CELL])]
        rows.append(named | measured(contrast(theirs, ours)) | {"same_starts": same_starts})
    unmatched = [
        f"Only in {name}: {cell['task']}, {describe(cell)}."
        for name, table, taken in zip("AB", tables, zip(*matched, strict=True), strict=True)
        for index, cell in table.iterrows()
        if index not in taken
    ]
    like_random = set.intersection(*(set(tasks_like_random(*side)) for side in zip(results, whole, strict=True)))
    settings = _differences(*map(_settings, results))
    return Comparison(judge(pd.DataFrame(rows)), unmatched, settings, results, sorted(like_random))


def write_comparison(a: Sequence[Path], b: Sequence[Path], destination: Path) -> tuple[Path, Group]:
    """Write the page of a comparison and its tables; return the page's path and a table for the terminal.

    Raises:
        UserError: as `compare`, or the folder cannot be written.
    """
    found = compare(a, b)
    sheets = {"comparison": (found.pairs, _COLUMNS), "settings": (found.settings, _SETTING_COLUMNS)}
    page = render(
        "compare.html",
        headline=headline(found),
        caution=starts_caution(found.pairs),
        names=(_listed(a), _listed(b)),
        sheets=sheets,
        unmatched=found.unmatched,
        facts=[facts(side) for side in found.results],
        date=max(side["created"].max() for side in found.results),
    )
    files = {path: content for name, sheet in sheets.items() for path, content in table_files(name, *sheet).items()}
    shown = Group(with_notes(_to_rich(found.pairs), *found.results), headline(found))
    return save_report(page, [], files, destination, COMPARISON), shown


def headline(found: Comparison) -> str:
    """Return the conclusion in one sentence."""
    pairs, claims = found.pairs, []
    for verdict, claim in (("higher", "more"), ("lower", "less")):
        if number_of := claimed(pairs, verdict, found.like_random):
            claims.append(f"{claim} in {number_of}")
    plural = "s" if len(pairs) > 1 else ""
    answer = f"B returns {' and '.join(claims)} of {len(pairs)} comparison{plural} than A."
    answer = answer if claims else "It is not resolved which is better."
    return with_shortcomings(answer, "which is better", pairs, found.like_random)


def starts_caution(pairs: pd.DataFrame) -> str | None:
    """Return a sentence about different starts; None if all are equal."""
    unlike = [f"{row['method']} on {row['task']}" for _, row in pairs[~pairs["same_starts"]].iterrows()]
    if not unlike:
        return None
    return (
        f"A and B were not rolled out from the same starts: {_listed(unlike)}. Some starts are harder than "
        "others, so the starts may explain a part of the differences."
    )


def _match(a: pd.DataFrame, b: pd.DataFrame) -> list[tuple[Any, Any]]:
    """Return pairs of row labels: equal cells first, then cells that are unique for a task, method and lengths."""
    matched: list[tuple[Any, Any]] = []
    lengths = ["train_trajectories", "test_trajectories"]
    for key in (["task", "variant", *lengths, "prompt_trajectories"], ["task", "family", "kind", *lengths]):
        left = [table[~table.index.isin([pair[side] for pair in matched])] for side, table in enumerate((a, b))]
        groups = [dict(list(table.groupby(key))) for table in left]
        matched += [
            (rows.index[0], groups[1][name].index[0])
            for name, rows in groups[0].items()
            if len(rows) == len(groups[1].get(name, ())) == 1
        ]
    return sorted(matched)


def _settings(results: pd.DataFrame) -> dict[str, set[str]]:
    """Return the values of each recorded setting."""
    found: dict[str, set[str]] = defaultdict(set)
    policies = results[results["kind"] != "data"]
    trained = policies[policies["family"] != "random"]
    for name in _RECORDED:
        found[name] |= {_shown(value) for value in trained[name].dropna().unique()}
    for versions in results["versions"].unique():
        for library, version in json.loads(versions).items():
            found[f"version of {library}"].add(version)
    for settings in trained["settings"].unique():
        for name, value in (usual_settings() | json.loads(settings)).items():
            found[name].add(value)
    streams = policies[policies["memory"]].groupby([*CELL, "seed"])["stream"].nunique()
    found["streams per training seed"] = {str(count) for count in streams}
    return {name: values for name, values in found.items() if values}


def _differences(a: dict[str, set[str]], b: dict[str, set[str]]) -> pd.DataFrame:
    unlike = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    rows = [(name, *(_listed(sorted(side.get(name, {ABSENT}))) for side in (a, b))) for name in unlike]
    return pd.DataFrame(rows, columns=["Setting", "A", "B"])


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:_MANY])) + (f" and {len(names) - _MANY} more" if len(names) > _MANY else "")


def _to_rich(pairs: pd.DataFrame) -> rich.table.Table:
    shown = rich.table.Table(box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("Method")
    for name in ("A", "B", f"{CHANGE}\n[95 %]"):
        shown.add_column(escape(name), justify="right", no_wrap=True)
    for task, rows in pairs.groupby("task", sort=False):
        shown.add_section()
        shown.add_row(f"[bold]{escape(printable(str(task)))}")
        for _, row in rows.iterrows():
            change = escape(DIFFERENCE_COLUMNS[0].line(row))
            shown.add_row(escape(printable(row["method"])), number(row["before"]), number(row["after"]), change)
    return shown
