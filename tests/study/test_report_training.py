"""What the runs wrote while they trained."""

import json
import shutil

import numpy as np
import pytest
import yaml

from ringrl.config import TrainConfig, to_yaml
from ringrl.evaluation.records import append_records, configuration_hash, read_records, recipe
from ringrl.study.report_cells import gather
from ringrl.study.report_draw import panel_svg
from ringrl.study.report_training import MEMORY, POINTS, training_charts, training_runs


def read(root):
    found = read_records([root])
    grid = gather(found.records)
    return training_runs(found, grid), grid


def test_a_run_by_hand(make_study, tmp_path):
    runs, _ = read(make_study(tmp_path / "runs"))
    assert len(runs) == 4
    assert [(run.length, run.record.seed) for run in runs] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    run = runs[-1]
    np.testing.assert_array_equal(run.steps, np.arange(1, 101))  # the cut last line is left out
    np.testing.assert_allclose(run.losses, 1 / np.arange(1, 101))
    assert run.tokens_per_second == 500.0
    assert run.peak_memory is None


def test_a_curve_is_thinned_by_means(make_study, tmp_path):
    runs, _ = read(make_study(tmp_path / "runs"))
    steps, losses = runs[0].curve(10)
    np.testing.assert_allclose(steps, np.arange(5.5, 100, 10))
    np.testing.assert_allclose(losses[0], np.mean(1 / np.arange(1, 11)))
    assert len(runs[0].curve()[0]) == POINTS


def test_losses_that_are_not_finite_are_counted_and_left_out(make_study, tmp_path):
    log = next(make_study(tmp_path / "runs").glob("*_at_2_seed0")) / "metrics.jsonl"
    entries = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": float("inf")}]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "[]\n")
    runs, grid = read(tmp_path / "runs")
    run = next(run for run in runs if run.folder == log.parent)
    np.testing.assert_array_equal(run.curve(), [[2.0], [3.0]])
    charts = training_charts(runs, grid)
    assert "2 steps without a finite loss are left out." in charts[0].caption
    panel_svg(charts[0].panels[0])


def test_runs_that_were_moved_are_found_beside_their_results(make_study, tmp_path):
    make_study(tmp_path / "runs").rename(tmp_path / "elsewhere")
    runs, _ = read(tmp_path / "elsewhere")
    assert len(runs) == 4


def test_a_run_of_several_tasks_is_found_by_its_results_in_any(make_rollouts, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    context = {"trajectories": 2, "other_tasks": ["cartpole_balance"]}
    (run / "config.yaml").write_text(yaml.safe_dump({"task": "cartpole_swingup", "seed": 0, "context": context}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for task, count in (("cartpole_balance", 1), ("cartpole_swingup", 1), ("walker_walk", 0)):
        results = tmp_path / f"{task}.jsonl"
        append_records(results, make_rollouts(2, 0, 1.0, task=task, checkpoint=str(run)))
        assert len(read(results)[0]) == count, task


@pytest.mark.parametrize("change", [("seed: 0", "seed: 7"), ("trajectories: 1", "trajectories: 8"), ("task:", "tusk:")])
def test_the_folder_of_another_run_is_passed_over(make_study, tmp_path, change):
    config = next(make_study(tmp_path / "runs").glob("*_at_1_seed0")) / "config.yaml"
    config.write_text(config.read_text().replace(*change))
    assert len(read(tmp_path / "runs")[0]) == 3
    config.write_text("[")
    assert len(read(tmp_path / "runs")[0]) == 3


def test_of_two_studies_with_the_same_names_each_has_its_own_runs(make_rollouts, tmp_path):
    """Folders, seeds, tasks and lengths are the same; what was trained is not."""
    for study, layers in (("a", 1), ("b", 2)):
        run = tmp_path / "all" / study / "at_2_seed0"
        values = {"data": "x.h5", "task": "cartpole_swingup", "run": str(run), "context": {"trajectories": 2}}
        config = TrainConfig.model_validate(values | {"model": {"layers": layers}})
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(config))
        (run / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {layers}.0}}\n')
        told = {"checkpoint": str(run), "settings": recipe(config), "configuration_hash": configuration_hash(config)}
        append_records(run / "evaluation.jsonl", make_rollouts(2, 0, 1.0, **told))
    for moved in (False, True):
        root = (tmp_path / "all").rename(tmp_path / "moved") if moved else tmp_path / "all"
        runs, _ = read(root)
        found = {dict(run.variant.settings)["model.layers"]: float(run.losses[0]) for run in runs}
        assert found == {"1": 1.0, "2": 2.0}, moved


def test_no_folders_no_charts(make_study, tmp_path):
    root = make_study(tmp_path / "runs")
    for log in root.glob("*/metrics.jsonl"):
        log.unlink()
    runs, grid = read(root)
    assert runs == []
    assert training_charts(runs, grid) == []


def test_charts_say_what_there_is(make_study, tmp_path):
    root = make_study(tmp_path / "runs")
    runs, grid = read(root)
    charts = {chart.name: chart for chart in training_charts(runs, grid)}
    assert set(charts) == {"learning_curves", "throughput"}
    assert "memory is not shown" in charts["throughput"].caption
    assert ">1 k</text>" in panel_svg(charts["throughput"].panels[0]).replace("\N{NO-BREAK SPACE}", " ")
    for log in root.glob("*/metrics.jsonl"):
        log.write_text(log.read_text().replace('"loss"', f'"{MEMORY}": 2e9, "loss"'))
    charts = {chart.name: chart for chart in training_charts(*read(root))}
    assert set(charts) == {"learning_curves", "throughput", "memory"}
    assert "memory is not shown" not in charts["throughput"].caption
    assert "GB</text>" in panel_svg(charts["memory"].panels[0])


def test_one_run_of_several_rollouts_counts_once(make_study, tmp_path):
    root = make_study(tmp_path / "runs", seeds=1)
    run = next(root.glob("*_at_2_seed0"))
    text = (run / "evaluation.jsonl").read_text()
    (run / "longer.jsonl").write_text(
        text.replace('"test_trajectories":2', '"test_trajectories":3').replace("],", ",1.0],", 1).splitlines()[0] + "\n"
    )
    shutil.copytree(run, root / "copy" / run.name)
    runs, grid = read(root)
    assert {cell.test for cell in grid.cells} == {1, 2, 3}
    assert len(runs) == 2
