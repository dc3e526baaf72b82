"""Settings that differ along a curve are told above it."""

from ringrl.study.report import write_report
from ringrl.study.report_cells import gather
from ringrl.study.report_settings import settings_warning


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


def test_nothing_is_said_of_equal_settings(make_rollouts, make_ablation):
    alike = [record for n in (1, 2) for record in make_rollouts(n, 0, 1.0, settings={"model.width": "64"})]
    assert settings_warning(gather(alike)) is None
    assert settings_warning(gather(make_ablation())) is None
    other_target = make_rollouts(4, 0, 1.0, settings={"model.width": "32"}, target_policy="0.9x")
    assert settings_warning(gather([*alike, *other_target])) is None, "that is a curve of its own"
