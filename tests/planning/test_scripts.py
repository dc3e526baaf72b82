"""The benchmarks of docs/plan.md and docs/scaling.md run and print what the pages show."""

import importlib.util
import sys
from pathlib import Path

import pytest

from ringrl.planning.machines import find_machine
from ringrl.planning.memory import memory_of
from ringrl.planning.roofline import step_time

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    """Return a function that imports a benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def module(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
        return made

    return module


def test_table_of_contexts_equals_the_page(load):
    """Without the last column, which needs a compiler and minutes."""
    lines = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    for row in load("plan_table").rows({}):
        assert any(line.startswith(row.rsplit("|", 2)[0]) for line in lines), row


@pytest.mark.slow
def test_plan_reality_runs(load, monkeypatch, make):
    script, machine = load("plan_reality"), find_machine("cpu-1")
    monkeypatch.setattr(script, "measure_host", lambda machine, model: machine)
    workload = make(64, token_set="ring4", layers=1, width=16, attention="vanilla")
    found = script.run(workload, machine, 1)
    assert found["planned_seconds"] == pytest.approx(step_time(workload, machine).total)
    assert found["seconds"] > 0
    assert found["compiled_bytes"] == pytest.approx(memory_of(workload, "cpu").total, rel=0.5)
