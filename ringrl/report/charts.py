"""The charts of a report: Altair specifications, shown on the page and written as SVG, PDF and PNG."""

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from altair.utils.schemapi import debug_mode

from ringrl.evaluation.formatting import number
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
    "tokens": ("tokens", "Tokens that the model processed in training, with repetitions."),
    "FLOPs": ("floating-point operations", "Multiplications and additions of the transformer blocks, forward and "
              "backward. Other models are not counted."),
    "time": ("", "Wall-clock time of training, with compilation and waiting for data."),
}  # fmt: skip


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
    has_reset: bool = False  # dashed lines are in it

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
        "dataset, mean": Style("muted", "circle", (7, 3)),
        "dataset, best": Style("muted", "circle", (1, 0)),
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
    datasets: dict[str, Any] = {}
    for index, panel in enumerate(panels):
        names = {name: f"{name}_{index}" for name in panel.spec["datasets"]}
        datasets |= {names[name]: rows for name, rows in panel.spec["datasets"].items()}
        layers = [layer | {"data": {"name": names[layer["data"]["name"]]}} for layer in panel.spec["layer"]
                  if layer["mark"].get("opacity") != 0]  # these only carry tooltips  # fmt: skip
        views.append({"layer": layers, "title": panel.title, "width": WIDTH, "height": panel.height})
    spec = {
        "$schema": alt.SCHEMA_URL, "concat": views, "columns": 2 if len(views) == 4 else min(3, len(views)),
        "datasets": datasets, "params": panels[0].spec["params"], "config": _config(), "background": "white",
        "spacing": 30,
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
    frames: dict[str, pd.DataFrame]  # data of the panel in progress, by name

    def chart(
        self, name: str, title: str, caption: str, panels: Sequence[Panel], methods: Iterable[str], reset: bool = False
    ) -> Chart:
        """A chart whose legend names the methods in the order of the colours."""
        used = set(methods)
        return Chart(name, title, caption, list(panels), [method for method in self.styles if method in used], reset)

    def base(self, data: pd.DataFrame) -> alt.Chart:
        """A chart of these rows, to be given a mark; the data is added to the specification once, by `panel`."""
        name = next((name for name, frame in self.frames.items() if frame is data), f"rows{len(self.frames)}")
        self.frames[name] = data
        return alt.Chart(alt.NamedData(name=name))

    def panel(
        self, title: str, layers: Sequence[alt.Chart], description: str, option: str = "", height: int = HEIGHT
    ) -> Panel:
        """The layers, made with `base`, as one panel; its parameter `isolated` is the method chosen in the legend."""
        specs = [layer.to_dict(validate=False) for layer in layers]
        for spec in specs:
            del spec["$schema"], spec["config"]
        rows = {
            name: json.loads(frame.to_json(orient="records", double_precision=6)) for name, frame in self.frames.items()
        }
        self.frames.clear()
        params = [{"name": "isolated", "value": ""}]
        spec = {"description": description, "layer": specs, "datasets": rows, "params": params}
        return Panel(title, spec, option, height)

    def rows(self, data: pd.DataFrame, **columns: Any) -> pd.DataFrame:
        """Rows with value, low and high, and what tooltips show; the columns that no chart reads are dropped."""
        data = data.assign(value=data["iqm"], curve="", strength=1.0, memory=MEMORY).assign(**columns)
        if set(CELL) <= set(data.columns):
            data = data.merge(self.commands, left_on=CELL, right_index=True, how="left")
            data = data.assign(trajectories=[_lengths(*lengths) for lengths in data[CELL[2:]].to_numpy()])
        data = _with_texts(data).reindex(columns=[*_DRAWN])
        return data.dropna(axis=1, how="all") if len(data) else data

    def colour(self) -> alt.Color:
        """One colour per method, the same in all charts."""
        shades = [f"var(--{style.colour})" for style in self.styles.values()]
        return alt.Color("method:N", title=None, scale=alt.Scale(domain=list(self.styles), range=shades))

    def lines(self, data: pd.DataFrame, x: alt.X, y: alt.Y, *, band: bool = False) -> list[alt.Chart]:
        """A line per method, memory and curve; bars or a band for the intervals; points with tooltips.

        Args:
            data: rows as `rows` returns them, with the column x.
            x, y: axes of the columns x and value.
            band: draw intervals as a band.
        """
        shapes = alt.Scale(domain=list(self.styles), range=[style.shape for style in self.styles.values()])
        dashes = alt.Scale(domain=[MEMORY, RESET], range=[[1, 0], [4, 3]])
        base = self.base(data).encode(x=x, color=self.colour(), detail=["curve:N", "memory:N"])
        marks = base.mark_area() if band else base.mark_rule(strokeWidth=6)
        ends = marks.encode(
            y=alt.Y("low:Q", title=y["title"], scale=y["scale"]), y2="high:Q", opacity=_opacity(0.15 if band else 0.3)
        )
        line = base.mark_line(strokeWidth=2, strokeJoin="round").encode(
            y=y, strokeDash=alt.StrokeDash("memory:N", title=None, scale=dashes), opacity=_opacity("strength")
        )
        points = base.mark_point(filled=True, size=50).encode(
            y=y, shape=alt.Shape("method:N", title=None, scale=shapes), opacity=_opacity("strength"),
            tooltip=_tooltips(data),
        )  # fmt: skip
        has_ends = "low" in data and data["low"].notna().any()
        return [ends.transform_filter("isValid(datum.low)"), line, points] if has_ends else [line, points]

    def dots(self, runs: pd.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
        """A small dot per training seed, for rows with the columns method, x, value and seed."""
        if runs.empty:
            return []
        data = runs.assign(shown=[number(value) for value in runs["value"]])
        data = data[["method", "x", "value", "shown", "seed"]]
        mark = self.base(data).mark_point(filled=True, size=10)
        return [mark.encode(x=x, y=y, color=self.colour(), opacity=_opacity(0.6), tooltip=_tooltips(data))]

    def rules(self, table: pd.DataFrame, results: pd.DataFrame, task: str, y: alt.Y) -> list[alt.Chart]:
        """A horizontal line per method without context, and two for the dataset."""
        data = self.rows(levels(table, task))
        returns = results.loc[(results["task"] == task) & (results["kind"] == "data"), "return"].dropna()
        if len(returns):
            ends = {"dataset, mean": returns.mean(), "dataset, best": returns.max()}
            shown = [number(value) for value in ends.values()]
            more = pd.DataFrame({"method": list(ends), "value": list(ends.values()), "shown": shown})
            data = pd.concat([data, more], ignore_index=True) if len(data) else more
        return self.rules_of(data, y)

    def rules_of(self, data: pd.DataFrame, y: alt.Y) -> list[alt.Chart]:
        """A horizontal line per row."""
        layers = []
        for dash, rows in data.groupby(data["method"].map(lambda name: self.styles[name].dash)):
            rows = rows.dropna(axis=1, how="all")
            mark = self.base(rows).mark_rule(strokeWidth=1.5, strokeDash=list(dash))
            layers.append(mark.encode(y=y, color=self.colour(), opacity=_opacity(0.9), tooltip=_tooltips(rows)))
        return layers


_TOOLTIPS = {
    "method": "method", "shown": "return", "interval": "95 % interval", "seeds": "training seeds", "seed": "seed",
    "trajectories": "trajectories", "episode": "episode", "memory": "memory", "starts": "starts", "step": "step",
    "fraction": "fraction of runs", "command": "command",
}  # fmt: skip
_DRAWN = ("x", "value", "low", "high", "curve", "strength", "label", *_TOOLTIPS)


def _tooltips(data: pd.DataFrame) -> list[alt.Tooltip]:
    shown = [name for name in _TOOLTIPS if name in data and data[name].notna().any()]
    return [alt.Tooltip(f"{name}:N", title=_TOOLTIPS[name]) for name in shown]


def _opacity(strength: float | str) -> Any:
    """A constant or a column as opacity; methods other than the isolated one are faint."""
    value = (
        alt.value(strength) if isinstance(strength, float) else alt.Opacity(f"{strength}:Q", scale=None, legend=None)
    )
    return alt.condition("isolated == '' || datum.method == isolated", value, alt.value(0.06))


def _with_texts(data: pd.DataFrame) -> pd.DataFrame:
    ends = zip(data["low"], data["high"], strict=True)
    text = [f"{number(low)} to {number(high)}" if pd.notna(low) else None for low, high in ends]
    return data.assign(interval=text, shown=[number(value) for value in data["value"]])


def _lengths(train: float, prompt: float, test: float) -> str | None:
    if not train:
        return None
    text = f"{train:.0f}" if train == test else f"trained on {train:.0f}, rolled out for {test:.0f}"
    return f"{text}, prompt of {prompt:.0f}" if prompt else text


def _commands(commands: pd.Series) -> str | None:
    found = sorted(set(commands.dropna()))
    return None if not found else found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} more)"


