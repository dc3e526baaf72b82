import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from ringrl.data import EpisodeStore
from ringrl.errors import UserError
from ringrl.evaluation.records import read_records
from ringrl.study.ablate import ablate, cells, read_plan

SETTINGS = {
    "model": {"layers": 1, "width": 16, "token_set": "fused1"},
    "optimiser": {"steps": 3},
}


def write_plan(folder: Path, store: Path, **changes: object) -> Path:
    plan = {
        "data": str(store),
        "task": "jaco_reach_top_left",
        "output": str(folder / "runs"),
        "trajectories": [1, 2],
        "seeds": [0, 1],
        "trajectories_per_batch": 2,
        "environments": 2,
        "settings": SETTINGS,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan | changes))
    return path


def test_cells_cross_lengths_seeds_and_baselines_at_equal_tokens(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, tmp_path / "x.h5", trajectories=[1, 2, 4], trajectories_per_batch=8))
    found = list(cells(plan))
    assert len(found) == 2 * (3 + 1)
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        config = cell.config
        assert config.context.trajectories * config.optimiser.batch_size == 8
        assert config.run == tmp_path / "runs" / cell.name
        assert config.optimiser.steps == 3
    assert [cell.config.seed for cell in found] == [0] * 4 + [1] * 4
    kinds = [cell.config.model.kind for cell in found[:4]]
    assert kinds == ["behaviour_cloning", "transformer", "transformer", "transformer"]


def test_baseline_of_the_best_tenth_filters_the_data(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, tmp_path / "x.h5", baselines=["behaviour_cloning_10%"]))
    assert next(cells(plan)).config.context.best_fraction == 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trajectories": [3]}, "3 does not divide"),
        ({"seeds": "many"}, "seeds"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_wrong_plans_are_refused_by_name(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = write_plan(tmp_path, tmp_path / "x.h5", **changes)
    with pytest.raises(UserError, match=said) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


def test_wrong_settings_are_refused_before_anything_runs(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, tmp_path / "x.h5", settings={"model": {"layers": 0}}))
    with pytest.raises(UserError, match=r"model\.layers"):
        ablate(plan, Console(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_every_cell_is_evaluated_once_and_finished_cells_are_kept(tmp_path: Path, jaco_store: EpisodeStore) -> None:
    plan = read_plan(write_plan(tmp_path, jaco_store.path, seeds=[0]))
    files = ablate(plan, Console(quiet=True))
    records = read_records(files).records
    by_method = {
        name: [record for record in records if record.method == name] for name in ("random", "data", "bc", "dt", "at")
    }
    counts = {name: len(found) for name, found in by_method.items()}
    assert counts == {"random": 2, "data": 8, "bc": 2, "dt": 2, "at": 4}
    assert [record.returns[0] for record in by_method["data"]] == pytest.approx(jaco_store.returns(plan.task).tolist())
    contexts = [(record.context, record.test_trajectories) for record in by_method["at"]]
    assert contexts == [(True, 2)] * 2 + [(False, 2)] * 2
    best = float(np.max(jaco_store.returns(plan.task)))
    assert {record.target_return for record in by_method["at"]} == {best}

    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    redone = plan.output / "transformer_2_seed0" / "evaluation.jsonl"
    redone.unlink()
    assert ablate(plan, Console(quiet=True)) == files
    for path in files:
        if path != redone:
            assert (path.stat().st_mtime_ns, path.read_bytes()) == before[path]
    old, new = before[redone][1], redone.read_bytes()
    assert [json.loads(line)["returns"] for line in new.splitlines()] == [
        json.loads(line)["returns"] for line in old.splitlines()
    ]
