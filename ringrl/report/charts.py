"""The charts of a report."""

from collections.abc import Iterable
from functools import partial

import altair as alt
import numpy as np
import pandas as pd
from altair.utils.schemapi import debug_mode

from ringrl.evaluation.formatting import number
from ringrl.report.drawing import HELD_OUT, STRENGTH, TRAINING, Chart, Drawing, Panel, styles
from ringrl.report.results import CELL, LENGTH_SETTINGS
from ringrl.report.tables import (
    episode_returns,
    intervals,
    levels,
    normalised_scores,
    prompt_returns,
    recorded_runs,
    run_scores,
)

_CURVES = 4  # context lengths of one method in the chart of episodes
ZOOMED = "(zoomed: the axis does not start at zero)"


def all_charts(results: pd.DataFrame, table: pd.DataFrame, losses: pd.DataFrame, held_out: pd.DataFrame) -> list[Chart]:
    """Return the charts that the results are sufficient for, in the order of the page."""
    draw = Drawing(styles(table))
    # Validating hundreds of marks would take most of the time.
    with debug_mode(False), alt.data_transformers.disable_max_rows():
        charts = [
            _context_chart(draw, results, table), _episode_chart(draw, results, table),
            _prompt_chart(draw, results, table), _map_chart(draw, results, table), _loss_chart(draw, losses),
            _held_out_chart(draw, held_out),
        ]  # fmt: skip
    # With one length, the chart of episodes shows more than curves of one point.
    is_flat = table.groupby(["task", "method", "curve"])["length"].nunique().max() == 1
    return [chart for chart in charts[int(is_flat and bool(charts[1].panels)) :] if chart.panels]


def _length_axis(title: str, lengths: pd.Series) -> alt.X:
    """Return a logarithmic axis for lengths, extended to zero if a length is zero. Its ticks are the lengths."""
    values = sorted({float(length) for length in lengths})
    if values[0] > 0:
        scale = alt.Scale(type="log", base=2, domain=[values[0] / 1.25, values[-1] * 1.25], nice=False)
    else:
        scale = alt.Scale(type="symlog", constant=1, domain=[0, values[-1] * 1.25], nice=False)
    title = title if len(values) == 1 else f"{title} (logarithmic)"
    return alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(values=values, format="d", labelOverlap=True))