def _value_axis(title: str = "return per episode") -> alt.Y:
    return alt.Y("value:Q", title=title, scale=alt.Scale(zero=True))


def _length_axis(lengths: Sequence[float], title: str) -> alt.X:
    """Lengths on a logarithmic axis, or on one that also has a zero."""
    values = sorted({float(length) for length in lengths})
    if values[0] > 0:
        scale = alt.Scale(type="log", base=2, domain=[values[0] / 1.25, values[-1] * 1.25], nice=False)
    else:
        scale = alt.Scale(type="symlog", constant=1, domain=[0, values[-1] * 1.25], nice=False)
    return alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(values=values, format="d", labelOverlap=True))


def _amount_axis(amounts: Sequence[float], title: str) -> alt.X:
    """Amounts with SI prefixes, logarithmic if they span a large ratio."""
    low, high = min(amounts), max(amounts)
    axis = alt.Axis(format="~s", tickCount=4, labelOverlap=True)
    if low > 0 and high / low >= _LOG_RATIO:
        scale = alt.Scale(type="log", domain=[low / 1.3, high * 1.3], nice=False)
        return alt.X("x:Q", title=f"{title} (logarithmic)", scale=scale, axis=axis)
    return alt.X("x:Q", title=title, scale=alt.Scale(zero=True, domain=[0, 1.1 * high or 1], nice=False), axis=axis)


