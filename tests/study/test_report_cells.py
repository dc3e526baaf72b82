"""Records into cells."""

import io
import re
from datetime import UTC, datetime

import numpy as np
import pytest
from rich.console import Console

from ringrl.errors import UserError
from ringrl.study.report import write_report
from ringrl.study.report_cells import contrast, gather, series_of, strata, summarise
from ringrl.study.tables import rows, to_rich


def test_a_run_is_averaged_over_its_streams(make_rollouts):
    grid = gather([*make_rollouts(3, 0, 100, gain=10), *make_rollouts(3, 7, 200, gain=10)])
    (cell,) = grid.cells
    assert (cell.task, cell.train, cell.test, cell.seeds, cell.episodes) == ("cartpole_swingup", 3, 3, (0, 7), 12)
    np.testing.assert_allclose(cell.runs("first"), [101, 201])  # streams start at 100 and 102
    np.testing.assert_allclose(cell.runs("mean"), [111, 211])
    np.testing.assert_allclose(cell.runs("last"), [121, 221])
    np.testing.assert_allclose(cell.runs("best"), [121, 221])
    np.testing.assert_allclose(cell.episode_runs(), [[101, 201], [111, 211], [121, 221]])


def test_a_run_is_of_one_checkpoint_the_one_evaluated_last(make_rollouts):
    """Four streams of a checkpoint, and then two of an earlier one: these alone count, and the page says so."""
    later = datetime(2100, 1, 1, tzinfo=UTC)
    old = [*make_rollouts(2, 0, 800, checkpoint_hash="a")]
    old += [record.model_copy(update={"environment_seed": record.environment_seed + 10}) for record in old]
    new = make_rollouts(2, 0, 100, checkpoint_hash="b", created=later)
    for records in ([*old, *new], [*new, *old]):
        grid = gather(records)
        (cell,) = grid.cells
        np.testing.assert_allclose(cell.runs(), [101])
        assert (cell.episodes, grid.superseded, grid.displaced) == (4, 4, 4)


def test_without_a_context_the_control_is_no_further_evidence(make_rollouts):
    streams = make_rollouts(1, 0, 300, method="bc", train_trajectories=None)
    older = [r.model_copy(update={"target_policy": "data_best", "target_return": 5.0}) for r in streams]
    control = [record.model_copy(update={"context": False}) for record in streams]
    (cell,) = gather([*older, *streams, *control]).cells
    assert cell.episodes == len(streams), "nor is what was measured before targets were told otherwise"


def test_the_control_stands_beside_its_rollout(make_rollouts):
    grid = gather([*make_rollouts(2, 0, 100), *make_rollouts(2, 0, 50, context=False), *make_rollouts(4, 0, 100)])
    with_control, without = grid.cells
    np.testing.assert_allclose(with_control.control_runs(), [51])
    np.testing.assert_allclose(with_control.control_episode_runs(), [[51], [51]])
    assert len(without.control_runs()) == len(without.control_episode_runs()) == 0
    assert grid.unmatched == 0


def test_episodes_that_failed_are_counted_and_in_no_mean(make_rollouts):
    """Two streams at 100 and 102, which gain 10 an episode, and what is left of them in each seed."""
    whole, cut, gone, control = (make_rollouts(3, seed, 100, gain=10) for seed in (0, 1, 2, 0))
    cut = [cut[0], cut[1].model_copy(update={"returns": (500.0, None, None)})]
    gone = [record.model_copy(update={"returns": (None, None, None)}) for record in gone]
    control = [record.model_copy(update={"context": False, "returns": (90.0, 92.0, None)}) for record in control]
    grid = gather([*whole, *cut, *gone, *control])
    (cell,) = grid.cells
    assert (cell.seeds, cell.episodes, cell.failed, grid.left_out) == ((0, 1), 10, 2 + 6 + 2, 2)
    np.testing.assert_allclose(cell.runs("first"), [101, 300])
    np.testing.assert_allclose(cell.runs("mean"), [111, (110 + 500) / 2])
    np.testing.assert_allclose(cell.runs("best"), [121, (120 + 500) / 2])
    np.testing.assert_allclose(cell.runs("last"), [121, 120])  # of the stream that has one
    np.testing.assert_allclose(cell.episode_runs(), [[101, 300], [111, 110], [121, 120]])
    assert len(cell.control_runs()) == 0, "the control of some seeds does not stand beside all of them"
    assert grid.unmatched == 2
    np.testing.assert_allclose(cell.beside_control(), [[106], [91]])  # of the two episodes that have a return in both


