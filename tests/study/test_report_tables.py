"""The numbers of the report, by hand, and in each of their forms."""

import csv
import io

import numpy as np
import pytest
from rich.console import Console

from ringrl.evaluation.scores import normalised_score
from ringrl.study.report_cells import gather
from ringrl.study.tables import data_rows, rows, to_csv, to_rich


def test_rows_by_hand(make_ablation):
    table = rows(gather(make_ablation()))
    names = ["Random policy", "Behaviour cloning", "Dataset, all episodes", "Dataset, best episode"]
    assert [row.method for row in table] == [*names, *["Agentic Transformer"] * 3]
    row = table[-1]
    assert (row.train_trajectories, row.test_trajectories, row.seeds, row.episodes) == (4, 4, 5, 40)
    assert row.mean == pytest.approx(618)
    assert row.iqm == pytest.approx(618)
    assert (row.first, row.last, row.best) == (pytest.approx(603), pytest.approx(633), pytest.approx(633))
    assert row.best_control == pytest.approx(393)
    assert row.low is not None
    assert row.high is not None
    assert 616 <= row.low < 618 < row.high <= 620
    assert row.score == pytest.approx(float(normalised_score("cartpole_swingup", 618.0)))
    everything, best = table[2:4]
    assert (everything.mean, everything.episodes) == (pytest.approx(400), 101)
    assert (everything.low, everything.seeds) == (None, None)
    assert best.mean == 800


def test_interquartile_mean_differs_from_the_mean(make_rollouts):
    records = [record for seed, level in enumerate([0, 100, 110, 900]) for record in make_rollouts(1, seed, level)]
    (row,) = rows(gather(records))
    assert row.mean == pytest.approx(278.5)
    assert row.iqm == pytest.approx(106)


def test_a_single_episode_is_its_own_control(make_rollouts):
    (row,) = rows(gather(make_rollouts(1, 0, 100)))
    assert row.best == row.best_control == 101
    assert row.control == row.iqm == 101


def test_the_control_s_mean_and_best_by_hand(make_rollouts):
    (row,) = rows(gather(make_rollouts(2, 0, 100, gain=10) + make_rollouts(2, 0, 50, gain=-20, context=False)))
    assert (row.iqm, row.best) == (106, 111)
    assert (row.control, row.last_control, row.best_control) == (41, 31, 51)


def test_one_seed_has_no_interval_anywhere(make_ablation):
    table = rows(gather(make_ablation(seeds=1)))
    assert {(row.low, row.high) for row in table} == {(None, None)}
    read = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert {row["low"] for row in read} == {""}


def test_a_task_without_constants_has_no_score(make_rollouts):
    (row,) = rows(gather(make_rollouts(1, 0, 100, task="my_own_task")))
    assert row.score is None


def test_csv_keeps_full_precision(make_ablation):
    table = rows(gather(make_ablation()))
    read = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [float(row["iqm"]) for row in read] == [row.iqm for row in table]


def test_where_the_policy_stands_in_the_data(make_ablation):
    (row,) = data_rows(gather(make_ablation()))
    np.testing.assert_allclose(row.quantiles, [0, 40, 200, 400, 600, 760, 800])
    assert row.best_method == "Agentic Transformer (4 trajectories)"
    assert row.share_below == pytest.approx(78 / 101)  # 0, 8, ..., 616 lie below 618


def test_the_terminal_table_fits_80_columns(make_ablation):
    text = io.StringIO()
    table = to_rich(rows(gather([*make_ablation(), *make_ablation(task="jaco_reach_bottom_right")])))
    Console(file=text, width=80).print(table)
    assert "…" not in text.getvalue()
    assert text.getvalue().count("618 [617, 620]") == 2
    assert "633 (393)" in text.getvalue()


def test_brackets_in_a_name_are_no_markup(make_rollouts):
    text = io.StringIO()
    Console(file=text, width=100).print(to_rich(rows(gather(make_rollouts(1, 0, 1, method="[red]mine[/red]")))))
    assert "[red]mine[/red]" in text.getvalue()