def _one_seed(data: pd.DataFrame) -> str:
    return " A point without a bar has one training seed, so it has no interval." if (data["seeds"] == 1).any() else ""


def _context_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Return against context length: a panel per task, and normalised scores over all tasks."""
    points, panels, y = table[table["length"].notna()], [], _value_axis()
    runs = run_scores(results)
    common = normalised_scores(results, table)
    if len(common):
        x = _length_axis(common["length"], "trajectories per context")
        data = draw.rows(common, x=common["length"])
        layers = draw.lines(data, x, _value_axis("normalised score"))
        panels.append(draw.panel("All tasks, normalised score", layers, "Normalised score by context length."))
    for task, rows in points.groupby("task"):
        by_test = (rows["curve"] != "").any()
        x = _length_axis(rows["length"], "episodes per context" if by_test else "trajectories per context")
        control = rows[rows["control"].notna() & (rows["test_trajectories"] > 1)]
        control = control.assign(iqm=control["control"], low=np.nan, high=np.nan)
        data = [draw.rows(rows, x=rows["length"]), draw.rows(control, x=control["length"], memory=RESET, strength=0.8)]
        seeds = runs[runs["memory"]].merge(rows[rows["seeds"] > 1][[*CELL, "length"]], on=CELL)
        seeds = seeds.rename(columns={"length": "x", "mean": "value"})
        layers = [
            *draw.rules(table, results, str(task), y), *draw.lines(pd.concat(data, ignore_index=True), x, y),
            *draw.dots(seeds, x, y), *_curve_labels(draw, rows, x, y),
        ]  # fmt: skip
        panels.append(draw.panel(str(task), layers, f"Return on {task} by context length; see the table of returns."))
    caption = (
        "Each point is the interquartile mean over training seeds of the mean return of all episodes. Bars are 95 % "
        f"intervals (stratified bootstrap over seeds), small dots are single seeds.{_one_seed(points)}"
    )
    if (table["kind"] != "context").any():
        caption += " Horizontal lines need no context."
    if ((points["family"] == "at") & (points["train_trajectories"] == 1)).any():
        caption += " With one trajectory per context, the Agentic Transformer is a Decision Transformer."
    has_reset = bool(points.loc[points["test_trajectories"] > 1, "control"].notna().any())
    methods = [*points["method"], *_level_names(table)]
    return draw.chart("return_by_context", "Return against context length", caption, panels, methods, has_reset)


def _level_names(table: pd.DataFrame) -> list[str]:
    data = ["dataset, mean", "dataset, best"] if (table["kind"] == "data").any() else []
    return [*table.loc[table["kind"] == "reference", "method"], *data]


def _curve_labels(draw: Drawing, rows: pd.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The training length at the end of each curve over rollout lengths."""
    ends = rows[rows["curve"] != ""].sort_values("length").groupby(["method", "curve"]).tail(1)
    data = draw.rows(ends, x=ends["length"], label=ends["curve"])
    text = draw.base(data).mark_text(align="right", dy=-10).encode(x=x, y=y, text="label:N", opacity=_opacity(1.0))
    return [text] if len(ends) else []