def _episode_axis(episodes: pd.Series) -> alt.X:
    scale = alt.Scale(domain=[0.8, episodes.max() + 0.2], nice=False)
    ticks = list(range(1, int(episodes.max()) + 1, 1 + int(episodes.max()) // 12))
    return alt.X("x:Q", title="episode in the context", scale=scale, axis=alt.Axis(format="d", values=ticks))


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
        has_curves = (rows["curve"].fillna("") != "").any()  # of each training length
        rank = rows.groupby("method")["train_trajectories"].rank(method="dense", pct=True).fillna(1.0)
        rows = rows.assign(x=rows["length"], memory=True, strength=0.2 + 0.8 * rank if has_curves else 1.0)
        control = rows[rows["x"].notna() & rows["control"].notna() & (rows["test_trajectories"] > 1)]
        control = control.assign(iqm=control["control"], memory=False, strength=0.8, low=np.nan, high=np.nan)
        axis = partial(_length_axis, f"{'episodes' if has_curves else 'trajectories'} per context")
        panels += draw.curves(pd.concat([rows, control]), axis, runs=runs)
    caption = (
        "Each point is the interquartile mean over training seeds of the mean return of all episodes. Bars are 95 % "
        f"intervals (stratified bootstrap over seeds), small dots are single seeds.{_one_seed(points)}"
    )
    if (points["curve"] != "").any():
        caption += " The longer the training context, the stronger the line."
    if (table["kind"] != "context").any():
        caption += " Horizontal lines need no context."
    return draw.chart("return_by_context", "Return against context length", caption, panels)


def _episode_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Return of each episode of a rollout, with and without memory."""
    returns = episode_returns(results).astype({"memory": bool})
    returns = returns[returns["test_trajectories"] > 1]
    cells = returns[returns["memory"]].drop_duplicates(CELL).sort_values(["test_trajectories", "train_trajectories"])
    cells = cells.assign(rank=cells.groupby(["task", "method"]).cumcount(ascending=False))
    rows = returns.merge(cells[[*CELL, "rank"]], on=CELL)
    shown = rows.groupby("task")["method"].transform("nunique").map(lambda methods: _CURVES if methods == 1 else 1)
    longest = rows["rank"] == 0
    rows = rows.assign(
        x=rows["episode"], strength=np.where(longest, 1.0, 0.45), curve=_curve(rows),
        low=rows["low"].where(longest & rows["memory"]), high=rows["high"].where(longest & rows["memory"]),
    )[(rows["rank"] < shown) & (rows["memory"] | longest)]  # fmt: skip
    rows = pd.concat([rows, *_without_context(table, rows["task"].unique())])
    panels = draw.curves(rows, _episode_axis)
    caption = (
        "The same policy plays n episodes in a row and keeps them in its context. The dashed line is the same policy "
        "from the same starts with its memory reset before each episode. Episodes at different places have different "
        "starts, so compare the solid line with the dashed line. If a policy learns in context, the solid line rises "
        "above the dashed line from left to right. Faint lines are shorter contexts. Horizontal lines need no context."
    )
    return draw.chart("return_by_episode", "Return by episode in the context", caption, panels)


def _without_context(table: pd.DataFrame, tasks: Iterable[str]) -> list[pd.DataFrame]:
    """Return the rows of horizontal lines: the data and the methods without context."""
    found = [table[(table["task"] == task) & (table["kind"] == "data")] for task in tasks]
    found += [levels(table, task) for task in tasks]
    return [rows.assign(memory=True, strength=1.0, curve="", x=np.nan) for rows in found]


def _curve(rows: pd.DataFrame) -> pd.Series:
    return rows["train_trajectories"].astype(str) + "/" + rows["test_trajectories"].astype(str)


def _prompt_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Return after prompts of different lengths."""
    runs = prompt_returns(results)
    rows, runs = intervals(runs, CELL), runs.assign(x=runs["prompt_trajectories"])
    runs = runs[runs.groupby(CELL)["seed"].transform("nunique") > 1]
    longest = rows.groupby(["task", "method"])["train_trajectories"].transform("max") == rows["train_trajectories"]
    strength = np.where(longest, 1.0, 0.5)
    rows = rows.assign(x=rows["prompt_trajectories"], curve=_curve(rows), memory=True, strength=strength)
    caption = (
        "The same policies from the same starts, with more or fewer trajectories of the dataset in the context before "
        "the first episode. Faint lines are policies trained on shorter contexts. Horizontal lines need no context."
        f"{_one_seed(rows)}"
    )
    rows = pd.concat([rows, *_without_context(table, rows["task"].unique())])
    panels = draw.curves(rows, partial(_length_axis, "dataset trajectories before the episode"), runs=runs)
    return draw.chart("return_by_prompt", "Return against prompt length", caption, panels)


def _loss_chart(draw: Drawing, losses: pd.DataFrame) -> Chart:
    """Training and held-out loss by step, one line of each per run."""
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
            memory=rows["held_out"].map({False: TRAINING, True: HELD_OUT}),
        )  # fmt: skip
        panels += draw.curves(rows, lambda _: x, y=y, points=False)
    caption = (
        "Training loss against the optimiser step, one line per run. Each point is a mean over consecutive steps. The "
        "longer the context, the stronger the line. Losses of different methods are not comparable, so compare only "
        "lines of one colour."
    )
    if losses["held_out"].any():
        caption += " Dashed lines are the loss on episodes that training never sees."
    if lost := int(losses.drop_duplicates("run")["not_finite"].sum()):
        caption += f" Steps without a finite loss are left out ({lost})."
    return draw.chart("learning_curves", "Learning curves", caption, panels)


def _held_out_chart(draw: Drawing, points: pd.DataFrame) -> Chart:
    """Return against held-out loss, a dot per run."""
    panels, y = [], alt.Y("value:Q", title="return per episode", scale=alt.Scale(zero=True))
    for task, rows in points.groupby("task"):
        x = alt.X("x:Q", title=f"held-out loss {ZOOMED}", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
        rows = rows.assign(
            x=rows["loss"], loss=[f"{loss:.4g}" for loss in rows["loss"]],
            trajectories=[f"{length:.0f}" if length else None for length in rows["train_trajectories"]],
        )  # fmt: skip
        panels.append(draw.panel(str(task), [draw.dots(rows, x, y, 40)], f"{task}: return against held-out loss."))
    caption = (
        "One dot per training run: the return per episode of the evaluated policy, against its loss on episodes that "
        "training never sees. Losses of different action heads are in different panels."
    )
    return draw.chart("return_by_loss", "Return against held-out loss", caption, panels)


def _map_chart(draw: Drawing, results: pd.DataFrame, table: pd.DataFrame) -> Chart:
    """Mean return for each pair of values, where the runs of one method differ in two settings.

    The context length is the second setting if only one other varies. Otherwise each length has a panel.
    """
    panels, length = [], "context.trajectories"
    for (task, _), runs in recorded_runs(results, table).groupby(["task", "family"]):
        known = pd.DataFrame(runs["settings"].tolist()).drop(columns=[*LENGTH_SETTINGS]).fillna("")
        known = known.assign(**{length: runs["train_trajectories"].astype(str).tolist()})
        varied = [name for name in known if known[name].nunique() > 1]
        by = [name for name in varied if len(varied) != 3 or name != length]
        known = known.assign(value=runs["mean"].tolist(), seed=runs["seed"].tolist())
        if len(by) != 2 or known.duplicated([*by, length, "seed"]).any():  # the same settings, evaluated in two ways
            continue
        for trained, rows in known.groupby(length) if length not in by else [("", known)]:
            title = f"{task}, contexts of {trained}" if length in varied and trained else str(task)
            panels.append(_map_panel(draw, title, rows, by))
    caption = (
        "The mean return over training seeds, where the runs of a method differ in two settings. Darker tiles "
        "have higher returns in their panel."
    )
    return draw.chart("return_by_settings", "Return by two settings", caption, panels)


def _map_panel(draw: Drawing, title: str, rows: pd.DataFrame, by: list[str]) -> Panel:
    seeds = [f"{seed}: {number(value)}" for seed, value in zip(rows["seed"], rows["value"], strict=True)]
    data = rows.assign(seeds=seeds).groupby(by, as_index=False).agg({"value": "mean", "seeds": ", ".join})
    data.columns = pd.Index(["x", "y", "value", "seeds"])  # names with a dot are paths in Vega
    for axis in "xy":  # [20], a value for all layers
        data[axis] = data[axis].str.strip("[]").replace({"": "none", "None": "none"})
    strength = 0.1 + 0.5 * (data["value"] - data["value"].min()) / (np.ptp(data["value"]) or 1.0)
    data = data.assign(strength=strength, shown=[number(value) for value in data["value"]])
    orders = [sorted(set(data[axis]), key=lambda value: (len(value), value)) for axis in "xy"]  # 2 before 16
    x, y = (
        alt.X("x:N", title=by[0], sort=orders[0], axis=alt.Axis(labelAngle=0, labelLimit=270 // len(orders[0]))),
        alt.Y("y:N", title=by[1], sort=orders[1]),
    )
    named = {"x": by[0], "y": by[1], "shown": "mean return", "seeds": "seeds"}
    tooltip = [alt.Tooltip(f"{name}:N", title=text) for name, text in named.items()]
    base = alt.Chart(data).encode(x=x, y=y, tooltip=tooltip)
    tiles = base.mark_rect(color="var(--muted)").encode(opacity=STRENGTH)
    layers = [tiles, base.mark_text(color="var(--ink)", fontSize=13).encode(text="shown:N")]
    return draw.panel(title, layers, f"{title}: return by {by[0]} and {by[1]}.", height=60 + 50 * len(orders[1]))
