"""Returns against what training took."""

import pytest

from ringrl.study.report_cells import gather
from ringrl.study.report_cost import cost_charts
from ringrl.study.report_draw import panel_svg


def test_no_chart_without_budgets(make_ablation):
    assert cost_charts(gather(make_ablation())) == []


def test_one_point_is_no_chart(make_rollouts, make_budget):
    assert cost_charts(gather(make_rollouts(2, 0, 1.0, budget=make_budget(2)))) == []


def test_a_chart_per_measure(make_rollouts, make_budget):
    records = [
        record
        for n in (1, 4)
        for seed in range(2)
        for record in make_rollouts(n, seed, 100.0 * n, budget=make_budget(n))
    ]
    charts = {chart.name: chart for chart in cost_charts(gather(records))}
    assert set(charts) == {"return_by_tokens", "return_by_flops", "return_by_seconds"}
    assert "all took the same" in charts["return_by_tokens"].caption
    assert "all took the same" not in charts["return_by_flops"].caption
    assert "Each run had one device." in charts["return_by_seconds"].caption
    svg = panel_svg(charts["return_by_flops"].panels[0])
    for label in (">1</text>", ">4</text>", "T</text>"):
        assert label in svg, label


def test_lengths_trained_on_and_rolled_out_are_both_said_where_they_differ(make_rollouts, make_budget):
    records = [
        record
        for train, test in ((1, 1), (1, 8), (4, 1))
        for record in make_rollouts(test, 0, 100.0 * train + test, train_trajectories=train, budget=make_budget(train))
    ]
    svg = panel_svg(cost_charts(gather(records))[0].panels[0])
    for label in (">1</text>", ">1/8</text>", ">4/1</text>"):
        assert label in svg, label


def test_time_has_a_unit_that_fits(make_rollouts, make_budget):
    for seconds, unit in ((60.0, "seconds"), (600.0, "minutes"), (36_000.0, "hours")):
        records = [record for n in (1, 2) for record in make_rollouts(n, 0, 1.0, budget=make_budget(n, seconds))]
        chart = cost_charts(gather(records))[-1]
        assert f">{unit}</text>" in panel_svg(chart.panels[0])


def test_a_seed_that_does_not_tell_leaves_its_point_out(make_rollouts, make_budget):
    records = [
        record
        for n in (1, 2, 4)
        for seed in range(2)
        for record in make_rollouts(n, seed, 1.0, budget=make_budget(n, None if (n, seed) == (2, 1) else 30.0))
    ]
    chart = cost_charts(gather(records))[-1]
    assert chart.name == "return_by_seconds"
    svg = panel_svg(chart.panels[0])
    assert ">1</text>" in svg
    assert ">4</text>" in svg
    assert ">2</text>" not in svg


def test_a_method_without_context_is_a_diamond_with_its_name(make_rollouts, make_budget):
    records = make_rollouts(2, 0, 1.0, budget=make_budget(2))
    records += make_rollouts(1, 0, 1.0, method="td3+bc", train_trajectories=None, budget=make_budget(1))
    assert ">TD3+BC</text>" in panel_svg(cost_charts(gather(records))[0].panels[0])


def test_one_seed_is_told(make_rollouts, make_budget):
    records = [record for n in (1, 2) for record in make_rollouts(n, 0, 1.0, budget=make_budget(n))]
    assert all("no interval can be given" in chart.caption for chart in cost_charts(gather(records)))


def test_the_budget_of_a_cell_is_per_seed(make_rollouts, make_budget):
    records = [record for seed in (0, 3) for record in make_rollouts(2, seed, 1.0, budget=make_budget(2, 10.0 + seed))]
    (cell,) = gather(records).cells
    assert {seed: budget.seconds for seed, budget in cell.budgets.items()} == pytest.approx({0: 10.0, 3: 13.0})
