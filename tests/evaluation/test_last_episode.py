"""The benchmark of last episodes, on made-up returns: only the same starts are set beside each other."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from ringrl.evaluation.records import EvaluationRecord, append_records

STARTS = {0: 1000.0, 1: 2000.0, 2: 3000.0, 3: 4000.0}  # what is added to every return: some are easier


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("last_episode")


def record(
    method: str, seed: int, starts: tuple[int, ...], returns: tuple[float, ...], **changes: object
) -> EvaluationRecord:
    values = {
        "task": "walker_walk", "method": method, "train_trajectories": len(starts) if method == "at" else None,
        "test_trajectories": len(starts), "seed": seed, "environment_seed": starts[0], "start_seeds": starts,
        "returns": tuple(STARTS[start] + value for start, value in zip(starts, returns, strict=True)),
    }  # fmt: skip
    return EvaluationRecord.model_validate(values | changes)


def made_up() -> list[EvaluationRecord]:
    """Contexts of two from the starts (0, 1) and (2, 3), whose last begin at 1 and 3; single episodes of all."""
    records = []
    for seed in range(3):
        for context, gain in ((True, 10.0), (False, 0.0)):
            records += [record("at", seed, pair, (0.0, gain + seed), context=context) for pair in ((0, 1), (2, 3))]
        records += [record("bc", seed, (start,), (5.0,)) for start in STARTS]
        records += [record("td3+bc", seed, (start,), (0.0,)) for start in (0, 1, 2)]  # none from 3
    return records


def test_all_are_measured_from_the_starts_of_the_last_episodes(script: ModuleType) -> None:
    rows = script.summarise(made_up(), 2)["walker_walk"]
    assert {name: (found["value"], found["runs"], found["starts"]) for name, found in rows.items()} == {
        "Agentic Transformer, n = 2": (3011, 3, 2),
        "Agentic Transformer, n = 2, wiped": (3001, 3, 2),
        "Behaviour cloning": (3005, 3, 2),
    }
    interval = rows["Agentic Transformer, n = 2"]["interval"]
    assert (interval["low"], interval["high"]) == (3010, 3012)


def test_it_prints_a_table_and_says_what_it_does_not_find(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    append_records(results, [*made_up(), record("at", 0, (0, 1), (0.0, 99.0), prompt_trajectories=1)])
    script.main([str(results), "--episodes", "2"])
    assert "| walker_walk | Agentic Transformer, n = 2 | 3011 [3010, 3012] | 3 | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        script.main([str(results), "--episodes", "7"])
    assert stop.value.code == 2
    assert "no contexts of 7 episodes" in capsys.readouterr().err
