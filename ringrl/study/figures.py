"""The report's main charts: return against context length, and return of each episode within a context."""

import textwrap
from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ringrl.evaluation.formatting import number
from ringrl.evaluation.scores import score_or_none
from ringrl.evaluation.statistics import Estimate
from ringrl.study.report_cells import Cell, Grid, in_sentence, middle, series_of, strata, summarise
from ringrl.study.report_draw import (
    CONTROL,
    SOLID,
    Chart,
    Dash,
    Key,
    Panel,
    Point,
    context_axis,
    draw_band,
    draw_line,
    dress,
    linestyle,
    styles,
)
from ringrl.study.report_starts import starts_warning
from ringrl.study.report_svg import colour
from ringrl.study.report_variants import Variant

_DATA_DASHES: dict[str, Dash] = {"data, mean": (7, 3), "data, best": SOLID}
_POINTS_TO_MARK = 16  # beyond, a band stands for the bars, and no seed has a dot
_WIDE = 22  # letters of a level's name, beyond which it takes another line
_LINE_HEIGHT = 0.075  # of such a line, as a share of the chart
_LINES_IN_CONTEXT = 4  # context lengths shown within a context; more would hide one another


def curve_chart(grid: Grid) -> Chart | None:
    """Return against context length: a panel per task and, for several tasks, one over all in normalised scores."""
    tasks = grid.tasks_with_context
    panels = []
    if len(tasks) > 1 and any(common(grid, variant, tasks) for variant in grid.variants):
        draw = partial(_draw_common, grid=grid, tasks=tasks)
        panels.append(Panel("All tasks, normalised score", draw, "Normalised score over all tasks by context length."))
    for task in tasks:
        words = f"Return on {task} by context length; the numbers are in the table of returns."
        panels.append(Panel(task, partial(_draw_curve, grid=grid, task=task), words))
    caption = (
        "Each point is the interquartile mean over training seeds of the mean return of all episodes in the context; "
        "the bar behind it is the 95 % interval (stratified bootstrap over seeds), small dots are single seeds. "
        f"{one_seed(grid)}"
    )
    if starts_warning(grid):
        caption += "Not all points are of the same starts; which are is said at the top. "
    if grid.data or grid.context_free:
        caption += "Grey lines need no context."
    if any(cell.variant.method == "at" and cell.train == 1 for cell in grid.cells):
        caption += " With one trajectory per context the Agentic Transformer is a Decision Transformer."
    return _chart("return_by_context", "Return against context length", caption, panels, grid)


def episode_chart(grid: Grid) -> Chart | None:
    """Return of each in-context episode: a panel per task that was rolled out for more than one."""
    panels = [
        Panel(
            task,
            partial(_draw_episodes, grid=grid, task=task),
            f"Return on {task} of each episode within a context, first to last.",
        )
        for task in grid.tasks_with_context
        if any(cell.test > 1 for variant in grid.variants for cell in grid.cells_of(task, variant))
    ]
    caption = (
        "The same policy plays n episodes one after another and remembers them. The first episodes have other starts "
        "than the second, and so on. Points and bars as above."
    )
    if any(cell.control for cell in grid.cells):
        caption += (
            " The dashed line is the same policy from the same starts, its memory wiped before each episode: if it "
            "learns from what it has seen, the strong line rises above that from left to right."
        )
    return _chart("return_within_context", "Within one context", caption, panels, grid)


def context_keys(grid: Grid) -> tuple[Key, ...]:
    """What the colours of the methods with a context mean."""
    known = styles(grid)
    keys = [known[variant] for variant in grid.variants]
    if any(cell.control for cell in grid.cells):
        shade = keys[0].colour if len(keys) == 1 else "muted"
        keys.append(Key("the same, memory wiped before each episode", shade, CONTROL))
    return tuple(keys)


def one_seed(grid: Grid) -> str:
    """What to say where a point has no interval; nothing where all have."""
    if any(len(cell.seeds) == 1 for cell in grid.cells if not cell.variant.context_free):
        return "A point without a bar stands on one seed: no interval can be given. "
    return ""


def _chart(name: str, title: str, caption: str, panels: Sequence[Panel], grid: Grid) -> Chart | None:
    if not panels:
        return None
    records = grid.records_of(grid.tasks_with_context)
    return Chart(name, title, caption, tuple(panels), context_keys(grid), records)


def _draw_curve(axes: Axes, grid: Grid, task: str) -> None:
    known, lengths, rolled_out = styles(grid), set(), False
    for variant in grid.variants:
        for series in series_of(grid.cells_of(task, variant)):
            rolled_out |= series.train is not None
            with_control = [(length, cell) for length, cell in series.points if cell.control and cell.test > 1]
            draw_line(axes, _points(with_control, control=True), known[variant], control=True)
            points = _points(series.points)
            draw_line(axes, points, known[variant])
            if series.train is not None:
                last = points[-1]
                label = f"trained on {series.train}"
                axes.annotate(label, (last.x, last.found.value), (0, 7), textcoords="offset points", ha="right")
            lengths |= {length for length, _ in series.points}
    context_axis(axes, lengths)
    dress(axes, "episodes in one context" if rolled_out else "trajectories per context", "return per episode")
    _label_levels(axes, _levels(grid, task))


