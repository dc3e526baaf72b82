"""The sentences at the top of the page follow from the numbers."""

import numpy as np
import pandas as pd
import pytest

from ringrl.report.conclusion import (
    LENGTH,
    MEMORY,
    RIVAL,
    against_rivals,
    headline,
    judge,
    settings_warning,
    starts_warning,
    verdicts,
)
from ringrl.report.results import tabulate
from ringrl.report.tables import prompt_returns, returns_table, tasks_like_random


class Summary:
    """Conclusion of some records."""

    def __init__(self, records) -> None:
        results = tabulate(records)
        table = returns_table(results)
        found = verdicts(results, table)
        self.like_random = tasks_like_random(results, table)
        self.headline = headline(found, self.like_random)
        subjects = found["subject"]
        self.memory = found[subjects == MEMORY].to_dict("records")
        others = (RIVAL, MEMORY) if (subjects == LENGTH).any() else (RIVAL,)
        self.verdicts = found[~subjects.isin(others)].to_dict("records")
        self.rivals, self.against_rivals = found[found["subject"] == RIVAL], against_rivals(found, self.like_random)
        self.warnings = starts_warning(results, table), settings_warning(results, table)


def test_context_that_helps(make_ablation):
    found = Summary(make_ablation(step=100))
    assert found.headline == "A longer context helps."
    (verdict,) = found.verdicts
    assert verdict["verdict"] == "higher"
    # n=4: 600 + 1 (streams) + 2 (middle seed) + 15 (gain over four episodes); n=1: 403
    assert (verdict["before"], verdict["after"]) == (pytest.approx(403), pytest.approx(618))
    assert (verdict["compared"], verdict["seeds"]) == ("1 trajectory to 4 trajectories", 5)
    assert [row["compared"] for row in found.memory] == ["memory reset to kept, 4 trajectories"]
    assert [verdict[name] for name in ("change", "low", "high")] == pytest.approx([215] * 3)


@pytest.mark.parametrize(("level", "answer"), [(300.0, "A policy"), (395.0, "No policy")])
def test_a_context_is_compared_with_methods_without_one(make_rollouts, level: float, answer: str):
    """Noise of 20 between seeds; the control of a variant is the method without it."""
    records = []
    for seed, (noise, other) in enumerate(((-20, 15), (10, -15), (0, 20), (20, 0), (-10, -20))):
        settings = {"variant": "window", "settings": {"model.episode_window": "20"}}
        records += make_rollouts(4, seed, 400.0 + noise, **settings)
        records += make_rollouts(4, seed, 390.0 - noise)
        reference = {"method": "bc", "token_set": None, "train_trajectories": None, "target_return": None}
        records += make_rollouts(1, seed, level + other, **reference)
        records += make_rollouts(1, seed, 300.0 + other, **reference | {"method": "td3"})
    records += make_rollouts(1, 0, 5.0, **reference | {"method": "random"})
    found = Summary(records)
    rivals = found.rivals.set_index(["method", "compared"])["verdict"].to_dict()
    base, variant = "Agentic Transformer", "Agentic Transformer, window"
    expected = "higher" if level == 300 else "not resolved"
    assert rivals == {
        (base, "Behaviour cloning to 4 trajectories"): expected,
        (base, "TD3 to 4 trajectories"): "higher",
        (variant, "Behaviour cloning to 4 trajectories"): expected,
        (variant, "TD3 to 4 trajectories"): "higher",
        (variant, "Agentic Transformer to 4 trajectories"): "not resolved",
    }
    assert found.against_rivals == (
        f"{answer} with context clearly returns more than every method that it is compared with on cartpole_swingup."
    )
    changes = found.rivals["change"].abs().tolist()
    assert changes == sorted(changes, reverse=True), "the largest difference comes first"


def test_rolled_out_for_one_length_the_training_lengths_are_compared(make_rollouts):
    records = []
    for seed in range(5):
        for trained, level in ((1, 100.0), (4, 500.0)):
            records += make_rollouts(4, seed, level + seed, gain=10.0, train_trajectories=trained)
    found = Summary(records)
    (verdict,) = found.verdicts
    assert (verdict["before"], verdict["after"]) == (pytest.approx(118), pytest.approx(518))
    assert verdict["compared"] == "trained on 1 to 4, rolled out for 4"


def test_trained_on_one_length_the_rollouts_are_compared(make_rollouts):
    records = []
    for seed in range(5):
        for rolled_out, level in ((2, 100.0), (8, 500.0)):
            records += make_rollouts(rolled_out, seed, level + seed, train_trajectories=4)
    (verdict,) = Summary(records).verdicts
    assert (verdict["before"], verdict["after"]) == (pytest.approx(103), pytest.approx(503))
    assert verdict["compared"] == "trained on 4, rolled out for 2 to 8"


