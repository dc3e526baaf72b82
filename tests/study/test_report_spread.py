"""Profiles of all runs, and probabilities that one method beats another."""

import re

import pytest

from ringrl.evaluation.statistics import Estimate
from ringrl.study.figures import common
from ringrl.study.report_cells import gather
from ringrl.study.report_draw import panel_svg
from ringrl.study.report_spread import contenders, contest_chart, contests, profile_chart


def width(found: Estimate) -> float:
    """Of the interval."""
    assert found.interval is not None
    return found.interval.high - found.interval.low


def test_contests_by_hand(make_rollouts):
    """Of 3 x 3 pairs of runs, the longer context wins 6 and ties one."""
    records = [record for seed, level in enumerate((1.0, 2.0, 3.0)) for record in make_rollouts(1, seed, level)]
    records += [record for seed, level in enumerate((2.0, 4.0, 2.5)) for record in make_rollouts(4, seed, level)]
    (contest,) = contests(gather(records))
    assert contest.ours == "Agentic Transformer, 4 trajectories"
    assert contest.theirs == "Agentic Transformer, 1 trajectory"
    assert contest.found.value == pytest.approx((1.5 + 3 + 2) / 9)
    assert contest.found.interval is not None


def test_a_rollout_of_one_episode_is_no_model_of_one_trajectory(make_rollouts):
    records = [
        record
        for train, test, level in ((1, 1, 901.0), (1, 4, 881.0), (4, 1, 101.0), (4, 4, 501.0))
        for seed in range(3)
        for record in make_rollouts(
            test, seed, level + seed, train_trajectories=train, checkpoint_hash=f"{train} {seed}"
        )
    ]
    (contest,) = contests(gather(records))
    assert contest.ours == "Agentic Transformer, 4 trajectories"
    assert contest.theirs == "Agentic Transformer, trained on 4, rolled out for 1"


def test_every_method_with_a_context_meets_every_other(make_ablation, make_rollouts):
    others = [record for seed in range(5) for record in make_rollouts(4, seed, 100.0, method="ad")]
    pairs = {(one.ours, one.theirs) for one in contests(gather([*make_ablation(), *others]))}
    agentic, distilled = "Agentic Transformer, 4 trajectories", "Algorithm Distillation, 4 trajectories"
    assert pairs == {
        (agentic, "Agentic Transformer, 1 trajectory"), (distilled, agentic),
        (agentic, "Behaviour cloning"), (agentic, "Random policy"),
        (distilled, "Behaviour cloning"), (distilled, "Random policy"),
    }  # fmt: skip


def test_tasks_are_averaged_and_lengths_that_differ_are_named(make_ablation):
    grid = gather([*make_ablation(), *make_ablation(task="walker_walk", lengths=(1, 2), step=0.0)])
    contest = contests(grid)[0]
    assert contest.tasks == 2
    assert contest.ours == "Agentic Transformer, the longest context"
    assert contest.found.value == pytest.approx(1.0)  # the second task gains 10 per episode


def test_runs_measured_in_two_tasks_are_no_more_evidence_than_in_one(make_rollouts):
    """In the panel over all tasks and in the contests; the second task tells what the first one did."""

    def measured(tasks, shared):
        return gather(
            [
                record
                for task in tasks
                for n in (1, 4)
                for seed, level in enumerate((1.0, 9.0, 4.0, 12.0))
                for record in make_rollouts(
                    n, seed, level + n, task=task, checkpoint_hash=f"{n} {seed}" + ("" if shared else task)
                )
            ]
        )

    tasks = ["cheetah_run", "cheetah_run_backward"]
    (alone,) = contests(measured(tasks[:1], True))
    both, apart = measured(tasks, True), measured(tasks, False)
    assert contests(both)[0].found == alone.found
    assert width(contests(apart)[0].found) < width(alone.found)
    (variant,) = both.variants
    points = zip(common(both, variant, tasks), common(apart, variant, tasks), strict=True)
    assert all(width(together.found) > 1.1 * width(independent.found) for together, independent in points)


def test_one_seed_has_neither(make_ablation):
    grid = gather(make_ablation(seeds=1))
    assert contenders(grid) == []
    assert contests(grid) == []
    assert contest_chart(grid, []) is None
    assert profile_chart(grid) is None


def test_profiles_fall_from_one_to_nought(make_ablation):
    grid = gather([*make_ablation(), *make_ablation(task="walker_walk")])
    chart = profile_chart(grid)
    assert [panel.title for panel in chart.panels] == ["All tasks, normalised score", "cartpole_swingup", "walker_walk"]
    assert [key.label for key in chart.keys] == ["Agentic Transformer", "Behaviour cloning", "Random policy"]
    svg = panel_svg(chart.panels[1])
    line = max(re.findall(r'<path d="([^"]*)" clip-path', svg), key=len)
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", line)]
    assert heights == sorted(heights), "the fraction above never rises (heights grow downwards)"
    assert heights[-1] > heights[0]


def test_the_chart_of_contests_says_them_in_words(make_ablation):
    grid = gather(make_ablation())
    (panel,) = contest_chart(grid, contests(grid)).panels
    assert "Agentic Transformer, 4 trajectories over Behaviour cloning: 1.00" in panel.description
    assert "over Behaviour cloning</text>" in panel_svg(panel)