def _draw_common(axes: Axes, grid: Grid, tasks: Sequence[str]) -> None:
    known, lengths = styles(grid), set()
    for variant in grid.variants:
        points = common(grid, variant, tasks)
        draw_line(axes, points, known[variant])
        lengths |= {round(point.x) for point in points}
    context_axis(axes, lengths)
    dress(axes, "trajectories per context", "normalised score")


def _draw_episodes(axes: Axes, grid: Grid, task: str) -> None:
    longest, known = 1, styles(grid)
    lines = _LINES_IN_CONTEXT if len(grid.variants) == 1 else 1
    for variant in grid.variants:
        cells = sorted(grid.cells_of(task, variant), key=lambda cell: (cell.test, cell.train or 0))
        cells = [cell for cell in cells if cell.test > 1][-lines:]
        shade = colour(known[variant].colour)
        for index, cell in enumerate(cells):
            per_episode = cell.episode_runs()
            points = [Point(i, summarise(runs), runs) for i, runs in enumerate(per_episode, 1) if len(runs)]
            newest = index == len(cells) - 1
            strength = 1.0 if newest else 0.35 + 0.3 * index / len(cells)
            many = len(points) > _POINTS_TO_MARK
            if many and newest:
                draw_band(axes, points, known[variant])
            draw_line(axes, points, known[variant], strength=strength, bars=newest and not many)
            end = points[-1]
            axes.annotate(
                f"n = {cell.test}", (end.x, end.found.value), (5, 0), textcoords="offset points",
                va="center", color=shade, fontsize=8.5,
            )  # fmt: skip
            longest = max(longest, cell.test)
        if cells:
            levels = [(i, middle(runs)) for i, runs in enumerate(cells[-1].control_episode_runs(), 1) if len(runs)]
            wiped = np.array(levels).reshape(-1, 2)
            axes.plot(wiped[:, 0], wiped[:, 1], linestyle=linestyle(CONTROL), color=shade, linewidth=1.2)
    dress(axes, "episode in the context", "return of that episode")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(0.8, longest + max(0.2, 0.06 * longest))


def _points(cells: Sequence[tuple[int, Cell]], *, control: bool = False) -> list[Point]:
    scored = [(length, cell.control_runs() if control else cell.runs()) for length, cell in cells]
    return [Point(length, summarise(runs), runs) for length, runs in scored]


def common(grid: Grid, variant: Variant, tasks: Sequence[str]) -> list[Point]:
    """Normalised scores over the tasks, at the context lengths that every task has one cell of."""
    per_task: list[dict[int, Cell]] = []
    for task in tasks:
        series = series_of(grid.cells_of(task, variant))
        if len(series) != 1 or score_or_none(task, 0.0) is None:
            return []
        per_task.append(dict(series[0].points))
    # The dots of single seeds would mix tasks here: there are none.
    return [
        Point(length, _across([cells[length] for cells in per_task]), np.array([]))
        for length in sorted(set.intersection(*map(set, per_task)))
    ]


def _across(cells: Sequence[Cell]) -> Estimate:
    """Normalised score over a cell per task."""
    found = strata(cells)
    scores = [
        np.array([score_or_none(cell.task, run) for run in runs]) for cell, runs in zip(cells, found.runs, strict=True)
    ]
    return summarise(*scores, together=found.together)


def _levels(grid: Grid, task: str) -> list[tuple[str, float, Dash]]:
    """Horizontal lines to compare with: name, return and dashes, lowest first."""
    known = styles(grid)
    levels = {
        in_sentence(grid.name(cell.variant)): (middle(cell.runs()), known[cell.variant].dash)
        for cell in grid.levels(task)
    }
    if task in grid.data:
        for name, value in (("data, mean", grid.data[task].mean()), ("data, best", grid.data[task].max())):
            levels[name] = float(value), _DATA_DASHES[name]
    return sorted(((name, value, dash) for name, (value, dash) in levels.items()), key=lambda level: level[1])


def _label_levels(axes: Axes, levels: Sequence[tuple[str, float, Dash]]) -> None:
    """Draw the lines, and their names at the right edge moved apart where they would overlap."""
    for _, value, dash in levels:
        axes.axhline(value, color=colour("muted"), linewidth=1, linestyle=linestyle(dash), zorder=0)
    axes.autoscale_view()
    low, high = axes.get_ylim()
    low = min(low, 0.0)
    high += 0.03 * (high - low)  # whole dots
    axes.set_ylim(low, high)
    heights = [(value - low) / (high - low) for _, value, _ in levels]
    labels = [textwrap.fill(f"{name} {number(value)}", _WIDE) for name, value, _ in levels]
    for index in range(1, len(heights)):
        lines = 1 + (labels[index].count("\n") + labels[index - 1].count("\n")) / 2
        heights[index] = max(heights[index], heights[index - 1] + _LINE_HEIGHT * lines)
    for label, height in zip(labels, heights, strict=True):
        axes.text(
            1.02, height, label, transform=axes.transAxes, va="center", fontsize=8.5, color=colour("muted"),
            linespacing=1.05,
        )  # fmt: skip