@pytest.mark.parametrize("cut", ["rollout", "control"])
def test_an_episode_that_failed_on_one_side_counts_on_neither(cut, make_rollouts):
    """Memory changes nothing; the first start is an easy one, and one stream fails behind it."""
    both = [record for context in (True, False) for record in make_rollouts(3, 0, 0, context=context)]
    both = [record.model_copy(update={"returns": (900.0, 100.0, 100.0)}) for record in both]
    index = {"rollout": 0, "control": 3}[cut]
    both[index] = both[index].model_copy(update={"returns": (900.0, None, None)})
    grid = gather(both)
    (cell,) = grid.cells
    assert (cell.failed, grid.unmatched) == (2, 0)
    for metric in ("first", "last", "mean", "best"):
        np.testing.assert_allclose(cell.runs(metric), cell.control_runs(metric), err_msg=metric)
    np.testing.assert_allclose(cell.runs(), [(900 + 1100 / 3) / 2])
    np.testing.assert_allclose(cell.episode_runs(), cell.control_episode_runs())
    np.testing.assert_allclose(*cell.beside_control())


def test_a_control_that_leaves_nothing_of_a_seed_is_not_beside_it(make_rollouts):
    rollout = make_rollouts(2, 0, 100)
    control = [r.model_copy(update={"context": False, "returns": (None, None)}) for r in rollout]
    grid = gather([*rollout, *control])
    (cell,) = grid.cells
    np.testing.assert_allclose(cell.runs(), [101])
    assert (cell.control, cell.failed) == ({}, 4)


def test_a_control_stands_beside_the_same_starts_alone(make_rollouts):
    """Memory changes nothing, but its rollouts have easy starts besides, or an easy seed."""
    both = [record for context in (True, False) for record in make_rollouts(2, 0, 100, context=context)]
    easy = [record.model_copy(update={"environment_seed": record.environment_seed + 2}) for record in both[:2]]
    easy = [record.model_copy(update={"returns": (900.0, 900.0)}) for record in easy]
    for more in (easy, make_rollouts(2, 1, 900)):
        grid = gather([*both, *more])
        (cell,) = grid.cells
        assert cell.runs().max() >= 500
        np.testing.assert_allclose(cell.beside_control(), [[101], [101]])
        assert (len(cell.control_runs()), grid.unmatched) == (0, 2)
    (cell,) = gather(both).cells
    np.testing.assert_allclose(cell.control_runs(), [101])
    first_failed = [both[0].model_copy(update={"returns": (None, None)}), *both[1:]]
    (cell,) = gather(first_failed).cells
    np.testing.assert_allclose(
        cell.beside_control(), [[102], [102]], err_msg="a stream that has no return pairs with none"
    )


def test_a_run_of_two_prompts_or_lengths_is_of_one_checkpoint(make_rollouts):
    later = datetime(2100, 1, 1, tzinfo=UTC)
    new = {"checkpoint_hash": "b", "created": later}
    old = make_rollouts(2, 0, 100, checkpoint_hash="a", prompt_trajectories=1, prompt_seed=0)
    grid = gather([*old, *make_rollouts(2, 0, 900, prompt_trajectories=1, prompt_seed=1, **new)])
    np.testing.assert_allclose(grid.cells[0].runs(), [901])
    assert grid.displaced == 2
    old = make_rollouts(1, 0, 100, checkpoint_hash="a", train_trajectories=2)
    grid = gather([*old, *make_rollouts(2, 0, 900, **new)])
    assert [(cell.test, grid.displaced) for cell in grid.cells] == [(2, 2)]
    for asked in (
        {"prompt_trajectories": 1, "prompt_seed": 0},
        {"target_policy": "given"},
        {"cache_dtype": "bfloat16"},
    ):
        grid = gather([*make_rollouts(2, 0, 800, checkpoint_hash="a", **asked), *make_rollouts(2, 0, 300, **new)])
        assert ([cell.runs().tolist() for cell in grid.cells], grid.displaced) == ([[301]], 2), asked
    elsewhere = make_rollouts(2, 0, 800, checkpoint_hash="a", task="walker_walk", train_task="cartpole_swingup")
    grid = gather([*elsewhere, *make_rollouts(2, 0, 300, **new)])
    assert [cell.task for cell in grid.cells] == ["cartpole_swingup"]