def _cost_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Return against training cost; a selector chooses tokens, FLOPs or time."""
    panels, captions, methods = [], [], []
    policies = table[table["length"].notna() | (table["kind"] == "reference")]
    for option, column in (("tokens", "tokens"), ("FLOPs", "flops"), ("time", "seconds")):
        runs = results.groupby(RUN, as_index=False)[column].first().dropna()
        means = runs.groupby(CELL, as_index=False).agg(x=(column, "mean"), known=("seed", "nunique"))
        rows = policies.merge(means, on=CELL)
        rows = rows[(rows["known"] == rows["seeds"]) & (rows["x"] > 0)]
        for task, cells in rows.groupby("task"):
            if len(cells) < 2 or not (cells["kind"] == "context").any():
                continue
            unit, axis = _unit(cells["x"].max()) if option == "time" else (1.0, _MEASURES[option][0])
            data = draw.rows(cells, x=cells["x"] / unit)
            data = data.assign(label=_labels(data["x"], data["value"], data.get("trajectories", data["method"])))
            x = _amount_axis(list(data["x"]), axis)
            y = _value_axis()
            labels = draw.base(data).mark_text(align="left", dx=7, dy=-7).encode(
                x=x, y=y, text="label:N", opacity=_opacity(1.0)
            )  # fmt: skip
            layers = [*draw.lines(data, x, y), labels.transform_filter("isValid(datum.label)")]
            panels.append(draw.panel(str(task), layers, f"Return on {task} by training {option}.", option))
            captions.append(_MEASURES[option][1])
            methods += list(cells["method"])
    caption = (
        "The points of the first chart against the training cost of each policy (mean over seeds). A number next to a "
        f"point is its trajectories per context. {' '.join(dict.fromkeys(captions))}"
    )
    return draw.chart("return_by_cost", "Return against training cost", caption, panels, methods)


def _labels(x: pd.Series, y: pd.Series, labels: pd.Series) -> list[str | None]:
    """The labels of points, without those that would cover another one."""
    places = np.stack([np.log(x) / (np.ptp(np.log(x)) or 1.0), y / (y.max() or 1.0)], axis=1)
    kept: list[int] = []
    for index in np.argsort(-y.to_numpy()):
        gaps = np.abs(places[kept] - places[index])
        if pd.notna(labels.iloc[index]) and not (gaps < [0.12, 0.08]).all(axis=1).any():
            kept.append(int(index))
    return [labels.iloc[index] if index in kept else None for index in range(len(labels))]


def _unit(seconds: float) -> tuple[float, str]:
    return next((size, name) for least, size, name in _UNITS if seconds >= least)


_UNITS = ((7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def _episode_chart(draw: Drawing, results: pd.DataFrame) -> Chart:
    """Return of each episode of a rollout, with and without memory."""
    table, panels = episode_returns(results), []
    table = table[table["test_trajectories"] > 1]
    for task, rows in table.groupby("task"):
        kept = _CURVES if rows["method"].nunique() == 1 else 1
        cells = rows[rows["memory"]].drop_duplicates(CELL).sort_values(["test_trajectories", "train_trajectories"])
        cells = cells.groupby("method").tail(kept)
        cells = cells.assign(rank=cells.groupby("method").cumcount(ascending=False))
        rows = rows.merge(cells[[*CELL, "rank"]], on=CELL)
        rows = rows[rows["memory"] | (rows["rank"] == 0)]
        newest = rows["rank"] == 0
        memory = rows["memory"].map({True: MEMORY, False: RESET})
        curve = rows["train_trajectories"].astype(str) + "/" + rows["test_trajectories"].astype(str)
        bars = newest & rows["memory"]
        data = draw.rows(
            rows.assign(low=rows["low"].where(bars), high=rows["high"].where(bars)), x=rows["episode"], curve=curve,
            memory=memory, strength=np.where(newest, 1.0, 0.45),
        )  # fmt: skip
        longest = int(rows["episode"].max())
        x = alt.X("x:Q", title="episode in the context", scale=alt.Scale(domain=[0.8, longest + 0.2], nice=False),
                  axis=alt.Axis(values=_ticks(longest), format="d"))  # fmt: skip
        layers = draw.lines(data, x, _value_axis(), band=longest > _POINTS_TO_MARK)
        panels.append(draw.panel(str(task), layers, f"Return on {task} of each episode in a context, first to last."))
    caption = (
        "The same policy plays n episodes in a row and keeps them in its context. The dashed line is the same policy "
        "from the same starts with its memory reset before each episode. Episodes at different places have different "
        "starts, so compare the solid line with the dashed one: a policy that learns in context rises above it from "
        "left to right. Faint lines are shorter contexts."
    )
    return draw.chart("return_by_episode", "Return by episode in the context", caption, panels, table["method"],
                      not table["memory"].all())  # fmt: skip


def _ticks(longest: int) -> list[int]:
    step = max(1, -(-longest // 8))
    return sorted({1, *range(step, longest + 1, step)}) if step > 1 else list(range(1, longest + 1))


def _prompt_chart(draw: Drawing, results: pd.DataFrame) -> Chart:
    """Return after prompts of different lengths."""
    runs, panels = prompt_returns(results), []
    table = intervals(runs, CELL)
    for task, rows in table.groupby("task"):
        x, y = _length_axis(rows["prompt_trajectories"], "dataset trajectories before the episode"), _value_axis()
        curve = rows["train_trajectories"].astype(str) + "/" + rows["test_trajectories"].astype(str)
        longest = rows.groupby("method")["train_trajectories"].transform("max") == rows["train_trajectories"]
        data = draw.rows(rows, x=rows["prompt_trajectories"], curve=curve, strength=np.where(longest, 1.0, 0.5))
        seeds = runs[runs["task"] == task].assign(x=runs["prompt_trajectories"])
        seeds = seeds[seeds.groupby(CELL)["seed"].transform("nunique") > 1]
        layers = [*draw.lines(data, x, y), *draw.dots(seeds, x, y)]
        panels.append(draw.panel(str(task), layers, f"Return on {task} by prompt length."))
    caption = (
        "The same policies from the same starts, with more or fewer trajectories of the dataset in the context before "
        f"the first episode. Faint lines are policies trained on shorter contexts.{_one_seed(table)}"
    )
    return draw.chart("return_by_prompt", "Return against prompt length", caption, panels, table["method"])


def _last_chart(draw: Drawing, results: pd.DataFrame) -> Chart:
    """Return of last episodes from equal starts."""
    table, panels = last_episodes(results), []
    for task, rows in table.groupby("task"):
        context = rows[rows["kind"] == "context"]
        x, y = _length_axis(context["test_trajectories"], "n, trajectories per context"), _value_axis()
        data = draw.rows(
            context, x=context["test_trajectories"], memory=[MEMORY if kept else RESET for kept in context["memory"]]
        )
        data.loc[data["memory"] == RESET, ["low", "high"]] = np.nan
        layers = [*draw.rules_of(draw.rows(rows[rows["kind"] != "context"]), y), *draw.lines(data, x, y)]
        panels.append(draw.panel(str(task), layers, f"Return on {task} of last episodes from equal starts."))
    caption = (
        "Last episodes of contexts of n trajectories, from the starts of the last episodes of the longest contexts. "
        "Methods without context play single episodes from these starts. Every point of a task has the same starts."
    )
    return draw.chart("last_episodes", "Last episodes from equal starts", caption, panels, table["method"],
                      not table["memory"].astype(bool).all())  # fmt: skip


def _profile_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Performance profiles: the fraction of training runs above each return."""
    known, runs, panels = contenders(table), run_scores(results), []
    tasks = sorted({task for side in known for task in side["cells"]})
    if not any(side["kind"] == "context" for side in known):
        tasks = []
    groups = [(task, [task], False) for task in tasks]
    if len(tasks) > 1 and all(score_or_none(task, 0.0) is not None for task in tasks):
        groups.insert(0, ("All tasks, normalised score", tasks, True))
    for title, of, is_score in groups:
        sides = [side for side in known if all(task in side["cells"] for task in of)]
        if not sides:
            continue
        parts, drawn = [], [strata([scores_of(runs, side["cells"][task]) for task in of]) for side in sides]
        if is_score:
            drawn = [(list(map(_normalised, of, scores)), together) for scores, together in drawn]
        every = np.concatenate([part for scores, _ in drawn for part in scores])
        margin = 0.04 * (np.ptp(every) or 1.0)
        thresholds = np.linspace(every.min() - margin, every.max() + margin, _THRESHOLDS)
        for side, (scores, together) in zip(sides, drawn, strict=True):
            generator = np.random.default_rng(BOOTSTRAP_SEED)
            found = performance_profile(scores, thresholds, generator=generator, together=together, resamples=RESAMPLES)
            parts.append(pd.DataFrame({
                "x": thresholds, "value": found.fractions, "low": found.low, "high": found.high, "seeds": found.runs,
                "method": side["method"], "curve": side["name"], "strength": 1.0 if side["longest"] else 0.4,
            }))  # fmt: skip
        panels.append(_profile_panel(draw, title, pd.concat(parts, ignore_index=True), is_score))
    caption = (
        "The fraction of training runs that return more than the value on the axis. A method whose line is above "
        "another line everywhere is better by every measure. Strong lines are the longest context, faint lines the "
        "shortest. Bands are pointwise 95 % intervals (stratified bootstrap over seeds)."
    )
    return draw.chart(
        "performance_profiles", "Performance profiles", caption, panels, [side["method"] for side in known]
    )


