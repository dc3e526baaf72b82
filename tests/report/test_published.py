"""The published means are those of the published records."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_the_results_are_those_of_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/results_tables.md").read_text(), re.DOTALL)
    exec(code, names := dict[str, Any]())
    rows, lines = (
        names["rows"].query("method == 'Agentic Transformer, window of 20'"),
        Path("docs/results.md").read_text(),
    )
    for title, chosen in {
        "context of four: first episode": "train_trajectories == 4 and memory and episode == 1",
        "context of four: last episode": "train_trajectories == 4 and memory and episode == 4",
        "context of four: last episode, memory cleared": "train_trajectories == 4 and not memory and episode == 4",
        "context of one, starts of the first episodes": "train_trajectories == 1 and episode == 1",
        "context of one, starts of the last episodes": "train_trajectories == 1 and episode == 4",
    }.items():
        means = rows.query(chosen).groupby("task")["return"].mean()
        assert f"| {title} | {means['walker_walk']:.0f} | {means['walker_stand']:.0f} |\n" in lines