def test_where_the_same_runs_are_compared_so_are_their_levels(make_rollouts):
    """A third seed, of the shorter rollouts alone, is no part of the comparison."""
    short = [r for seed, level in ((0, 100), (1, 200), (2, 900)) for r in rolled(make_rollouts, 1, seed, level)]
    long = [r for seed, level in ((0, 150), (1, 250)) for r in rolled(make_rollouts, 4, seed, level)]
    (verdict,) = Summary([*short, *long]).verdicts
    assert (verdict["before"], verdict["after"], verdict["change"]) == (151, 201, pytest.approx(50))
    assert verdict["compared"] == "trained on 4, rolled out for 1 to 4"


def rolled(make_rollouts, test: int, seed: int, level: float):
    """Rollouts of `test` episodes by a policy trained on contexts of four."""
    changes = {"test_trajectories": test, "train_trajectories": 4, "checkpoint_hash": f"c{seed}"}
    return make_rollouts(test, seed, level, **changes)


def test_context_that_hurts(make_ablation):
    found = Summary(make_ablation(step=-100))
    assert found.headline == "A longer context hurts."
    assert found.verdicts[0]["change"] < 0


def noisy(make_rollouts, gain: float, seeds: int, **changes):
    """Two lengths: the longer one returns `gain` more, give or take 20 by seed."""
    return [
        record
        for seed in range(seeds)
        for length in (1, 2)
        for record in make_rollouts(length, seed, 300 + (length == 2) * (gain + 20 * (-1) ** seed), **changes)
    ]


def test_a_difference_within_the_noise_is_not_resolved(make_rollouts):
    found = Summary(noisy(make_rollouts, 5, 6))
    assert found.headline == "It is not resolved whether a longer context helps."
    (verdict,) = found.verdicts
    # The standard deviation of six differences of +-20 is 20 sqrt(6 / 5), so the standard error is 8.94; 2.571 + 0.920.
    assert (verdict["verdict"], verdict["detectable"]) == ("not resolved", pytest.approx(31.2, abs=0.05))


def test_a_difference_beyond_the_noise_has_a_direction(make_rollouts):
    assert Summary(noisy(make_rollouts, 60, 6)).headline == "A longer context helps."
    assert Summary(noisy(make_rollouts, -60, 6)).headline == "A longer context hurts."


@pytest.mark.parametrize(("seeds", "step"), [(1, 100), (2, -100), (3, 100)])
def test_fewer_than_four_seeds_never_have_a_direction(seeds, step, make_ablation):
    found = Summary(make_ablation(seeds=seeds, step=step))
    assert found.headline == "Fewer than 4 training seeds a side cannot show whether a longer context helps."
    (verdict,) = found.verdicts
    assert verdict["verdict"] == "not resolved"
    assert np.isnan([verdict["low"], verdict["detectable"]]).tolist() == [seeds == 1] * 2
    assert found.against_rivals == ""


def test_few_seeds_of_some_comparisons_are_named_first(make_ablation):
    records = [*make_ablation(), *make_ablation(task="walker_walk", seeds=3, step=-100)]
    good = [r.model_copy(update={"returns": (2000.0,)}) if r.method == "random" and r.task == "walker_walk" else r
            for r in records]  # fmt: skip
    for found in (Summary(records), Summary(good)):
        assert found.headline == (
            "1 of 2 comparisons has fewer than 4 training seeds a side. A longer context helps in 1 of 2 comparisons."
        )


def test_without_a_policy_that_beats_random_there_is_no_direction(make_ablation, make_rollouts):
    records = [r for r in make_ablation() if r.method not in ("random", "bc")]
    random = {"method": "random", "train_trajectories": None, "target_return": None, "target_policy": None}
    assert Summary(records).headline == "A longer context helps."
    low, high = (make_rollouts(1, 0, level, **random) for level in (401.0, 900.0))
    assert Summary([*records, *low]).headline == "A longer context helps."
    assert Summary([*records, *high]).headline == (
        "No policy clearly beats the random policy, so these results cannot show whether a longer context helps."
    )
    weak = [r.model_copy(update={"returns": tuple(x / 100 for x in r.returns)}) for r in records if r.method == "at"]
    assert Summary(weak).like_random == ["cartpole_swingup"], "known without a measurement: 15 to 20"


