"""The report's figures: return against context length, and return of each episode within a context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from ringrl.evaluation.statistics import Estimate
from ringrl.study.report_cells import Cell, Grid, Variant, middle, series_of, summarise
from ringrl.study.report_svg import SERIES, colour, settings, to_svg
from ringrl.study.tables import normalised, number

_PANEL = (4.0, 2.8)  # inches: with 9 points of text it reads at 360 CSS pixels
_DASHES = ((0, (1, 2)), (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (9, 2)), (0, (3, 1)))
_LINES_IN_CONTEXT = 4  # context lengths shown within a context; more would hide one another


@dataclass(frozen=True)
class Panel:
    """One figure of the page."""

    title: str
    svg: str
    description: str  # what it shows, for those who cannot see it


@dataclass(frozen=True)
class Entry:
    """One line of the legend of all figures."""

    label: str
    colour: str  # name in PALETTE
    dashed: bool


@dataclass(frozen=True)
class _Point:
    """One context length of a curve."""

    length: int
    found: Estimate
    runs: np.ndarray  # (seeds,)


def legend(grid: Grid) -> list[Entry]:
    """What the colours of the figures mean."""
    entries = [Entry(grid.name(variant), _shade(grid, variant), dashed=False) for variant in grid.variants]
    if any(cell.control for cell in grid.cells):
        shade = entries[0].colour if len(entries) == 1 else "muted"
        entries.append(Entry("the same, memory wiped before each episode", shade, dashed=True))
    return entries


def curve_panels(grid: Grid) -> list[Panel]:
    """Return against context length: a panel per task and, for several tasks, one over all in normalised scores."""
    tasks = _tasks_with_curve(grid)
    panels = []
    if len(tasks) > 1 and any(_common(grid, variant, tasks) for variant in grid.variants):
        drawn = _panel(partial(_draw_common, grid=grid, tasks=tasks))
        panels.append(Panel("All tasks, normalised score", drawn, "Normalised score over all tasks by context length."))
    for task in tasks:
        words = f"Return on {task} by context length; the numbers are in the table of returns."
        panels.append(Panel(task, _panel(partial(_draw_curve, grid=grid, task=task)), words))
    return panels


def episode_panels(grid: Grid) -> list[Panel]:
    """Return of each in-context episode: a panel per task that was rolled out for more than one."""
    return [
        Panel(
            task,
            _panel(partial(_draw_episodes, grid=grid, task=task)),
            f"Return on {task} of each episode within a context, first to last.",
        )
        for task in _tasks_with_curve(grid)
        if any(cell.test > 1 for variant in grid.variants for cell in grid.cells_of(task, variant))
    ]


def curve_file(grid: Grid) -> str:
    """All curves in one SVG with its own legend and light colours, for a paper."""
    tasks = _tasks_with_curve(grid)
    columns = max(1, min(3, len(tasks)))
    lines = max(1, -(-len(tasks) // columns))
    with settings():
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines + 0.4), layout="constrained")
        for index, task in enumerate(tasks, start=1):
            axes = figure.add_subplot(lines, columns, index)
            _draw_curve(axes, grid, task)
            axes.set_title(f"{task}: return per episode", fontsize=9, loc="left", color=colour("ink"))
        handles = [
            Line2D([], [], color=colour(entry.colour), linestyle="--" if entry.dashed else "-", label=entry.label)
            for entry in legend(grid)
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower left", frameon=False, labelcolor=colour("ink"))
        return to_svg(figure)


def _panel(draw: Callable[[Axes], None]) -> str:
    with settings():
        figure = Figure(figsize=_PANEL, layout="constrained")
        draw(figure.add_subplot())
        return to_svg(figure)


def _tasks_with_curve(grid: Grid) -> list[str]:
    return [task for task in grid.tasks if any(grid.cells_of(task, variant) for variant in grid.variants)]


def _shade(grid: Grid, variant: Variant) -> str:
    return SERIES[grid.variants.index(variant) % len(SERIES)]


def _draw_curve(axes: Axes, grid: Grid, task: str) -> None:
    lengths: set[int] = set()
    rolled_out = False
    for variant in grid.variants:
        for series in series_of(grid.cells_of(task, variant)):
            rolled_out |= series.trained_on is not None
            with_control = [(length, cell) for length, cell in series.points if cell.control and cell.test > 1]
            _draw_line(axes, _points(with_control, control=True), colour(_shade(grid, variant)), dashed=True)
            points = _points(series.points)
            _draw_line(axes, points, colour(_shade(grid, variant)))
            if series.trained_on is not None:
                last = points[-1]
                label = f"trained on {series.trained_on}"
                axes.annotate(label, (last.length, last.found.value), (0, 7), textcoords="offset points", ha="right")
            lengths |= {point.length for point in points}
    _dress(axes, lengths, "episodes in one context" if rolled_out else "trajectories per context", "return per episode")
    _label_levels(axes, _levels(grid, task))


def _draw_common(axes: Axes, grid: Grid, tasks: Sequence[str]) -> None:
    lengths: set[int] = set()
    for variant in grid.variants:
        points = _common(grid, variant, tasks)
        _draw_line(axes, points, colour(_shade(grid, variant)))
        lengths |= {point.length for point in points}
    _dress(axes, lengths, "trajectories per context", "normalised score")


def _draw_episodes(axes: Axes, grid: Grid, task: str) -> None:
    longest = 1
    lines = _LINES_IN_CONTEXT if len(grid.variants) == 1 else 1
    for variant in grid.variants:
        cells = sorted(grid.cells_of(task, variant), key=lambda cell: (cell.test, cell.train or 0))
        cells = [cell for cell in cells if cell.test > 1][-lines:]
        shade = colour(_shade(grid, variant))
        for index, cell in enumerate(cells):
            per_episode = cell.episode_runs()
            points = [_Point(i, summarise(runs), runs) for i, runs in enumerate(per_episode, 1) if len(runs)]
            newest = index == len(cells) - 1
            _draw_line(axes, points, shade, strength=1.0 if newest else 0.35 + 0.3 * index / len(cells), bars=newest)
            end = points[-1]
            axes.annotate(
                f"n = {cell.test}", (end.length, end.found.value), (5, 0), textcoords="offset points",
                va="center", color=shade, fontsize=8.5,
            )  # fmt: skip
            longest = max(longest, cell.test)
        if cells and cells[-1].control:
            level = middle(cells[-1].control_runs())
            axes.plot([1, cells[-1].test], [level, level], "--", color=shade, linewidth=1.2)
    _dress(axes, set(), "episode in the context", "return of that episode")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(0.8, longest + max(0.2, 0.06 * longest))


def _points(cells: Sequence[tuple[int, Cell]], *, control: bool = False) -> list[_Point]:
    scored = [(length, cell.control_runs() if control else cell.runs()) for length, cell in cells]
    return [_Point(length, summarise(runs), runs) for length, runs in scored]


def _common(grid: Grid, variant: Variant, tasks: Sequence[str]) -> list[_Point]:
    """Normalised scores over the tasks, at the context lengths that every task has one cell of."""
    per_task: list[dict[int, np.ndarray]] = []
    for task in tasks:
        series = series_of(grid.cells_of(task, variant))
        if len(series) != 1 or normalised(task, 0.0) is None:
            return []
        per_task.append(
            {length: np.array([normalised(task, run) for run in cell.runs()]) for length, cell in series[0].points}
        )
    lengths = sorted(set.intersection(*(set(points) for points in per_task)))
    strata = {length: [points[length] for points in per_task] for length in lengths}
    # The dots of single seeds would mix tasks here: there are none.
    return [_Point(length, summarise(*strata[length]), np.array([])) for length in lengths]


def _draw_line(
    axes: Axes, points: Sequence[_Point], shade: str, *, dashed: bool = False, strength: float = 1.0, bars: bool = True
) -> None:
    """A line through the interquartile means, bars for their intervals, a small dot per training seed."""
    if not points:
        return
    lengths = [point.length for point in points]
    axes.plot(
        lengths, [point.found.value for point in points], linestyle=(0, (4, 2)) if dashed else "-", color=shade,
        linewidth=1.2 if dashed else 1.8, alpha=strength, marker="o" if bars else "", markersize=4 if dashed else 5,
        markerfacecolor=colour("paper") if dashed else shade, zorder=2 if dashed else 3,
    )  # fmt: skip
    if dashed or not bars:
        return
    for point in points:
        if point.found.interval:
            ends = [point.found.interval.low, point.found.interval.high]
            axes.plot([point.length] * 2, ends, color=shade, linewidth=4, alpha=0.3, solid_capstyle="butt", zorder=1)
    dots = [(point.length, run) for point in points for run in point.runs if len(point.runs) > 1]
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=shade, markersize=2.2, alpha=0.55, markeredgewidth=0, zorder=2)


def _dress(axes: Axes, lengths: set[int], along: str, up: str) -> None:
    if lengths:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(lengths)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.set_xlim(min(lengths) / 2**0.3, max(lengths) * 2**0.3)
    axes.set_xlabel(along, color=colour("muted"), fontsize=8.5)
    axes.set_title(up, color=colour("muted"), fontsize=8.5, loc="left")  # read across, not with a tilted head
    axes.tick_params(colors=colour("muted"), length=0, pad=5)
    axes.grid(axis="y", color=colour("line"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colour("line"))


def _levels(grid: Grid, task: str) -> list[tuple[str, float]]:
    """Horizontal lines to compare with: name and return, lowest first."""
    levels = {grid.name(cell.variant).lower(): middle(cell.runs()) for cell in grid.references(task)}
    if task in grid.data:
        levels |= {"data, mean": float(grid.data[task].mean()), "data, best": float(grid.data[task].max())}
    return sorted(levels.items(), key=lambda level: level[1])


def _label_levels(axes: Axes, levels: Sequence[tuple[str, float]], gap: float = 0.075) -> None:
    """Draw the lines, and their names at the right edge moved apart where they would overlap."""
    for index, (_, value) in enumerate(levels):
        axes.axhline(value, color=colour("muted"), linewidth=1, linestyle=_DASHES[index % len(_DASHES)], zorder=0)
    axes.autoscale_view()
    low, high = axes.get_ylim()
    low = min(low, 0.0)
    axes.set_ylim(low, high)
    heights = [(value - low) / (high - low) for _, value in levels]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    for (name, value), height in zip(levels, heights, strict=True):
        axes.text(
            1.02, height, f"{name} {number(value)}", transform=axes.transAxes, va="center", fontsize=8.5,
            color=colour("muted"),
        )  # fmt: skip
