"""The report's numbers as rows: for the page, the terminal and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from ringrl.data.store.format import RETURN_LEVELS
from ringrl.evaluation.formatting import ABSENT, number
from ringrl.evaluation.scores import score_or_none
from ringrl.study.report_cells import Cell, Grid, middle, middle_or_none, summarise


@dataclass(frozen=True)
class Row:
    """One method on one task at one context length; None: not measured, or without meaning."""

    task: str
    method: str
    train_trajectories: int | None  # trajectories per training context
    test_trajectories: int | None  # episodes per stream, n
    mean: float  # over training seeds of the mean return of all episodes
    iqm: float  # interquartile mean over training seeds of the same
    low: float | None  # 95 % interval of the interquartile mean over training seeds
    high: float | None
    control: float | None  # interquartile mean of the mean return of the same policy without memory
    first: float | None  # interquartile means over training seeds, as all that follow
    last: float | None
    last_control: float | None  # the same of the policy without memory, from the same starts
    best: float | None  # best of the n episodes of a stream
    best_control: float | None  # best of n episodes of the same policy without memory
    score: float | None  # normalised score of iqm
    seeds: int | None
    episodes: int  # with a return
    failed: int  # episodes without one, the control's too


@dataclass(frozen=True)
class DataRow:
    """How the returns of a dataset are spread, and where the best policy stands among them."""

    task: str
    episodes: int
    quantiles: tuple[float, ...]  # at RETURN_LEVELS
    mean: float
    best_method: str | None  # highest interquartile mean
    best_return: float | None
    share_below: float | None  # share of the dataset's episodes that return less than that


def rows(grid: Grid) -> list[Row]:
    """Every cell, per task: what has no context first, then the dataset, then the curves by context length."""
    found = []
    for task in grid.tasks:
        found += [_row(grid, cell) for cell in grid.references(task)]
        found += _data_rows(grid, task)
        for variant in grid.variants:
            found += [_row(grid, cell) for cell in grid.cells_of(task, variant)]
    return found


def data_rows(grid: Grid) -> list[DataRow]:
    """The spread of each dataset's returns."""
    found = []
    for task, returns in grid.data.items():
        measured = [(middle(cell.runs()), cell) for cell in grid.cells if cell.task == task]
        best, cell = max(measured, key=lambda pair: pair[0], default=(None, None))
        found.append(
            DataRow(
                task=task,
                episodes=len(returns),
                quantiles=tuple(float(value) for value in np.quantile(returns, RETURN_LEVELS)),
                mean=float(returns.mean()),
                best_method=None if cell is None else describe(grid, cell),
                best_return=best,
                share_below=None if best is None else float((returns < best).mean()),
            )
        )
    return found


def describe(grid: Grid, cell: Cell) -> str:
    """A cell in words: its method and its context length."""
    name = grid.name(cell.variant)
    return name if cell.train is None else f"{name} ({context_label(cell)})"


def context_label(cell: Cell) -> str:
    """ "4 trajectories", or the two lengths where training and rollout differ."""
    if cell.train == cell.test:
        return f"{cell.test} trajector{'y' if cell.test == 1 else 'ies'}"
    return f"trained on {cell.train}, rolled out for {cell.test}"


def to_csv(table: Sequence[Row]) -> str:
    """Rows with a header line, at full precision; empty where a number is absent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in table)
    return text.getvalue()


def to_rich(table: Sequence[Row]) -> Table:
    """Rows for a terminal of 80 columns, a part per task; numbers as in Row, the interval in brackets."""
    shown = Table(box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("Method")  # the one that gives way where the terminal is narrow
    names = ["Context", "Return\n[95 %]", "First", "Last", "Best of n\n(control)", "Seeds"]
    failed = any(row.failed for row in table)
    for name in names + ["Failed"] * failed:
        shown.add_column(name, justify="right", no_wrap=True)
    for index, row in enumerate(table):
        if index == 0 or row.task != table[index - 1].task:
            shown.add_section()
            shown.add_row(f"[bold]{escape(row.task)}")
        lengths = dict.fromkeys((row.train_trajectories, row.test_trajectories))
        shown.add_row(
            escape(row.method),
            ABSENT if row.train_trajectories is None else "/".join(str(length) for length in lengths),
            escape(number(row.iqm) + ("" if row.low is None else f" [{number(row.low)}, {number(row.high)}]")),
            number(row.first),
            number(row.last),
            number(row.best) + ("" if row.best_control is None else f" ({number(row.best_control)})"),
            ABSENT if row.seeds is None else str(row.seeds),
            *([str(row.failed)] if failed else []),
        )
    return shown


def _row(grid: Grid, cell: Cell) -> Row:
    found = summarise(cell.runs())
    # Without context the episodes of a stream are independent, and the first remembers none: its own control.
    control = cell.runs if cell.variant.context_free or cell.test == 1 else cell.control_runs
    first, last, best = (middle_or_none(cell.runs(metric)) for metric in ("first", "last", "best"))
    return Row(
        task=cell.task,
        method=grid.name(cell.variant),
        train_trajectories=cell.train,
        test_trajectories=cell.test,
        mean=float(cell.runs().mean()),
        iqm=found.value,
        low=found.interval.low if found.interval else None,
        high=found.interval.high if found.interval else None,
        control=middle_or_none(control("mean")),
        first=first,
        last=last,
        last_control=middle_or_none(control("last")),
        best=best,
        best_control=middle_or_none(control("best")),
        score=score_or_none(cell.task, found.value),
        seeds=found.runs,
        episodes=cell.episodes,
        failed=cell.failed,
    )


def _data_rows(grid: Grid, task: str) -> list[Row]:
    if task not in grid.data:
        return []
    returns = grid.data[task]

    def row(method: str, score: float, episodes: int) -> Row:
        absent: dict[str, None] = dict.fromkeys(
            (
                "train_trajectories",
                "test_trajectories",
                "low",
                "high",
                "control",
                "first",
                "last",
                "last_control",
                "best",
                "best_control",
                "seeds",
            )
        )
        return Row(
            task=task,
            method=method,
            mean=score,
            iqm=score,
            score=score_or_none(task, score),
            episodes=episodes,
            failed=0,
            **absent,
        )

    return [
        # Like a training seed, a dataset counts as one run: its score is the mean over its episodes.
        row("Dataset, all episodes", float(returns.mean()), len(returns)),
        row("Dataset, best episode", float(returns.max()), 1),
    ]
