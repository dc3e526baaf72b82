"""What the report's charts are made of: panels, lines with intervals, axes, and what the colours mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

from ringrl.evaluation.records import EvaluationRecord
from ringrl.evaluation.statistics import Estimate
from ringrl.study.report_cells import Grid
from ringrl.study.report_svg import SERIES, colour, settings, to_pdf, to_svg
from ringrl.study.report_variants import Variant

PANEL = (4.0, 2.8)  # inches: with 9 points of text it reads at 360 CSS pixels
Dash = tuple[float, ...]  # lengths of strokes and gaps in points; empty: solid
SOLID: Dash = ()
CONTROL: Dash = (4, 2)
_DASHES: tuple[Dash, ...] = ((1, 2), (5, 2), (5, 2, 1, 2), (9, 2), (3, 1), (2, 4), (9, 2, 1, 2), (1, 4))
_MANY_TIMES = 4  # from this ratio of the largest to the smallest on, an axis is logarithmic


@dataclass(frozen=True)
class Panel:
    """One drawing of a chart."""

    title: str
    draw: Callable[[Axes], None]
    description: str  # what it shows, for those who cannot see it
    size: tuple[float, float] = PANEL


@dataclass(frozen=True)
class Key:
    """What one kind of line means."""

    label: str
    colour: str  # name in PALETTE
    dash: Dash = SOLID


@dataclass(frozen=True)
class Chart:
    """One figure: on the page a drawing per panel, as a file all in one."""

    name: str  # of its files, without suffix; its place in the page
    title: str
    caption: str
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...]
    records: tuple[EvaluationRecord, ...]  # what it was made from


@dataclass(frozen=True)
class Point:
    """A place on a curve."""

    x: float
    found: Estimate
    runs: np.ndarray  # (seeds,); a small dot each


def styles(grid: Grid) -> dict[Variant, Key]:
    """Colour and dashes of each method, the same in all charts: a colour with a context, grey dashes without."""
    found = {}
    for index, variant in enumerate(grid.variants):  # dashes where the colours come round again
        again, place = divmod(index, len(SERIES))
        found[variant] = Key(grid.name(variant), SERIES[place], _DASHES[again % len(_DASHES)] if again else SOLID)
    for index, variant in enumerate(grid.context_free):
        found[variant] = Key(grid.name(variant), "muted", _DASHES[index % len(_DASHES)])
    return found


def panel_svg(panel: Panel) -> str:
    """A panel as an SVG of its own."""
    with settings():
        figure = Figure(figsize=panel.size, layout="constrained")
        panel.draw(figure.add_subplot())
        return to_svg(figure)


def chart_files(chart: Chart) -> dict[str, bytes]:
    """The chart for a paper, light colours and its own key: file name -> content."""
    columns = 2 if len(chart.panels) == 4 else max(1, min(3, len(chart.panels)))
    lines = max(1, -(-len(chart.panels) // columns))
    width, height = (max(panel.size[side] for panel in chart.panels) for side in (0, 1))
    with settings():
        figure = Figure(figsize=(width * columns, height * lines + 0.2 * len(chart.keys)), layout="constrained")
        for index, panel in enumerate(chart.panels, start=1):
            axes = figure.add_subplot(lines, columns, index)
            panel.draw(axes)
            up = axes.get_title(loc="left")
            title = panel.title if up in panel.title else f"{panel.title}: {up}"  # "" is in every title
            axes.set_title(title, fontsize=9, loc="left", color=colour("ink"))
        if chart.keys:
            handles = [
                Line2D([], [], color=colour(key.colour), linestyle=linestyle(key.dash), label=key.label)
                for key in chart.keys
            ]
            figure.legend(handles=handles, loc="outside lower left", frameon=False, labelcolor=colour("ink"))
        drawn = to_svg(figure).encode()
        figure.set_layout_engine("none")  # it stays as it is laid out
        return {f"{chart.name}.svg": drawn, f"{chart.name}.pdf": to_pdf(figure)}


def linestyle(dash: Dash) -> Literal["-"] | tuple[float, Dash]:
    """Dashes as Matplotlib wants them."""
    return (0, dash) if dash else "-"


def draw_line(
    axes: Axes, points: Sequence[Point], key: Key, *, control: bool = False, strength: float = 1.0, bars: bool = True
) -> None:
    """A line through the interquartile means, bars for their intervals, a small dot per training seed."""
    if not points:
        return
    shade = colour(key.colour)
    axes.plot(
        [point.x for point in points], [point.found.value for point in points],
        linestyle=linestyle(CONTROL if control else key.dash), color=shade, linewidth=1.2 if control else 1.8,
        alpha=strength, marker="o" if bars else "", markersize=4 if control else 5,
        markerfacecolor=colour("paper") if control else shade, zorder=2 if control else 3,
    )  # fmt: skip
    if control or not bars:
        return
    for point in points:
        if point.found.interval:
            ends = [point.found.interval.low, point.found.interval.high]
            axes.plot([point.x] * 2, ends, color=shade, linewidth=4, alpha=0.3, solid_capstyle="butt", zorder=1)
    dots = [(point.x, run) for point in points for run in point.runs if len(point.runs) > 1]
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=shade, markersize=2.2, alpha=0.55, markeredgewidth=0, zorder=2)


def draw_band(axes: Axes, points: Sequence[Point], key: Key) -> None:
    """The intervals of many points, as one band; nothing where they have none."""
    ends = [(point.x, point.found.interval) for point in points]
    known = np.array([(x, interval.low, interval.high) for x, interval in ends if interval]).reshape(-1, 3)
    axes.fill_between(known[:, 0], known[:, 1], known[:, 2], color=colour(key.colour), alpha=0.16, linewidth=0)


def dress(axes: Axes, along: str, up: str) -> None:
    """Quiet axes: a line below, a faint grid, words instead of a tilted label."""
    axes.set_xlabel(along, color=colour("muted"), fontsize=8.5)
    axes.set_title(up, color=colour("muted"), fontsize=8.5, loc="left")  # read across, not with a tilted head
    axes.tick_params(colors=colour("muted"), length=0, pad=5)
    axes.grid(axis="y", color=colour("line"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colour("line"))


def context_axis(axes: Axes, lengths: set[int]) -> None:
    """Context lengths, each doubling as wide as the next."""
    if lengths:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(lengths)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.set_xlim(min(lengths) / 2**0.3, max(lengths) * 2**0.3)


def amount_axis(axes: Axes, amounts: Sequence[float]) -> None:
    """Amounts with prefixes (k, M, G), logarithmic where they lie far apart; room at both ends."""
    low, high = min(amounts), max(amounts)
    if low > 0 and high / low >= _MANY_TIMES:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high / low < 50 else (1.0,), numticks=8))
    else:
        room = 0.2 * (high - low) or 0.5 * abs(high) or 1.0
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep="\N{NO-BREAK SPACE}"))