def test_one_of_many_policies_does_not_beat_random_by_chance(make_rollouts):
    random = {"method": "random", "train_trajectories": None, "target_return": None, "target_policy": None}
    levels = {"lucky": (0.2, 1.5, 2.2, 0.6, 2.5), **{f"v{k}": (-2.0, -1.0, 0.1, 1.0, 2.0) for k in range(8)}}
    records = make_rollouts(1, 0, 0.0, **random) + [
        record
        for name, of in levels.items()
        for seed, level in enumerate(of)
        for record in make_rollouts(1, seed, level, variant=name)
    ]
    assert Summary([r for r in records if r.variant in (None, "lucky")]).like_random == []
    assert Summary(records).like_random == ["cartpole_swingup"]


def test_only_tasks_with_a_policy_that_beats_random_count(make_ablation):
    """A longer context helps on both tasks, and the cloned policy loses on both; on one all are worse than random."""
    records = [*make_ablation(), *make_ablation(task="walker_walk")]
    raised = [
        record.model_copy(update={"returns": (2000.0,)})
        if (record.task, record.method) == ("walker_walk", "random") else record
        for record in records
    ]  # fmt: skip
    found = Summary(raised)
    assert found.headline == (
        "No policy clearly beats the random policy on walker_walk. A longer context helps in 1 of 2 comparisons."
    )
    assert found.against_rivals.endswith("compared with on cartpole_swingup.")
    everywhere = [r.model_copy(update={"returns": (2000.0,)}) if r.method == "random" else r for r in records]
    assert Summary(everywhere).against_rivals == ""
    assert Summary(records).headline == "A longer context helps in both comparisons."


def test_the_whole_table_is_corrected():
    """A p-value of 0.02 counts alone, and not as the larger of three."""
    row = {"change": 50.0, "low": 10.0, "high": 90.0, "seeds": 5, "p": 0.02}
    assert judge(pd.DataFrame([row]))["verdict"].tolist() == ["higher"]
    none = {"p": np.nan, "change": np.nan}
    lower = {"p": 0.001, "change": -60.0, "low": -90.0, "high": -9.0}
    found = judge(pd.DataFrame([row | none, row, row | {"p": 0.9}, row | lower]))
    assert found["change"].tolist()[:3] == [-60, 50, 50], "the largest difference first, whatever its sign"
    assert found["p_holm"].tolist()[:3] == pytest.approx([0.003, 0.04, 0.9])
    assert found["verdict"].tolist() == ["lower", "higher", "not resolved", "not compared"]
    assert judge(pd.DataFrame([row] * 3))["verdict"].tolist() == ["not resolved"] * 3
    across_zero = judge(pd.DataFrame([row | {"low": -1.0}]))
    assert across_zero["verdict"].tolist() == ["not resolved"], "the interval must exclude zero too"


def test_equal_seeds_are_compared_seed_by_seed(make_rollouts):
    """Seeds differ by 100 and the longer context returns 20 more for each, which only pairs can show."""
    records = [r for s in range(5) for n in (1, 2) for r in make_rollouts(n, s, 100.0 * s + 20 * n)]
    (verdict,) = Summary(records).verdicts
    assert (verdict["paired"], verdict["verdict"], verdict["change"]) == (True, "higher", pytest.approx(20))
    (verdict,) = Summary([*records, *make_rollouts(2, 5, 300.0)]).verdicts
    assert (verdict["paired"], verdict["verdict"], verdict["seeds"]) == (False, "not resolved", 5)


def test_memory_is_told_from_the_starts_that_have_a_control(make_rollouts):
    records = [record for seed in range(3) for record in make_rollouts(2, seed, 100)]
    records += [record.model_copy(update={"context": False}) for record in records]
    records += make_rollouts(2, 3, 900)
    found = Summary(records)
    assert (found.verdicts[0]["before"], found.verdicts[0]["after"]) == (101, 101)


def test_one_length_is_judged_by_its_control(make_rollouts):
    records = []
    for seed in range(6):
        records += make_rollouts(4, seed, 500 + 100 * seed) + make_rollouts(4, seed, 480 + 100 * seed, context=False)
    found = Summary(records)
    # Seeds differ by 100 and the gain of each is 20, so only a comparison paired by seed can find it.
    assert found.headline == "Memory across episodes helps."
    (verdict,) = found.verdicts
    assert (verdict["compared"], verdict["change"]) == ("memory reset to kept, 4 trajectories", pytest.approx(20))
    assert (verdict["before"], verdict["after"]) == (731, 751)


