"""The charts of a report: Altair specifications, shown on the page and written as SVG, PDF and PNG."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from altair.utils.schemapi import debug_mode

from ringrl.evaluation.formatting import ABSENT, number
from ringrl.evaluation.scores import score_or_none
from ringrl.evaluation.statistics import performance_profile
from ringrl.report.results import CELL, RUN
from ringrl.report.tables import (
    BOOTSTRAP_SEED,
    RESAMPLES,
    contenders,
    episode_returns,
    intervals,
    last_episodes,
    levels,
    normalised,
    normalised_scores,
    prompt_returns,
    run_scores,
    scores_of,
    strata,
)

PALETTE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "paper": ("#fdfdfc", "#14161a"),
        "ink": ("#1c2128", "#e6e8eb"),
        "muted": ("#646b76", "#9aa2ad"),
        "line": ("#e3e5e8", "#2a2f37"),
        "series-1": ("#2458c5", "#7ea8ff"),
        "series-2": ("#c2541b", "#f39a63"),
        "series-3": ("#19806a", "#50c8ab"),
        "series-4": ("#8447b3", "#c79bea"),
        "series-5": ("#b0335b", "#f28cac"),
        "series-6": ("#7a6914", "#d9c45c"),
        "series-7": ("#0f7ea3", "#62c5e8"),
        "series-8": ("#8a5a3c", "#d3a583"),
        "series-9": ("#4d7d1f", "#a3d16b"),
        "series-10": ("#5b5f97", "#abafe6"),
    }
)
"""Colours by name: light, dark. The page uses CSS variables of these names, the files the light colours."""
SERIES = tuple(name for name in PALETTE if name.startswith("series"))
MEMORY, RESET = "with memory", "memory reset before each episode"
FONT = "Inter, system-ui, Liberation Sans, Arial, sans-serif"
WIDTH, HEIGHT = 380, 250  # of a panel in a file, pixels
_SHAPES, _DASHES = ("circle", "square", "triangle-up", "diamond"), ((2, 3), (6, 3), (1, 4), (6, 3, 1, 3))
_POINTS_TO_MARK = 16  # a longer curve has a band instead of bars
_CURVES = 4  # context lengths of one method in the chart of episodes
_LOG_RATIO = 4  # an axis is logarithmic if its largest value is this many times the smallest
_THRESHOLDS = 61
_MEASURES = {
    "tokens": ("tokens", "Tokens: processed in training, with repetitions."),
    "FLOPs": ("floating-point operations", "FLOPs: multiplications and additions of the transformer blocks, forward "
              "and backward. Other models are not counted."),
    "time": ("", "Time: of training, with compilation and waiting for data."),
}  # fmt: skip
_UNITS = ((7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))  # from these seconds on


class Style(NamedTuple):
    """How a method is drawn."""

    colour: str  # name in PALETTE
    shape: str  # of points
    dash: tuple[int, ...]  # of horizontal lines; empty for methods with curves


class Panel(NamedTuple):
    """One drawing of a chart."""

    title: str
    spec: dict[str, Any]  # Vega-Lite, with CSS variables as colours
    option: str = ""  # value of the chart's selector at which the panel is shown
    height: int = HEIGHT  # pixels


class Chart(NamedTuple):
    """A figure: several panels with one caption."""

    name: str  # of its files, without suffix
    title: str
    caption: str
    panels: list[Panel]
    methods: list[str]  # in the legend
    has_reset: bool = False  # whether a line without memory is shown

    @property
    def options(self) -> list[str]:
        """Values of the selector; empty if there is none."""
        return [option for option in dict.fromkeys(panel.option for panel in self.panels) if option]


def styles(table: pd.DataFrame) -> dict[str, Style]:
    """Return the colour of each method, the same in all charts; where colours repeat, shapes and dashes differ."""
    policies, found = table[table["kind"] != "data"].sort_values(["kind", "method"]).drop_duplicates("method"), {}
    for index, (method, kind) in enumerate(zip(policies["method"], policies["kind"], strict=True)):
        again = index // len(SERIES) % len(_SHAPES)
        dash = _DASHES[again] if kind == "reference" else ()
        found[method] = Style(SERIES[index % len(SERIES)], _SHAPES[again], dash)
    return found | {
        "Dataset, all episodes": Style("muted", "circle", (7, 3)),
        "Dataset, best episode": Style("muted", "circle", (1, 0)),
    }


def all_charts(results: pd.DataFrame, table: pd.DataFrame, losses: pd.DataFrame) -> list[Chart]:
    """Return the charts that the results are sufficient for.

    Args:
        results: the table of `read_results`.
        table: the table of `returns_table`.
        losses: training losses, as `provenance.training_losses` returns them.
    """
    draw = Drawing(styles(table), results.groupby(CELL)["command"].agg(_commands).rename("command"), {})
    with debug_mode(False):  # validating each of some hundred marks takes longer than all the rest
        charts = [
            _context_chart(draw, results, table), _cost_chart(draw, results, table), _episode_chart(draw, results),
            _prompt_chart(draw, results), _last_chart(draw, results), _profile_chart(draw, results, table),
            _loss_chart(draw, losses),
        ]  # fmt: skip
    return [chart for chart in charts if chart.panels]


def page_spec(panel: Panel) -> dict[str, Any]:
    """Return the Vega-Lite specification of a panel for the page, which has the legend in HTML."""
    config = _config() | {"legend": {"disable": True}}
    size = {"width": "container", "height": panel.height, "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"$schema": alt.SCHEMA_URL, **panel.spec, **size, "config": config, "background": None}


def chart_files(chart: Chart) -> dict[str, bytes]:
    """Return the chart for a paper, with light colours and a legend, as SVG, PDF and PNG: file name -> content."""
    files = {}
    for option in chart.options or [""]:
        name = f"{chart.name}_{option.lower()}" if option else chart.name
        svg = vl_convert.vegalite_to_svg(_file_spec([panel for panel in chart.panels if panel.option == option]))
        files[f"{name}.svg"] = svg.encode()
        files[f"{name}.pdf"] = vl_convert.svg_to_pdf(svg)
        files[f"{name}.png"] = vl_convert.svg_to_png(svg, scale=2)
    return files


def _file_spec(panels: Sequence[Panel]) -> dict[str, Any]:
    views: list[dict[str, Any]] = []
    for panel in panels:
        layers = [layer for layer in panel.spec["layer"] if layer["mark"].get("opacity") != 0]  # these carry tooltips
        views.append({"layer": layers, "title": panel.title, "width": WIDTH, "height": panel.height})
    spec = {
        "$schema": alt.SCHEMA_URL, "concat": views, "columns": 2 if len(views) == 4 else min(3, len(views)),
        "datasets": {name: rows for panel in panels for name, rows in panel.spec["datasets"].items()},
        "params": panels[0].spec["params"], "config": _config(), "background": "white", "spacing": 30,
    }  # fmt: skip
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
        "legend": {"orient": "bottom", "columns": 2, "labelLimit": 400, "labelColor": ink, "labelFontSize": 12,
                   "title": None, "symbolStrokeWidth": 2},
        "title": {"anchor": "start", "color": ink, "fontSize": 13, "offset": 22},
        "text": {"fill": muted},
    }  # fmt: skip


class Drawing(NamedTuple):
    """Data, colours and axes that the panels of a report share."""

    styles: Mapping[str, Style]
    commands: pd.Series  # by CELL
    frames: dict[str, pd.DataFrame]  # data of all panels, by name

    def chart(self, name: str, title: str, caption: str, panels: list[Panel]) -> Chart:
        """Return a chart. Its legend names the methods that it shows, in the order of the colours."""
        rows = [row for panel in panels for data in panel.spec["datasets"].values() for row in data]
        used = {row.get("method") for row in rows}
        has_reset = any(row.get("memory") == RESET for row in rows)
        return Chart(name, title, caption, panels, [method for method in self.styles if method in used], has_reset)

    def base(self, data: pd.DataFrame) -> alt.Chart:
        """Return a chart of these rows without a mark. `panel` adds the rows to the specification."""
        name = next((name for name, frame in self.frames.items() if frame is data), f"rows{len(self.frames)}")
        self.frames[name] = data
        return alt.Chart(alt.NamedData(name=name))

    def panel(
        self, title: str, layers: Sequence[alt.Chart], description: str, option: str = "", height: int = HEIGHT
    ) -> Panel:
        """Return layers made with `base` as one panel. Its parameter `isolated` is the method chosen in the legend."""
        specs = [layer.to_dict(validate=False) for layer in layers]
        for spec in specs:
            del spec["$schema"], spec["config"]
        names = sorted({spec["data"]["name"] for spec in specs})
        rows = {name: json.loads(self.frames[name].to_json(orient="records", double_precision=6)) for name in names}
        params = [{"name": "isolated", "value": ""}]
        spec = {"description": description, "layer": specs, "datasets": rows, "params": params}
        return Panel(title, spec, option, height)

    def curves(
        self,
        rows: pd.DataFrame,
        axis: Callable[[pd.Series], alt.X],
        *,
        y: alt.Y | None = None,
        runs: pd.DataFrame | None = None,
        option: str = "",
        **marks: Any,
    ) -> list[Panel]:
        """Return a panel per task: a line per method, memory and curve, and a horizontal line per row without x.

        Args:
            rows: columns task, method, x and iqm, and optionally low, high, memory, curve, strength (opacity), label
                and the columns of tooltips.
            axis: returns the x axis for a column of values.
            y: axis of the column "value". Default: the return per episode.
            runs: training runs, drawn as small dots: columns task, method, x, value and seed.
            option: value of the chart's selector.
            marks: arguments of `lines`.
        """
        panels, y = [], y or alt.Y("value:Q", title="return per episode", scale=alt.Scale(zero=True))
        for task, group in rows.groupby("task", sort=False):
            if group["x"].isna().all():
                continue
            data = self.rows(group)
            points = data[data["x"].notna()]
            x = axis(points["x"])
            layers = [*self.rules(data[data["x"].isna()], y), *self.lines(points, x, y, **marks)]
            if runs is not None and (runs["task"] == task).any():
                layers.append(self.dots(runs[runs["task"] == task], x, y))
            panels.append(self.panel(str(task), layers, f"{task}: {y['title']} against {x['title']}.", option))
        return panels

    def rows(self, data: pd.DataFrame) -> pd.DataFrame:
        """Return the columns that a chart reads. Missing columns get default values."""
        if set(CELL) <= set(data.columns):
            data = data.merge(self.commands, left_on=CELL, right_index=True, how="left")
            data = data.assign(trajectories=[_lengths(*lengths) for lengths in data[CELL[2:]].to_numpy()])
        defaults = {"low": np.nan, "high": np.nan, "curve": "", "strength": 1.0, "memory": True}
        data = data.assign(value=data["iqm"], **{name: value for name, value in defaults.items() if name not in data})
        ends = zip(data["low"], data["high"], strict=True)
        texts = {
            "shown": [number(value) for value in data["value"]],
            "interval": [f"{number(low)} to {number(high)}" if pd.notna(low) else None for low, high in ends],
        }
        data = data.assign(**{name: text for name, text in texts.items() if name not in data})
        data = data.assign(memory=data["memory"].map({True: MEMORY, False: RESET}))
        return data.reindex(columns=[*_DRAWN]).dropna(axis=1, how="all").fillna({"interval": ABSENT})

    def colour(self) -> alt.Color:
        """Return the colour of a method, the same in all charts."""
        shades = [f"var(--{style.colour})" for style in self.styles.values()]
        return alt.Color("method:N", title=None, scale=alt.Scale(domain=list(self.styles), range=shades))

    def lines(
        self, data: pd.DataFrame, x: alt.X, y: alt.Y, *, band: bool = False, points: bool = True, step: bool = False
    ) -> list[alt.Chart]:
        """Return lines per method, memory and curve, bars or a band for intervals, points with tooltips, and labels.

        Args:
            data: rows as `rows` returns them.
            x, y: axes of the columns x and value.
            band: draw intervals as a band.
            points: draw the points; False leaves only their tooltips.
            step: draw lines as steps.
        """
        how: dict[str, Any] = {"interpolate": "step-after"} if step else {}
        base = self.base(data).encode(x=x, color=self.colour(), detail=["curve:N", "memory:N"])
        line = base.mark_line(strokeWidth=2, strokeJoin="round", **how).encode(y=y, opacity=_opacity("strength"))
        if data["memory"].nunique() > 1:
            dashes = alt.Scale(domain=[MEMORY, RESET], range=[[1, 0], [4, 3]])
            line = line.encode(strokeDash=alt.StrokeDash("memory:N", title=None, scale=dashes))
        marks = base.mark_point(filled=True, size=50, opacity=alt.Undefined if points else 0)
        marks = marks.encode(y=y, tooltip=_tooltips(data))
        if points:
            shapes = alt.Scale(domain=list(self.styles), range=[style.shape for style in self.styles.values()])
            marks = marks.encode(shape=alt.Shape("method:N", title=None, scale=shapes), opacity=_opacity("strength"))
        layers = [line, marks]
        if "low" in data and data["low"].notna().any():
            ends = base.mark_area(**how) if band else base.mark_rule(strokeWidth=6)
            low = alt.Y("low:Q", title=y["title"], scale=y["scale"])
            ends = ends.encode(y=low, y2="high:Q", opacity=_opacity(0.15 if band else 0.3))
            layers.insert(0, ends.transform_filter("isValid(datum.low)"))
        if "label" in data:
            text = base.mark_text(align="right", dx=-4, dy=-9).encode(y=y, text="label:N", opacity=_opacity(1.0))
            layers.append(text.transform_filter("isValid(datum.label)"))
        return layers

    def dots(self, runs: pd.DataFrame, x: alt.X, y: alt.Y) -> alt.Chart:
        """Return a small dot per training seed."""
        data = runs[["method", "x", "value", "seed"]].assign(shown=[number(value) for value in runs["value"]])
        mark = self.base(data).mark_point(filled=True, size=10)
        return mark.encode(x=x, y=y, color=self.colour(), opacity=_opacity(0.6), tooltip=_tooltips(data))

    def rules(self, data: pd.DataFrame, y: alt.Y) -> list[alt.Chart]:
        """Return a horizontal line per row."""
        layers = []
        for dash, rows in data.groupby(data["method"].map(lambda name: self.styles[name].dash)):
            rows = rows.dropna(axis=1, how="all")
            mark = self.base(rows).mark_rule(strokeWidth=1.5, strokeDash=list(dash))
            layers.append(mark.encode(y=y, color=self.colour(), opacity=_opacity(0.9), tooltip=_tooltips(rows)))
        return layers


_TOOLTIPS = {
    "method": "method", "shown": "return", "loss": "loss", "interval": "95 % interval", "seeds": "training seeds",
    "seed": "seed", "trajectories": "trajectories", "episode": "episode", "memory": "memory", "starts": "starts",
    "step": "step", "fraction": "fraction of runs", "command": "command",
}  # fmt: skip
_DRAWN = ("x", "value", "low", "high", "curve", "strength", "label", *_TOOLTIPS)


def _tooltips(data: pd.DataFrame) -> list[alt.Tooltip]:
    shown = [name for name in _TOOLTIPS if name in data and data[name].notna().any()]
    if "memory" in shown and data["memory"].nunique() == 1:
        shown.remove("memory")
    return [alt.Tooltip(f"{name}:N", title=_TOOLTIPS[name]) for name in shown]


def _opacity(strength: float | str) -> alt.OpacityValue:
    """Return a constant or a column as opacity. Methods other than the isolated one are faint."""
    column = {"field": strength, "type": "quantitative", "scale": None, "legend": None}
    value = {"value": strength} if isinstance(strength, float) else column
    return alt.OpacityValue(0.06, condition={"test": "isolated == '' || datum.method == isolated", **value})


def _lengths(train: float, prompt: float, test: float) -> str | None:
    if pd.isna(train) or not train:
        return None
    text = f"{train:.0f}" if train == test else f"trained on {train:.0f}, rolled out for {test:.0f}"
    return f"{text}, prompt of {prompt:.0f}" if prompt else text


def _commands(commands: pd.Series) -> str | None:
    found = sorted(set(commands.dropna()))
    return None if not found else found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} more)"


def _length_axis(title: str, lengths: pd.Series) -> alt.X:
    """Return a logarithmic axis for lengths, extended to zero if a length is zero."""
    values = sorted({float(length) for length in lengths})
    if values[0] > 0:
        scale = alt.Scale(type="log", base=2, domain=[values[0] / 1.25, values[-1] * 1.25], nice=False)
    else:
        scale = alt.Scale(type="symlog", constant=1, domain=[0, values[-1] * 1.25], nice=False)
    return alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(values=values, format="d", labelOverlap=True))


def _amount_axis(title: str, amounts: pd.Series) -> alt.X:
    """Return an axis with SI prefixes, logarithmic if the amounts span a large ratio."""
    low, high = amounts.min(), amounts.max()
    axis = alt.Axis(format="~s", tickCount=4, labelOverlap=True)
    if low > 0 and high / low >= _LOG_RATIO:
        scale = alt.Scale(type="log", domain=[low / 1.3, high * 1.3], nice=False)
        return alt.X("x:Q", title=f"{title} (logarithmic)", scale=scale, axis=axis)
    return alt.X("x:Q", title=title, scale=alt.Scale(domain=[0, 1.1 * high or 1], nice=False), axis=axis)


def _score_axis(title: str, scores: pd.Series) -> alt.X:
    return alt.X("x:Q", title=title, scale=alt.Scale(domain=[scores.min(), scores.max()], nice=False))


def _episode_axis(episodes: pd.Series) -> alt.X:
    scale = alt.Scale(domain=[0.8, episodes.max() + 0.2], nice=False)
    return alt.X("x:Q", title="episode in the context", scale=scale, axis=alt.Axis(format="d", tickMinStep=1))


def _one_seed(data: pd.DataFrame) -> str:
    return " A point without a bar has one training seed, so it has no interval." if (data["seeds"] == 1).any() else ""


def _context_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Return against context length: a panel per task, and normalised scores over all tasks."""
    common, points = normalised_scores(results, table), table[table["length"].notna()]
    common = common.assign(task="All tasks, normalised score", x=common["length"])
    score = alt.Y("value:Q", title="normalised score", scale=alt.Scale(zero=True))
    panels = draw.curves(common, partial(_length_axis, "trajectories per context"), y=score)
    runs = run_scores(results)
    runs = runs[runs["memory"]].merge(points[points["seeds"] > 1][[*CELL, "length"]], on=CELL)
    runs = runs.rename(columns={"length": "x", "mean": "value"})
    for task, rows in table.groupby("task"):
        rows = rows[rows["length"].notna() | (rows["kind"] == "data") | rows.index.isin(levels(table, str(task)).index)]
        ends = rows.sort_values("length").drop_duplicates(["method", "curve"], keep="last").index
        label = rows["curve"].where(rows.index.isin(ends) & (rows["curve"] != ""))
        rows = rows.assign(x=rows["length"], memory=True, strength=1.0, label=label)
        control = rows[rows["x"].notna() & rows["control"].notna() & (rows["test_trajectories"] > 1)]
        absent = {"low": np.nan, "high": np.nan, "label": None}
        control = control.assign(iqm=control["control"], memory=False, strength=0.8, **absent)
        unit = "trajectories" if label.isna().all() else "episodes"
        axis = partial(_length_axis, f"{unit} per context")
        panels += draw.curves(pd.concat([rows, control]), axis, runs=runs)
    caption = (
        "Each point is the interquartile mean over training seeds of the mean return of all episodes. Bars are 95 % "
        f"intervals (stratified bootstrap over seeds), small dots are single seeds.{_one_seed(points)}"
    )
    if (table["kind"] != "context").any():
        caption += " Horizontal lines need no context."
    if ((points["family"] == "at") & (points["train_trajectories"] == 1)).any():
        caption += " With one trajectory per context, the Agentic Transformer is a Decision Transformer."
    return draw.chart("return_by_context", "Return against context length", caption, panels)


