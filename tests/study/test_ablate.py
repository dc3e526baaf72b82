import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from ringrl.config import merged, read_yaml
from ringrl.configs import preset
from ringrl.data import EpisodeStore
from ringrl.errors import UserError
from ringrl.evaluation.records import read_records
from ringrl.methods import method_of
from ringrl.study.ablate import AblationPlan, ablate, cells, read_plan

BASELINES = ("bc", "bc-10%", "dt", "td3", "td3+bc")
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
    assert [cell.name for cell in found[:4]] == ["bc_seed0", "at_1_seed0", "at_2_seed0", "at_4_seed0"]
    assert [method_of(cell.config) for cell in found[:4]] == ["bc", "dt", "at", "at"]


def test_every_method_may_stand_beside_the_others_and_sees_as_much(tmp_path: Path) -> None:
    """Of steps of 250, jaco's episodes, whatever a batch is made of."""
    changes = {"methods": ["at", "ad"], "baselines": list(BASELINES), "trajectories": [2, 4], "seeds": [5]}
    settings = merged(SETTINGS, {"context": {"best_fraction": 0.5}, "optimiser": {"steps": 64}})
    plan = read_plan(write_plan(tmp_path, tmp_path / "x.h5", **changes, trajectories_per_batch=8, settings=settings))
    found = {cell.name: cell.config for cell in cells(plan)}
    assert {name: method_of(config) for name, config in found.items()} == {
        "bc_seed5": "bc-50%", "bc-10_seed5": "bc-10%", "dt_seed5": "dt", "td3_seed5": "td3", "td3+bc_seed5": "td3+bc",
        "at_2_seed5": "at", "at_4_seed5": "at", "ad_2_seed5": "ad", "ad_4_seed5": "ad",
    }  # fmt: skip
    for config in found.values():
        optimiser = config.optimiser
        row = 1 if config.model.kind == "td3_bc" else 250 * config.context.trajectories
        assert optimiser.steps * optimiser.batch_size * row == 64 * 8 * 250
        assert config.seed == 5
    assert found["td3_seed5"].optimiser.batch_size == 256
    assert found["at_2_seed5"].model.token_set == "fused1"
    assert found["dt_seed5"].model.token_set == "dt3"
    assert found["ad_4_seed5"].context.best_fraction == 1, "a history has no gaps"


def test_the_demos_cells() -> None:
    """What docs/results.md and the README show is of these."""
    plan = AblationPlan.model_validate(read_yaml(preset("demo")) | {"data": "x.h5", "output": "runs"})
    found = list(cells(plan))
    names = ["bc", "at_1", "at_2", "at_4"]
    assert [cell.name for cell in found] == [f"{name}_seed{seed}" for seed in (0, 1) for name in names]
    cloning, *transformers = (cell.config for cell in found[:4])
    assert (cloning.model.kind, cloning.model.layers, cloning.model.width) == ("behaviour_cloning", 2, 256)
    assert [config.optimiser.batch_size for config in (cloning, *transformers)] == [4, 4, 2, 1]
    for config in (cloning, *transformers):
        assert (config.context.order, config.context.target, config.context.sampling) == (
            "ascending",
            "best",
            "uniform",
        )
        assert (config.context.best_fraction, config.optimiser.steps, config.optimiser.learning_rate) == (
            0.5,
            400,
            0.003,
        )
    assert {(c.model.token_set, c.model.layers, c.model.width) for c in transformers} == {("fused1", 1, 64)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trajectories": [3]}, "3 does not divide"),
        ({"seeds": "many"}, "seeds"),
        ({"unknown": 1}, "unknown"),
        ({"baselines": ["at"]}, r"baselines\.0: .*'bc', 'bc-10%', 'dt', 'td3' or 'td3\+bc'"),
        ({"methods": ["dt"]}, r"methods\.0: .*'at' or 'ad'"),
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
    redone = plan.output / "at_2_seed0" / "evaluation.jsonl"
    redone.unlink()
    assert ablate(plan, Console(quiet=True)) == files
    for path in files:
        if path != redone:
            assert (path.stat().st_mtime_ns, path.read_bytes()) == before[path]
    old, new = before[redone][1], redone.read_bytes()
    assert [json.loads(line)["returns"] for line in new.splitlines()] == [
        json.loads(line)["returns"] for line in old.splitlines()
    ]