def test_memory_that_helps_is_not_a_longer_context_that_helps(make_rollouts):
    """A policy that depends on its memory fails without it, and may still equal a policy of one episode."""
    records = []
    for seed in range(6):
        records += make_rollouts(1, seed, 500 + 20 * (-1) ** seed) + make_rollouts(4, seed, 500)
        records += make_rollouts(4, seed, 300 + 10 * (-1) ** seed, context=False)
    found = Summary(records)
    assert found.headline == "It is not resolved whether a longer context helps."
    assert [row["verdict"] for row in found.memory] == ["higher"]


def test_a_variant_is_compared_with_its_method_at_the_longest_length_of_both(make_rollouts):
    records = []
    for seed in range(6):
        for length in (1, 2):
            records += make_rollouts(length, seed, 500 + 20 * (-1) ** seed)
        for length in (1, 2, 4):
            records += make_rollouts(length, seed, 400 + length, variant="short")
    (row,) = Summary(records).rivals.to_dict("records")
    assert row["compared"] == "Agentic Transformer to 2 trajectories"
    assert row["after"] < row["before"]


def test_one_length_without_control(make_rollouts):
    found = Summary([record for seed in range(3) for record in make_rollouts(4, seed, 500)])
    assert found.headline == "Only one context length was measured."
    assert found.verdicts[0]["verdict"] == "not compared"


def test_several_comparisons_are_counted(make_ablation):
    found = Summary([*make_ablation(), *make_ablation(task="walker_walk", step=0)])
    assert found.headline == "A longer context helps in both comparisons."  # longer streams gain 10 per episode
    flat = [record for record in make_ablation(task="walker_walk") if record.test_trajectories == 1]
    longer = [record.model_copy(update={"train_trajectories": 2}) for record in flat if record.method == "at"]
    found = Summary([*make_ablation(), *flat, *longer])
    assert found.headline == "A longer context helps in 1 of 2 comparisons."


def test_helping_and_hurting_are_both_reported(make_ablation):
    records = [
        *make_ablation(),
        *make_ablation(task="walker_walk", step=-100),
        *make_ablation(task="walker_run", step=-90),
    ]
    assert Summary(records).headline == "A longer context helps in 1 of 3 and hurts in 2 of 3 comparisons."


def test_references_alone(make_ablation):
    records = [record for record in make_ablation() if record.method in ("random", "data")]
    assert Summary(records).headline == "No rollouts show whether context helps."


