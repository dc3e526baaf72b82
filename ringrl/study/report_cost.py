"""The same returns against what training took: tokens, operations, seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from ringrl.study.figures import one_seed
from ringrl.study.report_cells import Cell, Grid, in_sentence, middle, series_of, summarise
from ringrl.study.report_draw import Chart, Panel, Point, amount_axis, draw_line, dress, styles
from ringrl.study.report_svg import colour
from ringrl.study.report_variants import Variant
from ringrl.training.budget import Budget

_ALIKE = 1.05  # amounts that differ by less are told to be the same
_UNITS = ((7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))  # from, length, name


@dataclass(frozen=True)
class _Measure:
    name: str  # of the file
    title: str
    along: str  # what the axis says
    says: str  # of the caption
    amount: Callable[[Budget], float | None]


_MEASURES = (
    _Measure(
        "return_by_tokens", "Return against training tokens", "tokens",
        "what the model saw in training, counted as often as it came", lambda budget: budget.tokens,
    ),
    _Measure(
        "return_by_flops", "Return against operations of training", "floating-point operations",
        "multiplications and additions of the transformer's blocks, both ways; other models' are not counted",
        lambda budget: budget.flops,
    ),
    _Measure(
        "return_by_seconds", "Return against time of training", "",
        "by the clock, with compilation and waiting for data", lambda budget: budget.seconds,
    ),
)  # fmt: skip


def cost_charts(grid: Grid) -> list[Chart]:
    """A chart per measure that the results tell, a panel per task."""
    return [chart for measure in _MEASURES if (chart := _chart(measure, grid)) is not None]


def _chart(measure: _Measure, grid: Grid) -> Chart | None:
    tasks = [task for task in grid.tasks_with_context if len(_amounts(measure, grid, task)) > 1]
    if not tasks:
        return None
    panels = [
        Panel(
            task,
            partial(_draw, grid=grid, task=task, measure=measure),
            f"Return on {task} by {measure.along or 'time'} of training.",
        )
        for task in tasks
    ]
    caption = (
        f"The points of the first chart, moved to what training each of them took ({measure.says}; mean over seeds); "
        "the number beside a point is its trajectories per context (4/8: trained on 4, rolled out for 8), a diamond is "
        "a method without. "
        f"Bars are 95 % intervals of the interquartile mean. {one_seed(grid)}"
    )
    shares = [_spread(_amounts(measure, grid, task)) for task in tasks]
    if max(shares) < _ALIKE:
        caption += "Here all took the same, to within 5 %."
    if measure.name == "return_by_seconds":
        caption += _machines(grid)
    known = styles(grid)
    keys = tuple(known[variant] for variant in grid.variants)
    return Chart(measure.name, measure.title, caption.strip(), tuple(panels), keys, grid.records_of(tasks))


def _draw(axes: Axes, grid: Grid, task: str, measure: _Measure) -> None:
    known = styles(grid)
    amounts = _amounts(measure, grid, task)
    scale, along = 1.0, measure.along
    if not along:
        scale, along = next((unit, name) for least, unit, name in _UNITS if max(amounts) >= least)
    for variant in grid.variants:
        for series in series_of(grid.cells_of(task, variant)):
            told = [(cell, amount) for _, cell in series.points if (amount := _amount(measure, cell))]
            points = [Point(amount / scale, summarise(cell.runs()), cell.runs()) for cell, amount in told]
            draw_line(axes, points, known[variant])
            for point, (cell, _) in zip(points, told, strict=True):
                length = str(cell.test) if cell.train == cell.test else f"{cell.train}/{cell.test}"
                _beside(axes, point.x, point.found.value, length, known[variant].colour)
    for variant, cell in _without_context(grid, task).items():
        amount = _amount(measure, cell)
        if amount:
            level = middle(cell.runs())
            axes.plot([amount / scale], [level], "D", color=colour("muted"), markersize=4.5)
            _beside(axes, amount / scale, level, in_sentence(grid.name(variant)), "muted")
    amount_axis(axes, [amount / scale for amount in amounts])
    dress(axes, along, "return per episode")


def _beside(axes: Axes, x: float, y: float, label: str, shade: str) -> None:
    axes.annotate(label, (x, y), (6, 5), textcoords="offset points", fontsize=8.5, color=colour(shade), zorder=4)


def _amounts(measure: _Measure, grid: Grid, task: str) -> list[float]:
    cells = [cell for variant in grid.variants for cell in grid.cells_of(task, variant)]
    cells += _without_context(grid, task).values() if any(_amount(measure, cell) for cell in cells) else []
    return [amount for cell in cells if (amount := _amount(measure, cell))]


def _amount(measure: _Measure, cell: Cell) -> float | None:
    """Mean over the seeds; None where one of them does not tell it."""
    amounts = [measure.amount(budget) for budget in cell.budgets.values()]
    known = [amount for amount in amounts if amount is not None]
    return float(np.mean(known)) if known and len(known) == len(cell.seeds) else None


def _without_context(grid: Grid, task: str) -> dict[Variant, Cell]:
    return {cell.variant: cell for cell in grid.levels(task)}


def _spread(amounts: list[float]) -> float:
    return max(amounts) / min(amounts)


def _machines(grid: Grid) -> str:
    devices = sorted({budget.devices for cell in grid.cells for budget in cell.budgets.values()})
    if devices == [1]:
        return "Each run had one device."
    return f"Runs had {' or '.join(map(str, devices))} devices each; times are not multiplied by them."
