"""Run folders, training logs and facts."""

import json
import shutil

import numpy as np
import pytest
import yaml

from ringrl.config import TrainConfig
from ringrl.config_files import to_yaml
from ringrl.evaluation.records import append_records, recipe
from ringrl.files import json_digest, with_crc, without_crc
from ringrl.report.provenance import MEMORY, POINTS, facts, training_losses, training_runs
from ringrl.report.results import read_results


def runs_of(root):
    return training_runs(read_results([root]))


def test_a_run_by_hand(make_study, tmp_path):
    runs = runs_of(make_study(tmp_path / "runs"))
    assert list(zip(runs["train_trajectories"], runs["seed"], strict=True)) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    run = runs.iloc[-1]
    np.testing.assert_array_equal(run["steps"], np.arange(1, 101))  # the incomplete last line is left out
    np.testing.assert_allclose(run["losses"], 1 / np.arange(1, 101))
    assert run["tokens_per_second"] == 500.0
    assert np.isnan(run["peak_memory"])
    log = run["folder"] / "metrics.jsonl"
    log.write_text(log.read_text().replace('"loss"', f'"{MEMORY}": 2e9, "loss"'))
    assert runs_of(tmp_path / "runs")["peak_memory"].tolist()[-1] == 2e9


def test_a_curve_is_thinned_by_means(make_study, tmp_path):
    runs = runs_of(make_study(tmp_path / "runs"))
    losses = training_losses(runs, 10)
    first = losses[losses["run"] == 0]
    np.testing.assert_allclose(first["step"], np.arange(5.5, 100, 10))
    np.testing.assert_allclose(first["loss"].iloc[0], np.mean(1 / np.arange(1, 11)))
    assert training_losses(runs).groupby("run").size().tolist() == [POINTS] * 4


def test_losses_that_are_not_finite_are_counted_and_left_out(make_study, tmp_path):
    log = next(make_study(tmp_path / "runs").glob("*_at_2_seed0")) / "metrics.jsonl"
    entries = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": float("inf")}]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "[]\n")
    losses = training_losses(runs_of(tmp_path / "runs"))
    found = losses[losses["not_finite"] > 0]
    assert found[["step", "loss", "not_finite"]].to_numpy().tolist() == [[2.0, 3.0, 2.0]]


def test_runs_that_were_moved_are_found_next_to_their_results(make_study, tmp_path):
    make_study(tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert len(runs_of(tmp_path / "elsewhere")) == 4


def test_a_run_of_several_tasks_is_found_by_its_results_in_any(make_rollouts, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    context = {"trajectories": 2, "other_tasks": ["cartpole_balance"]}
    (run / "config.yaml").write_text(yaml.safe_dump({"task": "cartpole_swingup", "seed": 0, "context": context}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for task, count in (("cartpole_balance", 1), ("cartpole_swingup", 1), ("walker_walk", 0)):
        results = tmp_path / f"{task}.jsonl"
        append_records(results, make_rollouts(2, 0, 1.0, task=task, checkpoint=str(run)))
        assert len(runs_of(results)) == count, task


@pytest.mark.parametrize("change", [("seed: 0", "seed: 7"), ("trajectories: 1", "trajectories: 8"), ("task:", "tusk:")])
def test_the_folder_of_another_run_is_ignored(make_study, tmp_path, change):
    config = next(make_study(tmp_path / "runs").glob("*_at_1_seed0")) / "config.yaml"
    config.write_text(config.read_text().replace(*change))
    assert len(runs_of(tmp_path / "runs")) == 3
    config.write_text("[")
    assert len(runs_of(tmp_path / "runs")) == 3


def test_two_studies_with_the_same_names_keep_their_own_runs(make_rollouts, tmp_path):
    """Folders, seeds, tasks and lengths are equal; the settings are not."""
    for study, layers in (("a", 1), ("b", 2)):
        run = tmp_path / "all" / study / "at_2_seed0"
        values = {"data": "x.h5", "task": "cartpole_swingup", "run": str(run), "context": {"trajectories": 2}}
        config = TrainConfig.model_validate(values | {"model": {"layers": layers}})
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(config))
        (run / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {layers}.0}}\n')
        known = {
            "checkpoint": str(run),
            "settings": recipe(config),
            "configuration_hash": json_digest(config.model_dump(mode="json")),
        }
        append_records(run / "evaluation.jsonl", make_rollouts(2, 0, 1.0, **known))
    for moved in (False, True):
        root = (tmp_path / "all").rename(tmp_path / "moved") if moved else tmp_path / "all"
        runs = runs_of(root)
        found = {run["method"].split()[-1]: run["losses"].tolist() for _, run in runs.iterrows()}
        assert found == {"1": [1.0], "2": [2.0]}, moved


def test_without_run_folders_there_are_no_losses(make_study, tmp_path):
    root = make_study(tmp_path / "runs")
    for log in root.glob("*/metrics.jsonl"):
        log.unlink()
    assert runs_of(root).empty
    assert training_losses(runs_of(root)).empty


def test_a_damaged_line_of_a_log_is_left_out(make_study, tmp_path):
    root = make_study(tmp_path / "runs", seeds=1)
    (run, *_) = runs_of(root)["folder"]
    lines = [with_crc(json.dumps({"step": step, "loss": 0.25})) for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1].replace("0.25", "0.35"), lines[2]]))
    np.testing.assert_array_equal(runs_of(root).set_index("folder").loc[run, "steps"], [1, 3])


def test_one_run_of_several_rollouts_counts_once(make_study, tmp_path):
    root = make_study(tmp_path / "runs", seeds=1)
    run = next(root.glob("*_at_2_seed0"))
    text = without_crc((run / "evaluation.jsonl").read_text().splitlines()[0])
    (run / "longer.jsonl").write_text(
        text.replace('"test_trajectories":2', '"test_trajectories":3').replace("],", ",1.0],", 1) + "\n"
    )
    shutil.copytree(run, root / "copy" / run.name)
    assert set(read_results([root])["test_trajectories"]) == {1, 2, 3}
    assert len(runs_of(root)) == 2


def test_facts_by_hand(make_study, tmp_path):
    root = make_study(tmp_path / "runs")
    (root / "broken.jsonl").write_text('{"protocol": 1, "ta')
    found = dict(facts(read_results([root])))
    assert found["Target return"] == ["cartpole_swingup: 869 (data_best)"]
    assert found["Training seeds"] == ["0, 1"]
    assert found["Versions"] == ["jax 0.10.2"]
    assert found["Commands"] == ["ringrl ablate plan.yaml"]
    assert found["Left out"] == [f"{root}/broken.jsonl, line 1: damaged or cut short, left out"]
