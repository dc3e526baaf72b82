"""How charts are drawn: Altair specifications, shown on the page and written as SVG, PDF and PNG."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from ringrl.evaluation.formatting import ABSENT, number
from ringrl.methods import METHODS
from ringrl.report.results import CELL

_SERIES = (
    ("#2458c5", "#7ea8ff"), ("#c2541b", "#f39a63"), ("#19806a", "#50c8ab"), ("#8447b3", "#c79bea"),
    ("#b0335b", "#f28cac"), ("#7a6914", "#d9c45c"), ("#0f7ea3", "#62c5e8"), ("#8a5a3c", "#d3a583"),
    ("#4d7d1f", "#a3d16b"), ("#5b5f97", "#abafe6"), ("#c026a3", "#f27fdc"), ("#b3261e", "#ff8a80"),
    ("#00838f", "#4dd0e1"), ("#a16207", "#f2b84b"), ("#3f6212", "#bef264"), ("#4338ca", "#a5a0ff"),
    ("#be5a8a", "#ffb3d1"), ("#57534e", "#c9c2bb"),
)  # fmt: skip
PALETTE: Mapping[str, tuple[str, str]] = {
    "paper": ("#fdfdfc", "#14161a"), "ink": ("#1c2128", "#e6e8eb"), "muted": ("#646b76", "#9aa2ad"),
    "line": ("#e3e5e8", "#2a2f37"), **{f"series-{index}": pair for index, pair in enumerate(_SERIES, start=1)},
}  # fmt: skip
"""Colours by name: light, dark. The page uses CSS variables of these names, files the light colours (SVG: both)."""
# The methods that have the colours series-1, series-2, ...
_OWNERS = ["at", "bc", "td3+bc", "bc-10%", "dt", "random", "td3", "bc-50%", "ad", "bc-25%"]
_OWN = {METHODS[name].title: f"series-{index}" for index, name in enumerate(_OWNERS, start=1)}
_SHARED = tuple(name for name in PALETTE if name.startswith("series") and name not in _OWN.values())
MEMORY, RESET = "with memory", "memory reset before each episode"
TRAINING, HELD_OUT = "training", "held-out episodes"
_DASHED = {RESET: MEMORY, HELD_OUT: TRAINING}  # what a dashed line shows -> what its solid line shows
FONT = "Inter, system-ui, Liberation Sans, Arial, sans-serif"
WIDTH, HEIGHT = 380, 250  # of a panel in a file, pixels
STRENGTH = alt.Opacity("strength:Q", scale=None, legend=None)  # a column


class Style(NamedTuple):
    """How a method is drawn."""

    colour: str  # name in PALETTE
    dash: tuple[int, ...]  # of horizontal lines; empty for methods with curves


class Panel(NamedTuple):
    """One drawing of a chart."""

    title: str
    spec: dict[str, Any]  # Vega-Lite, with CSS variables as colours
    height: int = HEIGHT  # pixels


class Chart(NamedTuple):
    """A figure: several panels with one caption."""

    name: str  # of its files, without suffix
    title: str
    caption: str
    panels: list[Panel]
    methods: list[str]  # in the legend
    dashed: str = ""  # what dashed lines show; empty if there are none


def styles(table: pd.DataFrame) -> dict[str, Style]:
    """Return how each method is drawn, the same in all charts. Variants take the colours that no method owns."""
    policies = table[table["kind"] != "data"].sort_values(["kind", "method"]).drop_duplicates("method")
    shared = cycle(_SHARED)
    found = {
        method: Style(_OWN.get(method) or next(shared), (2, 3) if kind == "reference" else ())
        for method, kind in zip(policies["method"], policies["kind"], strict=True)
    }
    return found | {"Dataset, all episodes": Style("muted", (7, 3)), "Dataset, best episode": Style("ink", (1, 0))}


_DARK = "".join(f'[{key}="{light}"]{{{key}:{dark}}}' for light, dark in PALETTE.values() for key in ("fill", "stroke"))
_DARK = f"<style>@media screen and (prefers-color-scheme:dark){{{_DARK}}}</style>"


def page_spec(panel: Panel) -> dict[str, Any]:
    """Return the Vega-Lite specification of a panel for the page, which has the legend in HTML."""
    config = _config() | {"legend": {"disable": True}}
    size = {"width": "container", "height": panel.height, "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"$schema": alt.SCHEMA_URL, **panel.spec, **size, "config": config, "background": None}


def chart_files(chart: Chart) -> dict[str, bytes]:
    """Return the chart for a paper, with a legend, as SVG (light and dark), PDF and PNG: file name -> content."""
    svg = vl_convert.vegalite_to_svg(_file_spec(chart.panels, chart.methods))
    return {
        f"{chart.name}.svg": svg.replace(">", f">{_DARK}", 1).encode(),
        f"{chart.name}.pdf": vl_convert.svg_to_pdf(svg),
        f"{chart.name}.png": vl_convert.svg_to_png(svg, scale=2),
    }


def _file_spec(panels: Sequence[Panel], methods: Sequence[str]) -> dict[str, Any]:
    views: list[dict[str, Any]] = []
    for panel in panels:
        layers = [layer for layer in panel.spec["layer"] if layer["mark"].get("opacity") != 0]  # these carry tooltips
        for layer in layers:
            if colour := layer["encoding"].get("color"):
                colour["legend"] = {"values": list(methods)}
        views.append({"layer": layers, "title": panel.title, "width": WIDTH, "height": panel.height})
    spec: dict[str, Any] = {
        "$schema": alt.SCHEMA_URL, "concat": views, "columns": 2 if len(views) == 4 else min(3, len(views)),
        "datasets": {name: rows for panel in panels for name, rows in panel.spec["datasets"].items()},
        "config": _config(), "background": "var(--paper)", "spacing": 30,
    }  # fmt: skip
    if max(map(len, methods), default=0) > 50:
        spec["config"]["legend"] |= {"columns": 1, "labelLimit": 2 * WIDTH}
    text = json.dumps(spec, sort_keys=True)
    for name, (light, _) in PALETTE.items():
        text = text.replace(f"var(--{name})", light)
    return json.loads(text)


def _config() -> dict[str, Any]:
    ink, muted, line = (f"var(--{name})" for name in ("ink", "muted", "line"))
    quiet = {"labelColor": muted, "titleColor": muted, "titleFontWeight": "normal", "ticks": False, "labelPadding": 6}
    return {
        "font": FONT,
        "view": {"stroke": None},
        "axis": quiet | {"labelFontSize": 12, "titleFontSize": 12, "gridColor": line, "domainColor": line},
        "axisX": {"grid": False, "titlePadding": 8, "labelFlush": False},
        "axisY": {"domain": False, "titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": -34,
                  "titleY": -12, "tickCount": 5},
        # Columns are far apart, because a browser's font may be wider than the one measured here.
        "legend": {"orient": "bottom", "columns": 2, "columnPadding": 60, "labelLimit": 400, "labelColor": ink,
                   "labelFontSize": 12, "title": None, "symbolStrokeWidth": 2, "symbolOpacity": 1,
                   "symbolStrokeColor": muted, "layout": {"bottom": {"direction": "vertical", "anchor": "start"}}},
        "title": {"anchor": "start", "color": ink, "fontSize": 13, "offset": 22},
        "text": {"fill": muted},
    }  # fmt: skip


class Drawing(NamedTuple):
    """Colours and axes that the panels of a report share."""

    styles: Mapping[str, Style]

    def chart(self, name: str, title: str, caption: str, panels: list[Panel]) -> Chart:
        """Return a chart. Its legend names the methods that it shows, in the order of the colours."""
        rows = [row for panel in panels for data in panel.spec["datasets"].values() for row in data]
        used = {row.get("method") for row in rows}
        dashed = next((row["memory"] for row in rows if row.get("memory") in _DASHED), "")
        return Chart(name, title, caption, panels, [method for method in self.styles if method in used], dashed)

    def panel(self, title: str, layers: Sequence[alt.Chart], description: str, height: int = HEIGHT) -> Panel:
        """Return layers as one panel."""
        specs, datasets = [layer.to_dict(validate=False) for layer in layers], dict[str, Any]()
        for spec in specs:
            del spec["$schema"], spec["config"]
            datasets |= spec.pop("datasets")
        return Panel(title, {"description": description, "layer": specs, "datasets": datasets}, height)

    def curves(
        self,
        rows: pd.DataFrame,
        axis: Callable[[pd.Series], alt.X],
        *,
        y: alt.Y | None = None,
        runs: pd.DataFrame | None = None,
        points: bool = True,
    ) -> list[Panel]:
        """Return a panel per task: a line per method, memory and curve, and a horizontal line per row without x.

        Args:
            rows: columns task, method, x and iqm, and optionally low, high, memory, curve, strength (opacity) and the
                columns of tooltips.
            axis: returns the x axis for a column of values.
            y: axis of the column "value". Default: the return per episode.
            runs: training runs, drawn as small dots: columns task, method, x, value and seed.
            points: argument of `lines`.
        """
        panels, y = [], y or alt.Y("value:Q", title="return per episode", scale=alt.Scale(zero=True))
        for task, group in rows.groupby("task", sort=False):
            if group["x"].isna().all():
                continue
            data = self.rows(group)
            curves = data[data["x"].notna()]
            x = axis(curves["x"])
            layers = [*self.rules(data[data["x"].isna()], y), *self.lines(curves, x, y, points=points)]
            if runs is not None and (runs["task"] == task).any():
                layers.append(self.dots(runs[runs["task"] == task], x, y))
            panels.append(self.panel(str(task), layers, f"{task}: {y['title']} against {x['title']}."))
        return panels

    def rows(self, data: pd.DataFrame) -> pd.DataFrame:
        """Return the columns that a chart reads. Missing columns get default values."""
        if set(CELL) <= set(data.columns):
            data = data.assign(trajectories=[_lengths(*lengths) for lengths in data[CELL[2:]].to_numpy()])
        defaults = {"low": np.nan, "high": np.nan, "curve": "", "strength": 1.0, "memory": True}
        data = data.assign(value=data["iqm"], **{name: value for name, value in defaults.items() if name not in data})
        ends = zip(data["low"], data["high"], strict=True)
        texts = {
            "shown": [number(value) for value in data["value"]],
            "interval": [f"{number(low)} to {number(high)}" if pd.notna(low) else None for low, high in ends],
        }
        data = data.assign(**{name: text for name, text in texts.items() if name not in data})
        data = data.assign(memory=data["memory"].map(lambda value: {True: MEMORY, False: RESET}.get(value, value)))
        return data.reindex(columns=[*_DRAWN]).dropna(axis=1, how="all").fillna({"interval": ABSENT})

    def colour(self) -> alt.Color:
        """Return the colour of a method, the same in all charts."""
        shades = [f"var(--{style.colour})" for style in self.styles.values()]
        return alt.Color("method:N", title=None, scale=alt.Scale(domain=list(self.styles), range=shades))

    def lines(self, data: pd.DataFrame, x: alt.X, y: alt.Y, *, points: bool = True) -> list[alt.Chart]:
        """Return lines per method, memory and curve, bars for intervals, and tooltips, at visible or hidden points."""
        base = alt.Chart(data).encode(x=x, color=self.colour(), detail=["curve:N", "memory:N"])
        line = base.mark_line(strokeWidth=2, strokeJoin="round").encode(y=y, opacity=STRENGTH)
        if data["memory"].nunique() > 1:
            dashed = next(name for name in _DASHED if (data["memory"] == name).any())
            dashes = alt.Scale(domain=[_DASHED[dashed], dashed], range=[[1, 0], [4, 3]])
            line = line.encode(strokeDash=alt.StrokeDash("memory:N", title=None, scale=dashes))
        marks = base.mark_point(filled=True, size=50, opacity=alt.Undefined if points else 0)
        marks = marks.encode(y=y, tooltip=_tooltips(data), opacity=STRENGTH if points else alt.Undefined)
        layers = [line, marks]
        if "low" in data and data["low"].notna().any():
            low = alt.Y("low:Q", title=y["title"], scale=y["scale"])
            ends = base.mark_rule(strokeWidth=6).encode(y=low, y2="high:Q", opacity=alt.value(0.3))
            layers.insert(0, ends.transform_filter("isValid(datum.low)"))
        return layers

    def dots(self, runs: pd.DataFrame, x: alt.X, y: alt.Y, size: int = 10) -> alt.Chart:
        """Return a small dot per training seed."""
        data = runs[[name for name in ("method", "x", "value", "seed", "loss", "trajectories") if name in runs]]
        data = data.assign(shown=[number(value) for value in runs["value"]])
        mark = alt.Chart(data).mark_point(filled=True, size=size)
        return mark.encode(x=x, y=y, color=self.colour(), opacity=alt.value(0.6), tooltip=_tooltips(data))

    def rules(self, data: pd.DataFrame, y: alt.Y) -> list[alt.Chart]:
        """Return a horizontal line per row, within a wider, invisible line that has the tooltips."""
        layers = []
        for dash, rows in data.groupby(data["method"].map(lambda name: self.styles[name].dash)):
            rows = rows.dropna(axis=1, how="all")
            base = alt.Chart(rows).encode(y=y, color=self.colour())
            layers.append(base.mark_rule(strokeWidth=1.5, strokeDash=list(dash)).encode(opacity=alt.value(0.9)))
            layers.append(base.mark_rule(strokeWidth=9, opacity=0).encode(tooltip=_tooltips(rows)))
        return layers


_TOOLTIPS = {
    "method": "method", "shown": "return", "loss": "loss", "interval": "95 % interval", "seeds": "training seeds",
    "seed": "seed", "trajectories": "trajectories", "episode": "episode", "memory": "memory",
    "step": "step",
}  # fmt: skip
_DRAWN = ("x", "value", "low", "high", "curve", "strength", *_TOOLTIPS)


def _tooltips(data: pd.DataFrame) -> list[alt.Tooltip]:
    shown = [name for name in _TOOLTIPS if name in data and data[name].notna().any()]
    if "memory" in shown and (data["memory"].nunique() == 1 or (data["memory"] == HELD_OUT).any()):
        shown.remove("memory")
    return [alt.Tooltip(f"{name}:N", title=_TOOLTIPS[name]) for name in shown]


def _lengths(train: float, prompt: float, test: float) -> str | None:
    if pd.isna(train) or not train:
        return None
    text = f"{train:.0f}" if train == test else f"trained on {train:.0f}, rolled out for {test:.0f}"
    return f"{text}, prompt of {prompt:.0f}" if prompt else text
