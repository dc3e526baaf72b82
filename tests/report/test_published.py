"""The published numbers of contexts of four are those of the published records."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ringrl.report import read_results
from ringrl.report.conclusion import LENGTH, MEMORY, verdicts
from ringrl.report.tables import returns_table

ROOT = Path(__file__).parents[2]
METHOD = "Agentic Transformer, window of 20"
TASKS = ["walker_walk", "walker_stand"]


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """Return the names that the code of the page of tables defines."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/results_tables.md").read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        exec(code, names := dict[str, Any]())
    return names


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs/results.md").read_text()


def test_returns_and_differences(published: dict[str, Any], page: str) -> None:
    table = returns_table(published["results"])
    compared = verdicts(published["results"], table)
    table = table.set_index(["task", "method", "train_trajectories"]).sort_index()
    four, one = ([table.loc[task, METHOD, n] for task in TASKS] for n in (4, 1))
    rows = {
        "context of four, all four episodes": map(_interval, four),
        "the same, memory cleared before each episode": (f"{row['control']:.0f}" for row in four),
        "context of one": map(_interval, one),
        "TD3+BC": (_interval(table.loc[task, "TD3+BC"].iloc[0]) for task in TASKS),
        "behaviour cloning, bins": (_interval(table.loc[task, "Behaviour cloning, bins"].iloc[0]) for task in TASKS),
    }
    chosen = {
        LENGTH: compared["subject"] == LENGTH,
        MEMORY: compared["subject"] == MEMORY,
        "TD3+BC": compared["compared"].str.startswith("TD3+BC"),
    }
    found = {
        name: [compared[rows & (compared["task"] == task)].iloc[0] for task in TASKS] for name, rows in chosen.items()
    }
    for subject, title in ((LENGTH, "four episodes - one"), ("TD3+BC", "four episodes - TD3+BC")):
        resolvable = ", ".join(f"{row['detectable']:.0f}" for row in found[subject])
        rows[f"{title} (resolvable: {resolvable})"] = map(_difference, found[subject])
    rows["memory kept - cleared"] = map(_difference, found[MEMORY])
    for title, (walk, stand) in rows.items():
        assert f"| {title} | {walk} | {stand} |\n" in page


def _interval(row: pd.Series) -> str:
    return f"{row['iqm']:.0f} [{row['low']:.0f}, {row['high']:.0f}]"


def _difference(row: pd.Series) -> str:
    p = "p < 0.001" if row["p_holm"] < 0.001 else f"p {row['p_holm']:.3f}"
    return f"{row['change']:+.0f} [{row['low']:+.0f}, {row['high']:+.0f}], {p}, {row['verdict']}"


def test_episodes(published: dict[str, Any], page: str) -> None:
    episodes, best = published["by_episode"], published["best_of_four"]
    rows = {
        "context of four: first episode": [episodes.loc[task, METHOD, 4, True, 1] for task in TASKS],
        "context of four: last episode": [episodes.loc[task, METHOD, 4, True, 4] for task in TASKS],
        "context of four: last episode, memory cleared": [episodes.loc[task, METHOD, 4, False, 4] for task in TASKS],
        "context of one, starts of the first episodes": [episodes.loc[task, METHOD, 1, True, 1] for task in TASKS],
        "context of one, starts of the last episodes": [episodes.loc[task, METHOD, 1, True, 4] for task in TASKS],
        "context of four: best of four episodes": [best.loc[task, METHOD, 4, True] for task in TASKS],
        "context of one: best of four episodes": [best.loc[task, METHOD, 1, True] for task in TASKS],
    }
    for title, (walk, stand) in rows.items():
        assert f"| {title} | {walk.mean():.0f} | {stand.mean():.0f} |\n" in page
    _, last, cleared, _, of_one, *_ = rows.values()
    assert all((kept > reset).all() for kept, reset in zip(last, cleared, strict=True))
    assert [(four > one).sum() for four, one in zip(last, of_one, strict=True)] == [5, 6]
    pairs = zip(*(rows[f"context of {n}: best of four episodes"] for n in ("four", "one")), strict=True)
    assert [(four < one).sum() for four, one in pairs] == [9, 9]