def test_a_metric_that_no_stream_came_to_is_absent_everywhere(make_rollouts, write_results, tmp_path):
    records = [record.model_copy(update={"returns": (5.0, None)}) for record in make_rollouts(2, 0, 0)]
    (row,) = rows(gather(records))
    assert (row.first, row.last, row.best, row.failed) == (5, None, 5, 2)
    page = write_report([write_results(records)], tmp_path / "report").read_text()
    assert "Failed" in page
    assert not re.search(r"[>\"\s]nan[<\"\s]", page.lower())
    shown = io.StringIO()
    Console(file=shown, width=100).print(to_rich([row]))
    assert "Failed" in shown.getvalue()


def test_prompted_rollouts_and_those_in_another_task_are_told_apart(make_rollouts):
    records = [
        *make_rollouts(2, 0, 1),
        *make_rollouts(2, 0, 2, prompt_trajectories=3, prompt_seed=0),
        *make_rollouts(2, 0, 3, train_task="cartpole_balance"),
    ]
    grid = gather(records)
    names = {grid.name(cell.variant): cell.runs()[0] for cell in grid.cells}
    assert names == {
        "Agentic Transformer": 2,
        "Agentic Transformer, prompted with 3": 3,
        "Agentic Transformer, trained on cartpole_balance": 4,
    }


def test_a_control_alone_is_counted_not_shown(make_rollouts):
    grid = gather([*make_rollouts(2, 0, 100), *make_rollouts(8, 0, 50, context=False)])
    assert [cell.test for cell in grid.cells] == [2]
    assert grid.unmatched == 2


def test_methods_without_context_are_references(make_ablation):
    grid = gather(make_ablation())
    assert [cell.variant.method for cell in grid.references("cartpole_swingup")] == ["random", "bc"]
    assert [variant.method for variant in grid.variants] == ["at"]
    assert len(grid.data["cartpole_swingup"]) == 101


def test_a_method_trained_without_context_is_a_reference_too(make_rollouts):
    grid = gather(make_rollouts(1, 0, 300, method="bc10", train_trajectories=None))
    assert grid.variants == ()
    assert grid.name(grid.cells[0].variant) == "bc10"


def test_the_newer_of_two_measurements_counts(make_rollouts):
    old = make_rollouts(2, 0, 100, created=datetime(2025, 1, 1, tzinfo=UTC), checkpoint_hash="another")
    new = make_rollouts(2, 0, 300, created=datetime(2025, 1, 2, tzinfo=UTC), steps_trained=4000)
    grid = gather([*new, *old])  # whatever their order
    assert (grid.superseded, grid.displaced) == (2, 2)
    np.testing.assert_allclose(grid.cells[0].runs(), [301])


def test_results_of_different_datasets_are_not_mixed(make_rollouts):
    with pytest.raises(UserError, match=r"cartpole_swingup: .*different datasets \(aaa and bbb\)"):
        gather([*make_rollouts(1, 0, 1, data_fingerprint="aaa"), *make_rollouts(1, 1, 1, data_fingerprint="bbb")])


def test_names_tell_variants_apart_only_where_needed(make_rollouts):
    alone = gather(make_rollouts(1, 0, 1))
    assert alone.name(alone.variants[0]) == "Agentic Transformer"
    both = gather([*make_rollouts(1, 0, 1), *make_rollouts(1, 0, 1, token_set="dt3")])
    names = [both.name(variant) for variant in both.variants]
    assert names == ["Agentic Transformer, dt3", "Agentic Transformer, ring4"]
    targets = gather([*make_rollouts(1, 0, 1), *make_rollouts(1, 0, 1, target_policy="own")])
    assert "Agentic Transformer, target own" in {targets.name(variant) for variant in targets.variants}


def test_a_decision_transformer_is_the_first_point_of_the_agentic_one(make_rollouts):
    agentic = [record for length in (2, 4) for record in make_rollouts(length, 0, 1)]
    same = make_rollouts(1, 0, 1, method="dt")
    (series,) = series_of(gather([*agentic, *same]).cells)
    assert [length for length, _ in series.points] == [1, 2, 4]
    other = make_rollouts(1, 0, 1, method="dt", token_set="dt3")
    assert {variant.method for variant in gather([*agentic, *other]).variants} == {"at", "dt"}
    assert {variant.method for variant in gather(same).variants} == {"dt"}


def test_given_targets_are_told_apart(make_rollouts):
    records = [
        record
        for target in (500.0, 848.3331, 848.3333)
        for record in make_rollouts(2, 0, 1, target_policy="given", target_return=target)
    ]
    grid = gather(records)
    names = [grid.name(variant) for variant in grid.variants]
    assert names == [f"Agentic Transformer, target given {target}" for target in ("500", "848.3331", "848.3333")]
    assert grid.superseded == 0


