"""Aggregates by hand: intervals, comparisons, equal starts."""

import pytest

from ringrl.evaluation.scores import normalised_score
from ringrl.evaluation.statistics import estimate
from ringrl.report.provenance import training_runs
from ringrl.report.results import read_results, tabulate
from ringrl.report.tables import (
    contrast,
    intervals,
    levels,
    normalised_scores,
    prompt_returns,
    returns_table,
    run_scores,
    scores_of,
    strata,
    training_table,
)


def table_of(records):
    return returns_table(tabulate(records))


def cell_scores(records) -> dict[tuple[str, float], object]:
    """Scores by task and rollout length."""
    results = tabulate(records)
    table, runs = returns_table(results), run_scores(results)
    return {(cell["task"], cell["test_trajectories"]): scores_of(runs, cell) for _, cell in table.iterrows()}


def test_rows_by_hand(make_ablation):
    table = table_of(make_ablation())
    names = ["Random policy", "Behaviour cloning", "Dataset, all episodes", "Dataset, best episode"]
    assert table["method"].tolist() == [*names, *["Agentic Transformer"] * 3]
    row = table.iloc[-1]
    assert row[["train_trajectories", "test_trajectories", "seeds", "episodes"]].tolist() == [4, 4, 5, 40]
    values = {"mean": 618, "iqm": 618, "first": 603, "last": 633, "best": 633, "control": 393, "best_control": 393}
    assert row[list(values)].to_dict() == pytest.approx(values)
    assert 616 <= row["low"] < 618 < row["high"] <= 620
    assert row["score"] == pytest.approx(float(normalised_score("cartpole_swingup", 618.0)))
    everything, best = table.iloc[2], table.iloc[3]
    assert (everything["mean"], everything["episodes"], best["mean"]) == (pytest.approx(400), 101, 800)
    assert everything[["low", "seeds"]].isna().all()


def test_interquartile_mean_differs_from_the_mean(make_rollouts):
    records = [record for seed, level in enumerate([0, 100, 110, 900]) for record in make_rollouts(1, seed, level)]
    row = table_of(records).iloc[0]
    assert row[["mean", "iqm"]].tolist() == pytest.approx([278.5, 106])


def test_a_single_episode_is_its_own_control(make_rollouts):
    row = table_of(make_rollouts(1, 0, 100)).iloc[0]
    assert row[["best", "best_control", "control", "iqm"]].tolist() == [101] * 4


def test_the_mean_and_best_of_the_control_by_hand(make_rollouts):
    row = table_of(make_rollouts(2, 0, 100, gain=10) + make_rollouts(2, 0, 50, gain=-20, context=False)).iloc[0]
    assert row[["iqm", "best", "control", "last_control", "best_control"]].tolist() == [106, 111, 41, 31, 51]


def test_one_seed_has_no_interval_anywhere(make_ablation):
    results = tabulate(make_ablation(seeds=1))
    table = returns_table(results)
    assert table[["low", "high"]].isna().all(axis=None)


def test_a_task_without_constants_has_no_score(make_rollouts):
    assert table_of(make_rollouts(1, 0, 100, task="my_own_task"))["score"].isna().all()


@pytest.mark.parametrize("same", [True, False])
def test_the_same_runs_are_compared_run_by_run(make_rollouts, same):
    """Runs differ by 100 and each changes by 10: visible only if the same runs are compared."""
    records = [
        record
        for length in (1, 4)
        for seed in range(5)
        for record in make_rollouts(
            length, seed + (0 if same else 5 * (length > 1)), 100.0 * seed + 10 * (length > 1),
            train_trajectories=4 if same else length, checkpoint_hash=f"{seed} {4 if same else length}",
        )
    ]  # fmt: skip
    shorter, longer = cell_scores(records).values()
    found = contrast(longer, shorter)
    assert (found["paired"], found["change"], found["seeds"]) == (same, pytest.approx(10), 5)
    assert (found["low"] <= 0 <= found["high"]) is not same
    # Of 25 pairs of runs the longer wins 15; drawn together, it never wins less than half.
    assert found["wins"] == pytest.approx(15 / 25)
    assert (found["wins_low"] > 0.5) is same


def test_runs_of_unknown_checkpoints_are_never_the_same(make_rollouts):
    records = [r for length in (1, 4) for r in make_rollouts(length, 0, 1, train_trajectories=4, checkpoint_hash=None)]
    one, other = cell_scores(records).values()
    assert not set(one.index) & set(other.index)


