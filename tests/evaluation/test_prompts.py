"""The benchmark of prompts: the same weights and starts, and only the context longer."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ringrl.evaluation.records import read_records

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "prompts.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prompts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_each_length_has_the_same_starts_and_a_prompt_of_its_own(script: ModuleType, at_run: Path) -> None:
    found = script.measure([at_run], [0, 1], draws=2, streams=1)
    records = read_records(at_run / script.RESULTS).records
    starts = {(r.prompt_trajectories, r.start_seeds) for r in records}
    assert starts == {(length, (1_000_000 + draw,)) for length in (0, 1) for draw in (0, 1)}
    for length in (0, 1):
        returns = [r.returns[0] for r in records if r.prompt_trajectories == length]
        assert found[length]["value"] == pytest.approx(np.mean(returns))
        assert found[length]["episodes"] == 2
    assert found[0]["value"] != found[1]["value"], "the prompt is not seen"
    printed = script.table(found, single=None).splitlines()
    assert [line.split("|")[1].strip() for line in printed[2:]] == ["0", "1"]
    assert script.measure([at_run], [0], draws=2, streams=1)[0] == found[0], "done again, or others counted in"
    assert len(read_records(at_run / script.RESULTS).records) == len(records)
    assert script.measure([at_run], [1], draws=1, streams=2)[1]["episodes"] == 2, "other draws from the same starts"
