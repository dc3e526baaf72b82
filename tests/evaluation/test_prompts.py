"""The benchmarks of prompts: the same starts, and only the context longer, or one setting another."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ringrl.config import read_yaml
from ringrl.data import EpisodeStore
from ringrl.evaluation.records import read_records

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"model": {"layers": 1, "width": 16, "token_set": "fused1"}, "optimiser": {"steps": 2}}
TASK = "jaco_reach_top_left"


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """What a script finds beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(scope="module")
def script(benchmarks: None) -> ModuleType:
    return importlib.import_module("prompts")


def test_each_length_has_the_same_starts_and_a_prompt_of_its_own(
    script: ModuleType, at_run: Path, tmp_path: Path
) -> None:
    results = tmp_path / "prompts.jsonl"
    found = script.measure([at_run], [0, 1], draws=2, streams=1, results=results)
    records = read_records(results).records
    starts = {(r.prompt_trajectories, r.start_seeds) for r in records}
    assert starts == {(length, (1_000_000 + draw,)) for length in (0, 1) for draw in (0, 1)}
    for length in (0, 1):
        returns = [r.returns[0] for r in records if r.prompt_trajectories == length]
        assert found[length]["value"] == pytest.approx(np.mean(returns))
        assert found[length]["episodes"] == 2
    assert found[0]["value"] != found[1]["value"], "the prompt is not seen"
    printed = script.table(found, single=None).splitlines()
    assert [line.split("|")[1].strip() for line in printed[2:]] == ["0", "1"]
    assert script.measure([at_run], [0], draws=2, streams=1, results=results)[0] == found[0], (
        "done again, or others counted in"
    )
    assert len(read_records(results).records) == len(records)
    other = script.measure([at_run], [1], draws=1, streams=2, results=results)
    assert other[1]["episodes"] == 2, "other draws from the same starts"
    assert not list(at_run.rglob("*prompts*")), "a report of the run's study would count them"


def test_tasks_of_one_model_are_no_independent_evidence(script: ModuleType, at_run: Path, tmp_path: Path) -> None:
    """Returns that are alike in all tasks of a model leave the interval of one task."""
    records = script.evaluate_prompts(at_run, [0], 1, 1, tmp_path / "prompts.jsonl")
    seeds = [r.model_copy(update={"seed": seed, "returns": (10.0 * seed,)}) for r in records for seed in range(4)]
    tasks = [r.model_copy(update={"task": task}) for r in seeds for task in (TASK, "jaco_reach_top_right")]
    one, both = script.summarised(seeds), script.summarised(tasks)
    assert (one["value"], one["interval"], one["runs"]) == (both["value"], both["interval"], both["runs"])


def test_lengths_differ_in_the_length_alone(
    jaco_store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("prompted_lengths")
    monkeypatch.setattr(script, "PROMPTS", 1)
    monkeypatch.setattr(script, "STREAMS", 2)
    found = [
        script.run_cell(TINY | {"task": TASK}, jaco_store.path, tmp_path, 2, (length, seed))
        for length in (1, 2)
        for seed in (0, 1)
    ]
    starts = {record.start_seeds for records in found for record in records}
    assert starts == {(1_000_000,), (1_000_001,)}
    for length, seed in ((1, 0), (2, 1)):
        config = read_yaml(tmp_path / f"n{length}-seed{seed}" / "config.yaml")
        assert config["context"]["trajectories"] * config["optimiser"]["batch_size"] == 2
        assert (config["context"]["trajectories"], config["seed"]) == (length, seed)
    results = script.summarise([record for records in found for record in records], (1, 2))
    prompted, control = results["prompted"][2], results["control"][2]
    mine = [r for records in found[2:] for r in records]
    for cell, prompt in ((prompted, 1), (control, 0)):
        returns = [
            np.mean([r.returns[0] for r in mine if (r.seed, r.prompt_trajectories) == (s, prompt)]) for s in (0, 1)
        ]
        np.testing.assert_allclose(cell["tasks"][TASK], returns)
    best = [r.prompt_returns[0] for r in mine if r.prompt_trajectories == 1]
    assert prompted["best_of_prompt"] == pytest.approx(np.mean(best))
    assert results["prompted"][1]["best_of_prompt"] is None
    assert prompted["tasks"] != control["tasks"], "the prompt is not seen"
    assert len(script.table(results).splitlines()) == 4


def test_lengths_of_another_task_and_other_steps_change_these_alone(script: ModuleType) -> None:
    settings_of = importlib.import_module("prompted_lengths").settings_of
    own = settings_of("no_return_asked", None, None)
    other = settings_of("no_return_asked", "cheetah_run", 7)
    assert (own["task"], own["optimiser"].pop("steps")) == ("walker_walk", 1500)
    assert (other["task"], other["optimiser"].pop("steps")) == ("cheetah_run", 7)
    assert own | {"task": "cheetah_run"} == other


def test_variants_differ_from_the_study_in_one_setting(
    jaco_store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("variants")
    monkeypatch.setattr(script, "PROMPTS", 1)
    monkeypatch.setattr(script, "STREAMS", 2)
    monkeypatch.setattr(script, "read_yaml", lambda path: {"settings": TINY})
    monkeypatch.setattr(script, "ProcessPoolExecutor", _SameProcess)
    names = ["as in the study", "loss on the last trajectory"]
    output = tmp_path / "variants.json"
    script.main([
        str(jaco_store.path), "--task", TASK, "--seeds", "0", "--only", *names, "--folder", str(tmp_path),
        "--json", str(output),
    ])  # fmt: skip
    both = [read_yaml(tmp_path / f"{name.replace(' ', '_')}-seed0" / "config.yaml") for name in names]
    assert [config["model"].pop("loss_on") for config in both] == ["all", "last"]
    runs = {config.pop("run") for config in both}
    assert len(runs) == 2
    assert both[0] == both[1]
    assert both[0]["context"]["trajectories"] == 2
    results: dict[str, Any] = json.loads(output.read_text())
    assert list(results) == names
    assert results[names[0]]["1"]["value"] != results[names[1]]["1"]["value"], "one and the same model"
    assert "| loss on the last trajectory |" in capsys.readouterr().out


class _SameProcess:
    """A pool of nobody else."""

    def __init__(self, *arguments: object, **more: object) -> None:
        pass

    def __enter__(self) -> "_SameProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, function: Any, cells: Any) -> Any:
        return map(function, cells)