def test_a_run_measured_in_several_tasks_is_drawn_once(make_rollouts):
    """Perfectly correlated tasks are no more evidence than one; tasks of other runs stay strata of their own."""
    tasks = ("cartpole_swingup", "walker_walk", "cheetah_run")
    hashes = [[f"{seed}" for seed in range(4)]] * 2 + [[f"other {seed}" for seed in range(4)]]
    records = [
        record
        for task, names in zip(tasks, hashes, strict=True)
        for seed in range(4)
        for record in make_rollouts(2, seed, 10.0 * seed, task=task, checkpoint_hash=names[seed])
    ]
    swingup, walk, run = (cell_scores(records)[task, 2] for task in tasks)
    one, same, apart = strata([swingup]), strata([swingup, walk]), strata([swingup, run, walk])
    assert (one[1], same[1], apart[1]) == ([0], [0, 0], [0, 1, 0])
    assert estimate(same[0], together=same[1]) == estimate(one[0])
    incomplete = cell_scores([record for record in records if (record.task, record.seed) != ("walker_walk", 1)])
    runs, _ = strata([incomplete[task, 2] for task in tasks[:2]])
    assert [part.tolist() for part in runs] == [[1, 21, 31]] * 2, "a run that lacks a task counts in none"
    unnamed = cell_scores([record.model_copy(update={"checkpoint_hash": None}) for record in records])
    assert strata(list(unnamed.values()))[1] == [0, 1, 2]


def test_the_level_of_a_method_is_its_row_of_the_most_episodes(make_rollouts):
    fields = {"method": "bc", "train_trajectories": None, "token_set": None}
    records = [r for length in (1, 4, 2) for r in make_rollouts(length, 0, 100.0 * length, **fields)]
    (found,) = levels(table_of(records), "cartpole_swingup").to_dict("records")
    assert (found["test_trajectories"], found["episodes"], found["iqm"]) == (4, 8, 401)


def test_runs_measured_in_two_tasks_are_no_more_evidence_than_in_one(make_rollouts):
    """In normalised scores over all tasks; the second task repeats the first one."""

    def width(shared):
        records = [
            record
            for task in ("cheetah_run", "cheetah_run_backward")
            for n in (1, 4)
            for seed, level in enumerate((1.0, 9.0, 4.0, 12.0))
            for record in make_rollouts(
                n, seed, level + n, task=task, checkpoint_hash=f"{n} {seed}" + ("" if shared else task)
            )
        ]
        results = tabulate(records)
        table = normalised_scores(results, returns_table(results))
        assert table["length"].tolist() == [1, 4]
        return (table["high"] - table["low"]).to_numpy()

    assert (width(True) > 1.1 * width(False)).all()


def seeded(records, starts):
    """Streams from given starts: stream i has the start seeds of `starts[i]`."""
    return [
        record.model_copy(update={"environment_seed": seeds[0], "start_seeds": tuple(seeds), "returns": tuple(returns)})
        for record, (seeds, returns) in zip(records, starts, strict=True)
    ]


def test_a_start_counts_once_however_many_prompts_it_follows(make_rollouts):
    """The return is 100 from one start and 900 from the other, with and without prompts."""
    values = {"train_trajectories": 4}
    records = seeded(make_rollouts(1, 0, 0, **values), [([0], [100.0]), ([1], [900.0])])
    for draw, starts in enumerate(([0, 1], [0])):
        made = make_rollouts(1, 0, 0, **values, prompt_trajectories=2, prompt_seed=draw)[: len(starts)]
        records += seeded(made, [([start], [100.0 + 800.0 * start]) for start in starts])
    assert prompt_returns(tabulate(records))["value"].tolist() == [500, 500]


def test_prompts_are_compared_from_common_starts(make_rollouts):
    """Two draws of a prompt share four starts; without a prompt there is a fifth, easy one."""
    values = {"train_trajectories": 4}
    bare = [r for _ in range(3) for r in make_rollouts(1, 0, 0, **values)][:5]
    records = seeded(bare, [([0], [1.0]), ([1], [2.0]), ([2], [3.0]), ([3], [4.0]), ([4], [900.0])])
    for draw in range(2):
        prompt = {"prompt_trajectories": 2, "prompt_seed": draw}
        records += seeded(make_rollouts(1, 0, 0, **values, **prompt), [([2 * draw], [10.0]), ([2 * draw + 1], [20.0])])
    found = intervals(prompt_returns(tabulate(records)), ["prompt_trajectories"])
    assert found[["prompt_trajectories", "iqm"]].to_numpy().tolist() == [[0, 2.5], [2, 15.0]]


def test_training_cost_by_hand(make_study, tmp_path):
    results = read_results(make_study(tmp_path / "runs"))
    table = training_table(results, training_runs(results))
    assert table["train_trajectories"].tolist() == [1, 2]
    assert table["flops"].tolist() == [1e12, 2e12]
    assert table["tokens_per_second"].tolist() == [1000, 500]
    assert table["peak_memory"].isna().all()
