"""Normalised scores and summaries."""

import json
from pathlib import Path

import numpy as np
import pytest

from ringrl.envs import TASKS, domain_of, make
from ringrl.errors import UserError
from ringrl.evaluation.records import EvaluationRecord
from ringrl.evaluation.scores import normalised_score, score_or_none, summarise, write_summary


def test_the_random_return_scores_0_and_the_bound_100():
    for task in TASKS:
        domain = domain_of(task)
        fixed = domain.random_returns[task], domain.reference_return
        assert 0 <= fixed[0] < fixed[1] == domain.episode_length
        np.testing.assert_allclose(normalised_score(task, np.array(fixed)), [0, 100])


def test_by_hand():
    random = 32.7
    assert normalised_score("walker_walk", 500.0) == pytest.approx(100 * (500 - random) / (1000 - random))
    assert normalised_score("jaco_reach_top_left", 250.0) == pytest.approx(100)
    assert normalised_score("walker_walk", 0.0) < 0  # worse than random is possible


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="walker_wlak"):
        normalised_score("walker_wlak", 1.0)


@pytest.mark.parametrize(
    ("task", "episodes", "margin"),
    [
        ("cartpole_swingup", 10, 25.0),
        ("cheetah_run", 4, 3.0),
        ("walker_stand", 3, 30.0),
        ("jaco_reach_top_left", 12, 25.0),
    ],
)
def test_random_returns_agree_with_the_environments(task, episodes, margin):
    """A few episodes of the real environment; the margin is about four of their standard errors."""
    environment = make(task, seed=11)
    generator = np.random.default_rng(11)
    total = 0.0
    for _ in range(episodes):
        environment.reset()
        for action in generator.uniform(-1, 1, (domain_of(task).episode_length, *environment.action_space.shape)):
            total += float(environment.step(action.astype(np.float32))[1])
    assert total / episodes == pytest.approx(domain_of(task).random_returns[task], abs=margin)


def test_without_a_return_or_constants_there_is_no_score() -> None:
    assert score_or_none("cartpole_balance_sparse", 49.6) == 0.0
    assert score_or_none("cartpole_balance_sparse", None) is None
    assert score_or_none("a_task_of_ones_own", 3.0) is None


def record(returns, stream: int = 0, **changes) -> EvaluationRecord:
    values = {
        "task": "walker_walk", "method": "at", "environment_seed": stream, "returns": returns,
        "test_trajectories": len(returns), "evaluation": "a",
    }  # fmt: skip
    return EvaluationRecord.model_validate(values | changes)


RECORDS = [
    record((100.0, 300.0), 0),
    record((200.0, None), 1),
    record((None, None), 2),
    record((50.0, 70.0), 0, context=False),
    record((90.0, 10.0), 1, context=False),
]


def test_the_summary_of_one_evaluation():
    (found,) = summarise(RECORDS)
    assert found.returns == (150, 300)
    assert found.metrics == {"first": 150, "last": 300, "mean": 200, "best": 250}
    assert found.returns_without_context == (70, 40)
    assert found.metrics_without_context == {"first": 70, "last": 40, "mean": 55, "best": 80}
    assert summarise([record((1.0, 5.0, 3.0), 0), record((4.0, 2.0, None), 1)])[0].metrics == {
        "first": 2.5, "last": 3, "mean": 3, "best": 4.5
    }  # fmt: skip
    assert found.scores["best"] == pytest.approx(float(normalised_score("walker_walk", 250.0)))
    assert (found.streams, found.episodes, found.failed, found.failed_without_context) == (3, 2, 3, 0)


def test_an_episode_that_failed_with_or_without_memory_is_left_out_of_both():
    """Memory changes nothing here; the first start is easier."""
    whole, cut = (900.0, 100.0), (900.0, None)
    (found,) = summarise(
        [record(cut, 0), record(whole, 1), record(whole, 0, context=False), record(whole, 1, context=False)]
    )
    assert found.returns == found.returns_without_context == (900, 100)
    assert found.metrics == found.metrics_without_context == {"first": 900, "last": 100, "mean": 700, "best": 900}
    assert (found.failed, found.failed_without_context) == (1, 0)


def test_evaluations_are_summarised_separately_and_repeated_records_replaced():
    other = record((1.0,), evaluation="b", task="my_own")
    again = record((110.0, 310.0), 0)
    old = record((5.0,), evaluation=None)
    first, second = summarise([old, *RECORDS, other, again])
    assert first.returns == (155, 310)
    assert second.returns == (1,)
    assert second.scores == {"first": None, "last": None, "mean": None, "best": None}
    assert second.metrics_without_context == {}


def test_without_a_finished_episode_there_is_no_number():
    (found,) = summarise([record((None, None))])
    assert found.returns == (None, None)
    assert set(found.metrics.values()) == set(found.scores.values()) == {None}


def test_the_summary_file_is_json_and_replaced_whole(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    path.write_text("old")
    write_summary(path, RECORDS)
    (found,) = json.loads(path.read_text())["evaluations"]
    assert found["metrics"]["last"] == 300
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    with pytest.raises(UserError, match="cannot be written"):
        write_summary(tmp_path / "missing" / "evaluation.json", RECORDS)