def test_rollouts_that_all_have_the_same_prompt_are_compared_by_context(make_rollouts):
    prompt = {"prompt_trajectories": 2, "prompt_seed": 0}
    records = [r for seed in range(5) for n in (2, 4) for r in make_rollouts(n, seed, 100.0 * n + seed, **prompt)]
    found = Summary(records)
    (verdict,) = found.verdicts
    assert verdict["change"] == pytest.approx(200)
    assert found.headline == "A longer context helps."
    unlike = [r for n in (2, 4) for r in make_rollouts(n, 0, 1.0, prompt_trajectories=n, prompt_seed=0)]
    assert Summary(unlike).headline == "No rollouts show whether context helps."


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"train_trajectories": 4, "prompt_control": "zero rewards"}, "Agentic Transformer, prompt zero rewards"),
        pytest.param(
            {"method": "copy", "train_trajectories": None, "settings": {}},
            "Nearest step of the prompt",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_prompts_are_compared_run_by_run(make_rollouts, changed, name):
    """Runs differ by 100; the prompt raises each of them by 40."""
    records = [
        record
        for seed in range(6)
        for count, gain in ((0, 0.0), (3, 40.0))
        for record in make_rollouts(
            1, seed, 100.0 * seed + gain, train_trajectories=4, prompt_trajectories=count, checkpoint_hash=f"c{seed}"
        )
    ]
    verdict = Summary(records).verdicts[-1]
    assert (verdict["subject"], verdict["paired"], verdict["verdict"]) == ("A longer prompt", True, "higher")
    assert (verdict["change"], verdict["compared"]) == (pytest.approx(40), "prompt of 0 to 3, trained on 4")
    assert (verdict["before"], verdict["after"]) == (251, 291)
    controls = [
        record
        for seed in range(6)
        for count, gain in ((1, 0.0), (3, -70.0))
        for record in make_rollouts(
            1, seed, 100.0 * seed + gain, prompt_trajectories=count, checkpoint_hash=f"c{seed}", **changed
        )
    ]
    both = Summary([*records, *controls])
    assert (both.headline, len(both.verdicts)) == (Summary(records).headline, len(Summary(records).verdicts))
    assert Summary(records).rivals.empty
    (rival,) = both.rivals.to_dict("records")  # after the longest prompt only
    assert rival["compared"] == f"{name} to trained on 4, rolled out for 1 after a prompt of 3"
    assert (rival["change"], rival["seeds"], rival["paired"]) == (pytest.approx(110), 6, True)
    results = tabulate([*records, *controls])
    assert set(prompt_returns(results)["method"]) == {"Agentic Transformer", name}
    assert returns_table(results).set_index("kind").loc["prompt control", "length"].isna().all()


def test_controls_of_prompts_are_compared_with_their_own_variant(make_rollouts):
    def prompted(count, level, variant, **changes):
        changes = {"train_trajectories": 4, "variant": variant} | changes
        return [r for seed in range(4) for r in make_rollouts(1, seed, level, prompt_trajectories=count, **changes)]

    records = [
        record
        for variant in ("good", "bad")
        for count, level, changes in (
            (1, 100.0, {}), (3, 200.0 + 50 * (variant == "good"), {}), (3, 120.0, {"prompt_control": "shuffled"}),
            (3, 90.0, {"method": "copy", "train_trajectories": None, "settings": {}}),
        )
        for record in prompted(count, level, variant, **changes)
    ]  # fmt: skip
    rivals = Summary(records).rivals
    assert sorted(zip(rivals["method"], rivals["compared"].str.partition(" to trained")[0], strict=True)) == [
        (f"Agentic Transformer, {name}", other)
        for name in ("bad", "good")
        for other in (f"Agentic Transformer, {name}, prompt shuffled", f"Nearest step of the prompt, {name}")
    ]


def streams(make_rollouts, length: int, count: int, seed: int = 0, **changes):
    """One run's streams; stream i of n episodes has the start seeds i n to i n + n - 1."""
    pairs = [make_rollouts(length, seed, 100.0 + index, **changes) for index in range(-(-count // 2))]
    records = [record for pair in pairs for record in pair][:count]
    return [
        record.model_copy(
            update={
                "environment_seed": index * length,
                "start_seeds": tuple(range(index * length, (index + 1) * length)),
            }
        )
        for index, record in enumerate(records)
    ]


def test_as_many_episodes_from_the_same_seeds_have_the_same_starts(make_rollouts):
    records = [r for n in (1, 2, 4) for seed in range(2) for r in streams(make_rollouts, n, 8 // n, seed)]
    records += streams(make_rollouts, 1, 8, method="random", train_trajectories=None, target_return=None)
    found = Summary(records)
    assert found.warnings[0] is None


def test_as_many_streams_of_other_lengths_have_other_starts(make_rollouts):
    """A length of 1 from the starts that the streams of 4 begin with."""
    found = Summary([r for n in (1, 4) for r in streams(make_rollouts, n, 5)])
    assert "from the same starts: cartpole_swingup (5 or 20 starts)." in str(found.warnings[0])


def test_streams_without_start_seeds_start_elsewhere_from_the_second_episode(make_rollouts):
    old = [make_rollouts(2, 0, 1.0)[0]]
    new = streams(make_rollouts, 1, 2)
    assert Summary([*old, *new]).warnings[0] is not None
    assert Summary([*old, *(r.model_copy(update={"start_seeds": ()}) for r in new[:1])]).warnings[0] is not None
    alone = [r.model_copy(update={"start_seeds": ()}) for r in new]
    assert Summary([*alone, *streams(make_rollouts, 1, 2, train_trajectories=8)]).warnings[0] is None


def test_training_seeds_with_other_starts_are_reported(make_rollouts):
    found = Summary([*streams(make_rollouts, 1, 4), *streams(make_rollouts, 1, 2, seed=1)])
    assert "cartpole_swingup (2 or 4 starts)" in str(found.warnings[0])


def test_settings_that_differ_along_a_curve_are_reported(make_rollouts):
    of_length = {1: {"optimiser.learning_rate": "0.1"}, 2: {}, 4: {"optimiser.steps": "9", "optimiser.batch_size": "3"}}
    records = [
        record
        for length, settings in of_length.items()
        for record in make_rollouts(length, 0, 100.0 * length, settings=settings)
    ]
    warning = str(Summary(records).warnings[1])
    assert "Agentic Transformer on cartpole_swingup: optimiser.learning_rate. " in warning
    assert "optimiser.steps" not in warning, "these follow from the length"


def test_equal_settings_are_not_reported(make_rollouts, make_ablation):
    alike = [record for n in (1, 2) for record in make_rollouts(n, 0, 1.0, settings={"model.width": "64"})]
    assert Summary(alike).warnings[1] is None
    assert Summary(make_ablation()).warnings[1] is None
    other_target = make_rollouts(4, 0, 1.0, settings={"model.width": "32"}, target_policy="0.9x")
    assert Summary([*alike, *other_target]).warnings[1] is None, "that is a curve of its own"
