"""Progress of an ablation without a terminal."""

import io
import time

import pytest
from rich.console import Console

from ringrl.study.progress import AblationProgress


def test_a_line_is_printed_while_a_cell_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringrl.pace.SECONDS", 0.01)
    text = io.StringIO()
    with AblationProgress({"walker_walk/bc_seed0": None}, 1, Console(file=text)) as progress:
        progress.begin("walker_walk/bc_seed0")
        end = time.monotonic() + 10
        while "1 running" not in text.getvalue():
            assert time.monotonic() < end
            time.sleep(0.01)
    assert "0 finished, 1 running, 0 failed, 0 waiting: walker_walk/bc_seed0" in text.getvalue()
