import json

import pytest

from ringrl.errors import UserError
from ringrl.evaluation.records import EvaluationRecord
from ringrl.evaluation.scores import normalised_score
from ringrl.evaluation.summary import summarise, write_summary


def record(returns, stream: int = 0, **changes) -> EvaluationRecord:
    values = {
        "task": "walker_walk", "method": "at", "environment_seed": stream, "returns": returns,
        "test_trajectories": len(returns), "evaluation": "a", "steps_simulated": 10, "wall_seconds": 2.0,
    }  # fmt: skip
    return EvaluationRecord.model_validate(values | changes)


RECORDS = [
    record((100.0, 300.0), 0),
    record((200.0, None), 1),
    record((None, None), 2),
    record((50.0, 70.0), 0, context=False, wall_seconds=3.0),
    record((90.0, 10.0), 1, context=False, wall_seconds=3.0),
]


def test_what_one_evaluation_found():
    (found,) = summarise(RECORDS)
    assert found.returns == (150, 300)
    assert found.metrics == {"first": 150, "last": 300, "mean": 200, "best": 250}
    assert found.returns_without_context == (70, 40)
    assert found.metrics_without_context == {"first": 70, "last": 40, "mean": 55, "best": 80}
    assert found.scores["best"] == pytest.approx(float(normalised_score("walker_walk", 250.0)))
    assert (found.streams, found.episodes, found.failed, found.failed_without_context) == (3, 2, 3, 0)
    assert (found.streams_left_out, found.steps_simulated, found.wall_seconds) == (1, 50, 5.0)


def test_an_episode_that_failed_on_one_side_is_compared_on_neither():
    """Memory changes nothing; the first start is an easy one."""
    whole, cut = (900.0, 100.0), (900.0, None)
    (found,) = summarise(
        [record(cut, 0), record(whole, 1), record(whole, 0, context=False), record(whole, 1, context=False)]
    )
    assert found.returns == found.returns_without_context == (900, 100)
    assert found.metrics == found.metrics_without_context == {"first": 900, "last": 100, "mean": 700, "best": 900}
    assert (found.failed, found.failed_without_context) == (1, 0)


def test_evaluations_are_kept_apart_and_repeated_ones_replaced():
    other = record((1.0,), evaluation="b", task="my_own")
    again = record((110.0, 310.0), 0)
    old = record((5.0,), evaluation=None)
    first, second = summarise([old, *RECORDS, other, again])
    assert first.returns == (155, 310)
    assert second.returns == (1,)
    assert second.scores == {"first": None, "last": None, "mean": None, "best": None}
    assert second.metrics_without_context == {}


def test_where_all_failed_there_is_no_number():
    (found,) = summarise([record((None, None))])
    assert found.returns == (None, None)
    assert set(found.metrics.values()) == set(found.scores.values()) == {None}


def test_the_file_is_json_and_written_whole(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text("old")
    write_summary(path, RECORDS)
    (found,) = json.loads(path.read_text())["evaluations"]
    assert found["metrics"]["last"] == 300
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    with pytest.raises(UserError, match="cannot be written"):
        write_summary(tmp_path / "missing" / "evaluation.json", RECORDS)
