"""The benchmark of learning within a context, on made-up returns."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ringrl.evaluation.records import EvaluationRecord, append_records
from ringrl.study.report_cells import gather

EPISODES, CONTEXTS = 4, 200


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("within_context")


def record(seed: int, index: int, returns: np.ndarray, **changes: object) -> EvaluationRecord:
    values = {
        "task": "walker_walk", "method": "at", "train_trajectories": EPISODES, "test_trajectories": EPISODES,
        "seed": seed, "environment_seed": index, "returns": tuple(returns.tolist()),
    }  # fmt: skip
    return EvaluationRecord.model_validate(values | changes)


def made_up() -> list[EvaluationRecord]:
    """Both kinds rise by 100 an episode and differ by seed; with memory each context keeps a luck of its own, too."""
    random, records = np.random.default_rng(0), []
    for seed in range(3):
        for index in range(CONTEXTS):
            for context in (True, False):
                noise = random.normal(0, 30, EPISODES)
                luck = random.normal(0, 30) if context else 0.0
                records.append(
                    record(seed, index, 500.0 * seed + 100 * np.arange(EPISODES) + noise + luck, context=context)
                )
    return records


def test_returns_by_episode_and_what_carries_over(script: ModuleType) -> None:
    (cell,) = gather(made_up()).cells
    found = script.summarise(cell)
    for name, expected in (("with memory", 0.5), ("wiped", 0.0)):
        values = [episode["value"] for episode in found[name]["episodes"]]
        np.testing.assert_allclose(values, 500 + 100 * np.arange(EPISODES), atol=10)
        assert found[name]["correlation"] == pytest.approx(expected, abs=0.08), "the place and the seed are no memory"
        assert found[name]["contexts"] == 3 * CONTEXTS


def test_a_context_counts_once_and_a_single_one_tells_no_correlation(script: ModuleType) -> None:
    twice = [record(0, 0, np.array([1.0, 2, 3, value])) for value in (4.0, 8.0)]
    failed = record(0, 1, np.array([1.0, 2, 3, 4])).model_copy(update={"returns": (100.0, None, None, None)})
    control = [record(0, index, np.zeros(EPISODES), context=False) for index in range(2)]
    (cell,) = gather([*twice, failed, *control]).cells
    found = script.summarise(cell)
    kept = found["with memory"]
    assert ([episode["value"] for episode in kept["episodes"]], kept["contexts"]) == ([1, 2, 3, 8], 1)
    assert kept["correlation"] is None
    assert "| none | 1 |" in script.table({"walker_walk": {"with memory": kept}})
    assert "wiped" in found
    (cell,) = gather([*twice, failed, *control[1:]]).cells
    assert "wiped" not in script.summarise(cell), "its starts are fewer"


def test_it_reads_what_belongs_together(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    others = [
        record(0, 0, np.zeros(EPISODES), prompt_trajectories=1),
        record(0, 0, np.zeros(EPISODES), train_trajectories=1),
        record(0, 0, np.zeros(2), test_trajectories=2),
    ]
    append_records(results, [*made_up(), *others])
    script.main([str(results), "--episodes", str(EPISODES)])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[1], row[-1]) for row in rows] == [("with memory", "600 |"), ("wiped", "600 |")]
    append_records(results, [record(0, 0, np.zeros(EPISODES), method="ad")])
    both = "results of Agentic Transformer and Algorithm Distillation; give those of one method"
    for wrong, said in ((EPISODES, both), (9, "no contexts of 9 episodes")):
        with pytest.raises(SystemExit) as stop:
            script.main([str(results), "--episodes", str(wrong)])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