def test_the_cheetah_needs_a_prompt(page: str) -> None:
    results = read_results(ROOT / "docs/results/equal_cheetah.jsonl.gz")
    table = returns_table(results)
    compared = verdicts(results, table)
    compared = compared[(compared["method"] == METHOD) & (compared["subject"] != MEMORY)]
    assert sorted(compared["verdict"]) == ["lower", "lower"]
    (p,) = set(compared["p_holm"].round(3))
    places = ["method", "train_trajectories", "prompt_trajectories"]
    rows = table.dropna(subset=["low"]).fillna(dict.fromkeys(places[1:], 0)).set_index(places)
    four, one, prompted = ((METHOD, 4, 0), (METHOD, 1, 0), ("Agentic Transformer", 4, 3))
    found = {name: _interval(rows.loc[cell]) for name, cell in
             {"four": four, "one": one, "td3": ("TD3+BC", 0, 0), "prompted": prompted}.items()}  # fmt: skip
    text = " ".join(page.split())
    assert f"From an empty memory they return {found['four']}, and at most 5 in three seeds." in text
    assert f"Contexts of one return {found['one']}, TD3+BC {found['td3']} (both p {p}, higher)." in text
    assert f"the policies of four return {found['prompted']}." in text
    seeds = results[results["memory"]].groupby(["method", "train_trajectories", "prompt_trajectories", "seed"])[
        "return"
    ]
    means = seeds.mean().unstack().round()
    assert (means.loc[four] <= 5).sum() == 3
    tables = (ROOT / "docs/results_tables.md").read_text()
    title = "the same, single episodes after three episodes of the data"
    for name, cell in {
        "context of four": four,
        "context of one": one,
        title: prompted,
        "TD3+BC": ("TD3+BC", 0, 0),
    }.items():
        assert f"{name} | {' | '.join(f'{x:.0f}' for x in means.loc[cell])} | " in tables


def test_the_arm_that_knows_its_place(page: str) -> None:
    """After sixteen segments of top_left: mean over the seeds, lowest and highest seed."""
    found = []
    for name in ("known_place", "hidden_place"):
        rows = read_results(ROOT / f"docs/results/{name}.jsonl.gz")
        rows = rows[(rows["task"] == "jaco_reach_top_left") & rows["method"].str.startswith("Agentic Transformer")]
        rows = rows[(rows["prompt_trajectories"] == 16) & rows["prompt_control"].isna()]
        seeds = rows.groupby("seed")["return"].mean()
        assert len(seeds) == 5
        found.append(f"{seeds.mean():.0f} [{seeds.min():.0f}, {seeds.max():.0f}]")
    alone, of_four = found
    assert f"alone returns {alone} after sixteen segments, the model of four places {of_four}." in page


def test_what_a_step_sees(page: str) -> None:
    table = returns_table(read_results(ROOT / "docs/results/what_a_step_sees.jsonl.gz")).set_index(["task", "method"])
    tables = (ROOT / "docs/results_tables.md").read_text()
    windows = {"none": "its whole episode so far", "20": "the last 20 steps", "1": "the present step", "0": "nothing"}
    for actions in ("on", "off"):
        for window, seen in windows.items():
            method = f"Agentic Transformer, episode window {window}, past actions {actions}"
            shown = " | ".join(
                _interval(table.loc[task, method]) for task in ("cartpole_swingup", "cheetah_run", *TASKS)
            )
            assert f"| {actions} | {seen} | {shown} |\n" in tables
            if actions == "on":
                tasks = ("cheetah_run", "cartpole_swingup")[: 1 if window == "20" else 2]
                assert all(_interval(table.loc[task, method]) in page.replace("\n  ", " ") for task in tasks)


def test_every_walker_returns_more_with_past_actions() -> None:
    rows = read_results(ROOT / "docs/results/what_a_step_sees.jsonl.gz")
    rows = rows[rows["task"].isin(TASKS) & rows["method"].str.startswith("Agentic Transformer")]
    rows = rows.assign(
        window=rows["method"].str.extract(r"window (\w+)"), actions=rows["method"].str.extract(r"(\w+)$")
    )
    pairs = rows.groupby(["task", "window", "seed", "actions"])["return"].mean().unstack()
    assert len(pairs) == 40
    assert (pairs["on"] > pairs["off"]).all()
