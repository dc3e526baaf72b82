"""Settings that differ along a curve are told above it."""

import pytest

from ringrl.study.report import write_report
from ringrl.study.report_cells import gather
from ringrl.study.report_settings import settings_warning
from ringrl.training.budget import Budget


def test_what_differs_besides_the_length_is_said(make_rollouts, write_results, tmp_path):
    of_length = {1: {"optimiser.learning_rate": "0.1"}, 2: {}, 4: {"optimiser.steps": "9", "optimiser.batch_size": "3"}}
    records = [
        record
        for length, settings in of_length.items()
        for record in make_rollouts(length, 0, 100.0 * length, settings=settings)
    ]
    said = settings_warning(gather(records))
    assert said is not None
    assert "Agentic Transformer on cartpole_swingup: optimiser.learning_rate 0.1 with 1, 0.001 with 2 and 4" in said
    assert "optimiser.steps" not in said, "a budget makes these of the length"
    page = write_report([write_results(records)], tmp_path / "report").read_text()
    assert "Not only the length of the context differs" in page


@pytest.mark.parametrize(
    ("alike", "said"),
    [
        ({}, "training of 100 steps with 1, 100,000 steps with 2"),
        ({"timesteps": 7}, None),
        ({"tokens": 7}, None),
        ({"flops": 7.0}, None),
        ({"seconds": 7.0}, None),
        ({"steps": 100}, None),
    ],
)
def test_lengths_that_have_no_budget_in_common_are_told(alike, said, make_rollouts):
    few = {"steps": 100, "batch_size": 1, "timesteps": 100, "tokens": 100, "flops": 1e6, "seconds": 1.0}
    many = {"steps": 100_000, "batch_size": 1, "timesteps": 200_000, "tokens": 200_000, "flops": 1e9, "seconds": 900.0}
    records = [
        record
        for length, budget in ((1, few), (2, many))
        for record in make_rollouts(length, 0, 1.0, budget=Budget(**{**budget, **alike}))
    ]
    warning = settings_warning(gather(records))
    assert warning is None if said is None else said in str(warning)


def test_nothing_is_said_of_equal_settings(make_rollouts, make_ablation):
    alike = [record for n in (1, 2) for record in make_rollouts(n, 0, 1.0, settings={"model.width": "64"})]
    assert settings_warning(gather(alike)) is None
    assert settings_warning(gather(make_ablation())) is None
    other_target = make_rollouts(4, 0, 1.0, settings={"model.width": "32"}, target_policy="0.9x")
    assert settings_warning(gather([*alike, *other_target])) is None, "that is a curve of its own"