def _cost_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Return against training cost; a selector chooses tokens, FLOPs or time."""
    panels, captions = [], []
    policies = table[table["length"].notna() | (table["kind"] == "reference")].drop(columns="curve")
    for option, column in (("tokens", "tokens"), ("FLOPs", "flops"), ("time", "seconds")):
        runs = results.groupby(RUN, as_index=False)[column].first().dropna()
        means = runs.groupby(CELL, as_index=False).agg(x=(column, "mean"), known=("seed", "nunique"))
        rows = policies.merge(means, on=CELL)
        rows = rows[(rows["known"] == rows["seeds"]) & (rows["x"] > 0)]
        rows = rows.assign(label=[f"{length:.0f}" if length else None for length in rows["train_trajectories"]])
        for _, cells in rows.groupby("task"):
            if len(cells) > 1 and (cells["kind"] == "context").any():
                unit, (axis, explained) = 1.0, _MEASURES[option]
                if option == "time":
                    unit, axis = next((size, name) for least, size, name in _UNITS if cells["x"].max() >= least)
                cells = cells.assign(x=cells["x"] / unit)
                panels += draw.curves(cells, partial(_amount_axis, axis), option=option)
                captions.append(explained)
    caption = (
        "The points of the first chart against the training cost of each policy (mean over seeds). A number next to a "
        f"point is its trajectories per context. {' '.join(dict.fromkeys(captions))}"
    )
    return draw.chart("return_by_cost", "Return against training cost", caption, panels)


def _episode_chart(draw: Drawing, results: pd.DataFrame) -> Chart:
    """Return of each episode of a rollout, with and without memory."""
    table = episode_returns(results).astype({"memory": bool})
    table = table[table["test_trajectories"] > 1]
    cells = table[table["memory"]].drop_duplicates(CELL).sort_values(["test_trajectories", "train_trajectories"])
    cells = cells.assign(rank=cells.groupby(["task", "method"]).cumcount(ascending=False))
    rows = table.merge(cells[[*CELL, "rank"]], on=CELL)
    shown = rows.groupby("task")["method"].transform("nunique").map(lambda methods: _CURVES if methods == 1 else 1)
    longest = rows["rank"] == 0
    rows = rows.assign(
        x=rows["episode"], strength=np.where(longest, 1.0, 0.45), curve=_curve(rows),
        low=rows["low"].where(longest & rows["memory"]), high=rows["high"].where(longest & rows["memory"]),
    )[(rows["rank"] < shown) & (rows["memory"] | longest)]  # fmt: skip
    panels = draw.curves(rows, _episode_axis, band=len(rows) > 0 and rows["x"].max() > _POINTS_TO_MARK)
    caption = (
        "The same policy plays n episodes in a row and keeps them in its context. The dashed line is the same policy "
        "from the same starts with its memory reset before each episode. Episodes at different places have different "
        "starts, so compare the solid line with the dashed one: a policy that learns in context rises above it from "
        "left to right. Faint lines are shorter contexts."
    )
    return draw.chart("return_by_episode", "Return by episode in the context", caption, panels)


def _curve(rows: pd.DataFrame) -> pd.Series:
    return rows["train_trajectories"].astype(str) + "/" + rows["test_trajectories"].astype(str)


def _prompt_chart(draw: Drawing, results: pd.DataFrame) -> Chart:
    """Return after prompts of different lengths."""
    runs = prompt_returns(results)
    rows, runs = intervals(runs, CELL), runs.assign(x=runs["prompt_trajectories"])
    runs = runs[runs.groupby(CELL)["seed"].transform("nunique") > 1]
    longest = rows.groupby(["task", "method"])["train_trajectories"].transform("max") == rows["train_trajectories"]
    rows = rows.assign(x=rows["prompt_trajectories"], curve=_curve(rows), strength=np.where(longest, 1.0, 0.5))
    caption = (
        "The same policies from the same starts, with more or fewer trajectories of the dataset in the context before "
        f"the first episode. Faint lines are policies trained on shorter contexts.{_one_seed(rows)}"
    )
    axis = partial(_length_axis, "dataset trajectories before the episode")
    panels = draw.curves(rows, axis, runs=runs)
    return draw.chart("return_by_prompt", "Return against prompt length", caption, panels)


def _last_chart(draw: Drawing, results: pd.DataFrame) -> Chart:
    """Return of last episodes from equal starts."""
    rows = last_episodes(results)
    memory = rows["memory"].astype(bool)
    rows = rows.assign(
        x=rows["test_trajectories"].where(rows["kind"] == "context").astype("float64"),
        memory=memory, low=rows["low"].where(memory), high=rows["high"].where(memory),
    )  # fmt: skip
    caption = (
        "Last episodes of contexts of n trajectories, from the starts of the last episodes of the longest contexts. "
        "Methods without context play single episodes from these starts. Every point of a task has the same starts."
    )
    panels = draw.curves(rows, partial(_length_axis, "n, trajectories per context"))
    return draw.chart("last_episodes", "Last episodes from equal starts", caption, panels)


def _profile_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Performance profiles: the fraction of training runs above each return."""
    known, runs, panels = contenders(table), run_scores(results), []
    tasks = sorted({task for side in known for task in side["cells"]})
    groups = [(task, [task], "return per episode") for task in tasks]
    if len(tasks) > 1 and all(score_or_none(task, 0.0) is not None for task in tasks):
        groups.insert(0, ("All tasks, normalised score", tasks, "normalised score"))
    y = alt.Y("value:Q", title="fraction of runs above", scale=alt.Scale(domain=[0, 1]))
    for title, of, unit in groups if any(side["kind"] == "context" for side in known) else []:
        sides = [side for side in known if all(task in side["cells"] for task in of)]
        if not sides:
            continue
        parts, drawn = [], [strata([scores_of(runs, side["cells"][task]) for task in of]) for side in sides]
        if unit == "normalised score":
            drawn = [(list(map(normalised, of, scores)), together) for scores, together in drawn]
        every = np.concatenate([part for scores, _ in drawn for part in scores])
        margin = 0.04 * (np.ptp(every) or 1.0)
        thresholds = np.linspace(every.min() - margin, every.max() + margin, _THRESHOLDS)
        for side, (scores, together) in zip(sides, drawn, strict=True):
            generator = np.random.default_rng(BOOTSTRAP_SEED)
            found = performance_profile(scores, thresholds, generator=generator, together=together, resamples=RESAMPLES)
            longest = side["longest"]
            part = pd.DataFrame({"x": thresholds, "iqm": found.fractions}).round(4)
            parts.append(part.assign(
                task=title, method=side["method"], curve=side["name"], strength=1.0 if longest else 0.4,
                low=found.low if longest else np.nan, high=found.high if longest else np.nan, interval=None,
                seeds=found.runs, shown=[number(x) for x in thresholds],
                fraction=[f"{value:.2f}" for value in found.fractions],
            ))  # fmt: skip
        axis = partial(_score_axis, unit)
        panels += draw.curves(pd.concat(parts, ignore_index=True), axis, y=y, band=True, points=False, step=True)
    caption = (
        "The fraction of training runs that return more than the value on the axis. A method whose line is above "
        "another line everywhere is better by every measure. Strong lines are the longest context, faint lines the "
        "shortest. Bands are pointwise 95 % intervals (stratified bootstrap over seeds)."
    )
    return draw.chart("performance_profiles", "Performance profiles", caption, panels)