def _normalised(task: str, scores: np.ndarray) -> np.ndarray:
    return np.array([score_or_none(task, score) for score in scores], np.float64)


def _profile_panel(draw: Drawing, title: str, data: pd.DataFrame, is_score: bool) -> Panel:
    shown, fraction = [number(x) for x in data["x"]], [f"{value:.2f}" for value in data["value"]]
    data, unit = data.round(4).assign(shown=shown, fraction=fraction), "return per episode"
    x = alt.X("x:Q", title="normalised score" if is_score else unit, scale=alt.Scale(nice=False, zero=False))
    y = alt.Y("value:Q", title="fraction of runs above", scale=alt.Scale(domain=[0, 1]))
    base = draw.base(data).encode(x=x, color=draw.colour(), detail="curve:N")
    band = base.mark_area(interpolate="step-after").transform_filter("isValid(datum.low) && datum.strength == 1")
    line = base.mark_line(interpolate="step-after", strokeWidth=2).encode(y=y, opacity=_opacity("strength"))
    hover = base.mark_point(filled=True, size=60, opacity=0).encode(y=y, tooltip=_tooltips(data))
    layers = [band.encode(y=alt.Y("low:Q", title=y["title"]), y2="high:Q", opacity=_opacity(0.12)), line, hover]
    return draw.panel(title, layers, f"{title}: fraction of training runs above each value.")


