"""What the Ring Attention paper printed, beside what was measured."""

import pytest

from ringrl.study.report_cells import gather
from ringrl.study.report_published import PUBLISHED, PUBLISHED_METHODS, by_task, published, words


def test_the_means_are_those_of_the_paper():
    """The paper prints a mean over its tasks: a number that was copied wrongly would change it."""
    columns = zip(*PUBLISHED.values(), strict=True)
    means = [sum(column) / len(PUBLISHED) for column in columns]
    assert dict(zip(PUBLISHED_METHODS, means, strict=True)) == pytest.approx(
        {"BC-10%": 36.11, "DT": 45.51, "AT+BPT 32": 111.13, "AT+RA 128": 113.66}, abs=0.006
    )


def test_every_goal_of_the_arm_has_the_one_line():
    assert published("jaco_reach_top_left") == published("jaco_reach_bottom_right") == PUBLISHED["jaco_reach"]
    assert published("quadruped_walk") is None
    assert published("jaco_reacher") is None


def test_the_longest_context_stands_beside_the_published(make_ablation):
    sheet = by_task(gather([*make_ablation(), *make_ablation(task="quadruped_walk", seeds=1)]))
    names = [column.name for column in sheet.columns]
    assert names[:3] == ["Task", "Agentic Transformer", "Agentic Transformer, score"]
    assert names[-4:] == [f"{name}, published" for name in PUBLISHED_METHODS]
    cartpole, quadruped = sheet.rows
    assert cartpole[1].value == pytest.approx(618)
    assert 616 <= cartpole[1].interval.low < 618 < cartpole[1].interval.high <= 620
    assert [entry.value for entry in cartpole[-4:]] == list(PUBLISHED["cartpole_swingup"])
    assert quadruped[1].note == "", "one seed has no interval"
    assert [entry.value for entry in quadruped[-4:]] == [None] * 4


def test_the_unit_is_told_where_there_is_something_published(make_ablation):
    assert "does not say what they count" in words(gather(make_ablation()))[0]
    assert "jaco" in words(gather(make_ablation(task="jaco_reach_top_left")))[1]
    unknown = gather(make_ablation(task="quadruped_walk"))
    assert words(unknown) == []
    assert not any("published" in column.name for column in by_task(unknown).columns)