def _loss_chart(draw: Drawing, losses: pd.DataFrame) -> Chart:
    """Training loss by step, a line per run."""
    panels = []
    x = alt.X("x:Q", title="optimiser step", axis=alt.Axis(format="~s", tickCount=5))
    for _, rows in losses.groupby("task"):
        rank = rows.groupby("method")["train_trajectories"].rank(method="dense", pct=True)
        low, high = rows["loss"].min(), rows["loss"].max()
        is_log = low > 0 and high > 20 * low
        scale = alt.Scale(type="log") if is_log else alt.Scale(zero=True)
        y = alt.Y("value:Q", title="loss (logarithmic)" if is_log else "loss", scale=scale)
        rows = rows.assign(
            x=rows["step"], iqm=rows["loss"], curve=rows["run"], strength=0.25 + 0.6 * rank, shown=None, interval=None,
            loss=[f"{loss:.4g}" for loss in rows["loss"]], step=rows["step"].round().astype(int),
            trajectories=rows["train_trajectories"].replace(0, None),
        )  # fmt: skip
        panels += draw.curves(rows, lambda _: x, y=y, points=False)
    caption = (
        "Training loss against the optimiser step, one line per run. Each point is a mean over consecutive steps. The "
        "longer the context, the stronger the line. Losses of different methods are not comparable, so compare "
        "lines of one colour."
    )
    if lost := int(losses.drop_duplicates("run")["not_finite"].sum()):
        caption += f" Steps without a finite loss are left out ({lost})."
    return draw.chart("learning_curves", "Learning curves", caption, panels)