def _loss_chart(draw: Drawing, losses: pd.DataFrame) -> Chart:
    """Training loss by step, a line per run."""
    panels = []
    for task, rows in losses.groupby("task"):
        rank = rows.groupby("method")["train_trajectories"].rank(method="dense", pct=True)
        data = rows.assign(
            x=rows["step"], value=rows["loss"], curve=rows["run"], strength=0.25 + 0.6 * rank,
            shown=[f"{loss:.4g}" for loss in rows["loss"]],
            trajectories=rows["train_trajectories"].replace(0, None), step=rows["step"].round().astype(int),
        )  # fmt: skip
        data = data[["x", "value", "curve", "strength", "method", "shown", "trajectories", "seed", "step"]]
        is_log = data["value"].min() > 0 and data["value"].max() > 20 * data["value"].min()
        scale = alt.Scale(type="log") if is_log else alt.Scale(zero=True)
        y = alt.Y("value:Q", title="loss (logarithmic)" if is_log else "loss", scale=scale)
        x = alt.X("x:Q", title="optimiser step", axis=alt.Axis(format="~s", tickCount=5))
        base = draw.base(data).encode(x=x, y=y, color=draw.colour(), detail="curve:N")
        tooltips = [*_tooltips(data.drop(columns="shown")), alt.Tooltip("shown:N", title="loss")]
        layers = [
            base.mark_line(strokeWidth=1.5).encode(opacity=_opacity("strength")),
            base.mark_point(filled=True, size=50, opacity=0).encode(tooltip=tooltips),
        ]
        panels.append(draw.panel(str(task), layers, f"Training loss on {task} by step."))
    caption = (
        "Training loss against the optimiser step, one line per run. Each point is a mean over consecutive steps. The "
        "longer the context, the stronger the line. Losses of different methods are not comparable, so compare "
        "lines of one colour."
    )
    if lost := int(losses.drop_duplicates("run")["not_finite"].sum()):
        caption += (
            f" {lost} step{'s' if lost > 1 else ''} without a finite loss {'are' if lost > 1 else 'is'} left out."
        )
    return draw.chart("learning_curves", "Learning curves", caption, panels, losses["method"])
