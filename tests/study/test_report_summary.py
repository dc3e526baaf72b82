"""The sentences at the top of the page say what the numbers say."""

import pytest

from ringrl.study.report_cells import gather
from ringrl.study.report_summary import summary


def test_context_that_helps(make_ablation):
    found = summary(gather(make_ablation(step=100)))
    assert found.headline == "A longer context helps."
    assert found.caution is None
    (verdict,) = found.verdicts
    assert verdict.kind == "helps"
    # n=4: 600 + 1 (streams) + 2 (middle seed) + 15 (gain over four episodes); n=1: 403
    assert verdict.returns == (pytest.approx(403), pytest.approx(618))
    assert "returns 618 with 4 trajectories of context and 403 with 1 trajectory: +215" in verdict.sentence
    assert "5 training seeds" in verdict.sentence
    assert "With its memory wiped before each episode it returns 393." in verdict.sentence
    (note,) = found.notes
    assert "random policy 30.0; behaviour cloning 333; the dataset's episodes 400 on average, 800 at best." in note
    assert "from 603 in the first of 4 episodes in context to 633 in the last" in note
    assert "From the same starts without memory it goes from 393 to 393." in note
    assert "best of 4 is 633, where the best of 4 tries without memory is 393" in note


def test_rolled_out_for_one_length_the_note_is_of_the_longest_trained(make_rollouts):
    records = []
    for seed in range(5):
        for trained, level in ((1, 100.0), (4, 500.0)):
            records += make_rollouts(4, seed, level + seed, gain=10.0, train_trajectories=trained)
    found = summary(gather(records))
    assert "from 503 in the first of 4 episodes in context to 533 in the last" in found.notes[0]
    (verdict,) = found.verdicts
    expected = "returns 518 with 4 trajectories of context and 118 when trained on 1 and rolled out for 4: +400"
    assert expected in verdict.sentence
    assert verdict.compared == "trained on 1 to 4, rolled out for 4"


def test_trained_on_one_length_the_rollouts_are_compared(make_rollouts):
    records = []
    for seed in range(5):
        for rolled_out, level in ((2, 100.0), (8, 500.0)):
            records += make_rollouts(rolled_out, seed, level + seed, train_trajectories=4)
    (verdict,) = summary(gather(records)).verdicts
    assert "returns 503 when trained on 4 and rolled out for 8 and 103 when" in verdict.sentence
    assert verdict.compared == "trained on 4, rolled out for 2 to 8"


def test_where_the_same_runs_are_compared_so_are_their_levels(make_rollouts):
    """A third seed, of the shorter rollouts alone, is no part of what the sentence compares."""
    short = [r for seed, level in ((0, 100), (1, 200), (2, 900)) for r in rolled(make_rollouts, 1, seed, level)]
    long = [r for seed, level in ((0, 150), (1, 250)) for r in rolled(make_rollouts, 4, seed, level)]
    (verdict,) = summary(gather([*short, *long])).verdicts
    assert verdict.returns == (151, 201)
    assert verdict.change is not None
    assert verdict.change.value == pytest.approx(50)
    assert (
        "returns 201 with 4 trajectories of context and 151 when trained on 4 and rolled out for 1" in verdict.sentence
    )


def rolled(make_rollouts, test: int, seed: int, level: float):
    """A model of four that is rolled out for so many."""
    changes = {"test_trajectories": test, "train_trajectories": 4, "checkpoint_hash": f"c{seed}"}
    return make_rollouts(test, seed, level, **changes)


def test_context_that_hurts(make_ablation):
    found = summary(gather(make_ablation(step=-100)))
    assert found.headline == "A longer context hurts."
    assert "−" in found.verdicts[0].sentence  # noqa: RUF001 (a true minus sign)


def test_no_difference(make_rollouts):
    records = [record for n in (1, 2) for seed in range(5) for record in make_rollouts(n, seed, 100 + 10 * seed)]
    found = summary(gather(records))
    assert found.headline == "A longer context makes no clear difference."
    assert "no more than training seeds differ" in found.verdicts[0].sentence