def test_the_best_share_of_behaviour_cloning_is_named(make_rollouts):
    grid = gather(make_rollouts(1, 0, 300, method="bc-10%", train_trajectories=None))
    assert grid.name(grid.cells[0].variant) == "Behaviour cloning, best 10%"


def test_curves_over_training_lengths(make_rollouts):
    grid = gather([record for length in (4, 1, 2) for record in make_rollouts(length, 0, 1)])
    (series,) = series_of(grid.cells)
    assert [length for length, _ in series.points] == [1, 2, 4]
    assert series.train is None


def test_curves_over_rollout_lengths(make_rollouts):
    records = [
        record for train in (2, 8) for test in (4, 1) for record in make_rollouts(test, 0, 1, train_trajectories=train)
    ]
    first, second = series_of(gather(records).cells)
    assert (first.train, second.train) == (2, 8)
    assert [length for length, _ in first.points] == [1, 4]


def test_estimates_are_the_same_every_time():
    runs = np.array([1.0, 2, 4, 8])
    assert summarise(runs) == summarise(runs)


@pytest.mark.parametrize("same", [True, False])
def test_the_same_runs_are_compared_run_by_run(make_rollouts, same):
    """Runs lie 100 apart and each changes by 10: plain where they are the same, nothing where they are not."""
    records = [
        record
        for length in (1, 4)
        for seed in range(5)
        for record in make_rollouts(
            length, seed, 100.0 * seed + 10 * (length > 1), train_trajectories=4 if same else length,
            checkpoint_hash=str(seed) if same else f"{seed} {length}",
        )
    ]  # fmt: skip
    shorter, longer = gather(records).cells
    found = contrast(longer, shorter)
    assert found == contrast(longer, shorter)
    assert (found.paired, found.change.value, found.change.runs) == (same, pytest.approx(10), 5)
    assert found.change.interval is not None
    assert (0 in found.change.interval) is not same
    # Of 25 pairs of runs the longer wins 15, whoever they are; drawn together they never win less than half.
    assert found.wins.value == pytest.approx(15 / 25)
    assert found.wins.interval is not None
    assert (found.wins.interval.low > 0.5) is same


def test_untold_checkpoints_are_never_the_same_run(make_rollouts):
    records = [r for length in (1, 4) for r in make_rollouts(length, 0, 1, train_trajectories=4, checkpoint_hash=None)]
    one, other = gather(records).cells
    assert not contrast(one, other).paired


def test_results_of_another_cache_are_told_apart(make_rollouts):
    grid = gather([*make_rollouts(2, 0, 1.0), *make_rollouts(2, 0, 2.0, cache_dtype="bfloat16")])
    assert grid.superseded == 0
    assert [grid.name(variant) for variant in grid.variants] == [
        "Agentic Transformer", "Agentic Transformer, cache in bfloat16",
    ]  # fmt: skip


def test_a_run_measured_in_several_tasks_is_drawn_once(make_rollouts):
    """Perfectly correlated tasks tell no more than one of them; those of other runs stay strata of their own."""
    tasks = ("cartpole_swingup", "walker_walk", "cheetah_run")
    hashes = [[f"{seed}" for seed in range(4)]] * 2 + [[f"other {seed}" for seed in range(4)]]
    records = [
        record
        for task, told in zip(tasks, hashes, strict=True)
        for seed in range(4)
        for record in make_rollouts(2, seed, 10.0 * seed, task=task, checkpoint_hash=told[seed])
    ]
    swingup, walk, run = (gather(records).cells[i] for i in (0, 2, 1))
    assert (swingup.task, walk.task, run.task) == tasks
    one, same, apart = strata([swingup]), strata([swingup, walk]), strata([swingup, run, walk])
    assert (one.together, same.together, apart.together) == ([0], [0, 0], [0, 1, 0])
    assert summarise(*same.runs, together=same.together) == summarise(*one.runs)
    incomplete = [record for record in records if (record.task, record.seed) != ("walker_walk", 1)]
    cells = [cell for cell in gather(incomplete).cells if cell.task != run.task]
    assert [runs.tolist() for runs in strata(cells).runs] == [[1, 21, 31]] * 2, "a run that lacks a task counts in none"
    unnamed = gather([record.model_copy(update={"checkpoint_hash": None}) for record in records]).cells
    assert strata(unnamed).together == [0, 1, 2]
