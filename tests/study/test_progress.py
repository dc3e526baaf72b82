"""Progress of an ablation without a terminal."""

import io

import pytest
from rich.console import Console

from ringrl.study.progress import AblationProgress


def test_a_line_is_printed_while_a_cell_runs() -> None:
    text = io.StringIO()
    with AblationProgress({"walker_walk/bc_seed0": 30.0}, 1, Console(file=text)) as progress:
        progress.begin("walker_walk/bc_seed0")
        progress.still_running()
    assert "0 finished, 1 running, 0 failed, 0 waiting, 0:00:30 left: walker_walk/bc_seed0" in text.getvalue()


def test_the_time_left_follows_the_speed_of_the_finished_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("ringrl.study.progress.time.perf_counter", lambda: now[0])
    progress = AblationProgress({"random": 0.0, "a": 5.0, "b": 20.0, "c": 30.0}, 1, Console(file=io.StringIO()))
    for name, seconds in (("random", 1.0), ("a", 10.0)):
        progress.begin(name)
        assert progress.seconds_left == 55
        now[0] += seconds
        progress.end(name, None)
    assert progress.seconds_left == 2 * 50, "a took twice its estimate, and random has none"
    progress.begin("c")
    now[0] += 50
    assert progress.seconds_left == 2 * 50 - 50