def test_few_seeds_are_worded_with_care(make_ablation):
    found = summary(gather(make_ablation(seeds=3)))
    assert found.headline == "A longer context seems to help."
    assert found.caution is not None
    assert "once in 10 times" in found.caution  # 2 of (6 choose 3) = 20 orders
    assert "once in 3 times" in str(summary(gather(make_ablation(seeds=2))).caution)


def test_one_seed_has_no_interval(make_ablation):
    found = summary(gather(make_ablation(seeds=1)))
    assert found.headline == "One training seed: too few to say whether context helps."
    assert found.verdicts[0].kind == "one seed"
    assert "may be chance" in found.verdicts[0].sentence
    assert "interval +" not in found.verdicts[0].sentence


def test_few_seeds_of_the_same_runs_agree_sooner(make_rollouts):
    """All gains of n runs have one sign by chance once in 2^(n - 1) times; two groups lie apart less often."""
    for seeds, said in ((3, "all 3 runs would still change alike once in 4 times"), (5, "once in 16 times"), (6, None)):
        records = [
            record
            for seed in range(seeds)
            for context in (True, False)
            for record in make_rollouts(4, seed, 500.0 + 20 * context + 100 * seed, context=context)
        ]
        found = summary(gather(records))
        assert found.headline == f"Memory across episodes {'seems to help' if said else 'helps'}."
        assert (found.caution is None) if said is None else (said in str(found.caution))


def test_memory_is_told_from_the_starts_that_have_a_control(make_rollouts):
    records = [record for seed in range(3) for record in make_rollouts(2, seed, 100)]
    records += [record.model_copy(update={"context": False}) for record in records]
    records += make_rollouts(2, 3, 900)
    found = summary(gather(records))
    assert "returns 101 with 2 trajectories of context and 101 when its memory is wiped" in found.verdicts[0].sentence
    assert "without memory" not in "".join(found.notes)


def test_one_length_is_judged_by_its_control(make_rollouts):
    records = []
    for seed in range(6):
        records += make_rollouts(4, seed, 500 + 100 * seed) + make_rollouts(4, seed, 480 + 100 * seed, context=False)
    found = summary(gather(records))
    # Seeds lie 100 apart, the gain of each is 20: only the comparison paired by seed can see it.
    assert found.headline == "Memory across episodes helps."
    assert "returns 751 with 4 trajectories of context and 731 when its memory is wiped" in found.verdicts[0].sentence
    assert "+20.0" in found.verdicts[0].sentence


def test_one_length_without_control(make_rollouts):
    found = summary(gather([record for seed in range(3) for record in make_rollouts(4, seed, 500)]))
    assert found.headline == "Only one context length was measured."
    assert found.verdicts[0].kind == "not compared"


def test_several_comparisons_are_counted(make_ablation):
    found = summary(gather([*make_ablation(), *make_ablation(task="walker_walk", step=0)]))
    assert found.headline == "A longer context helps in all 2 comparisons."  # longer streams gain 10 per episode
    flat = [record for record in make_ablation(task="walker_walk") if record.test_trajectories == 1]
    longer = [record.model_copy(update={"train_trajectories": 2}) for record in flat if record.method == "at"]
    found = summary(gather([*make_ablation(), *flat, *longer]))
    assert found.headline == "A longer context helps in 1 of 2 comparisons."


def test_what_helps_here_and_hurts_there_is_said_of_both(make_ablation):
    records = [
        *make_ablation(),
        *make_ablation(task="walker_walk", step=-100),
        *make_ablation(task="walker_run", step=-90),
    ]
    assert summary(gather(records)).headline == "A longer context helps in 1 of 3 and hurts in 2 of 3 comparisons."


def test_references_alone(make_ablation):
    records = [record for record in make_ablation() if record.method in ("random", "data")]
    assert summary(gather(records)).headline == "No method with a context was measured."
