"""Records become one table, and the rules decide which of them count."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from ringrl.config import TrainConfig
from ringrl.errors import UserError
from ringrl.evaluation.records import recipe
from ringrl.methods import method_of
from ringrl.report import read_results
from ringrl.report.results import tabulate
from ringrl.report.tables import episode_returns, levels, returns_table, run_scores, scores_of

LATER = datetime(2100, 1, 1, tzinfo=UTC)


def scores(records, metric="mean", *, memory=True, counted="counts") -> list[list[float]]:
    """The scores of the training runs of each cell, in the order of the table."""
    results = tabulate(records)
    table, runs = returns_table(results), run_scores(results, counted)
    policies = table[table["kind"] != "data"]
    return [scores_of(runs, cell, metric, memory=memory).tolist() for _, cell in policies.iterrows()]


def by_method(records) -> dict[str, list[float]]:
    """The scores of each method, all lengths one after another."""
    found: dict[str, list[float]] = {}
    names = returns_table(tabulate(records))["method"]
    for name, values in zip(names, scores(records), strict=True):
        found.setdefault(name, []).extend(values)
    return found


def left_out(records) -> str:
    return "; ".join(tabulate(records).attrs["left_out"])


def test_a_row_is_an_episode(make_rollouts, write_results):
    path = write_results(make_rollouts(3, 7, 100, gain=10, prompt_trajectories=2))
    results = read_results([path])
    assert len(results) == 6
    first = results.iloc[0]
    assert (first["task"], first["method"], first["kind"]) == ("cartpole_swingup", "Agentic Transformer", "context")
    lengths = first[["train_trajectories", "test_trajectories", "prompt_trajectories"]].tolist()
    assert (lengths, first["seed"], first["memory"]) == ([3, 3, 2], 7, True)
    assert results["return"].tolist() == [100, 110, 120, 102, 112, 122]
    assert results["episode"].tolist() == [1, 2, 3] * 2
    assert results["counts"].all()
    assert results.attrs["sources"] == [str(path)]


def test_a_run_is_averaged_over_its_streams(make_rollouts):
    records = [*make_rollouts(3, 0, 100, gain=10), *make_rollouts(3, 7, 200, gain=10)]
    for metric, expected in (("first", [101, 201]), ("mean", [111, 211]), ("last", [121, 221]), ("best", [121, 221])):
        assert scores(records, metric) == [expected], metric
    episodes = episode_returns(tabulate(records))
    assert (episodes["iqm"].tolist(), set(episodes["seeds"])) == ([151, 161, 171], {2})


def test_a_run_has_the_checkpoint_that_was_evaluated_last(make_rollouts):
    """Four streams of one checkpoint, then two streams of an earlier one: only the last two count."""
    old = [*make_rollouts(2, 0, 800, checkpoint_hash="a")]
    old += [record.model_copy(update={"environment_seed": record.environment_seed + 10}) for record in old]
    new = make_rollouts(2, 0, 100, checkpoint_hash="b", created=LATER)
    for records in ([*old, *new], [*new, *old]):
        assert scores(records) == [[101]]
        assert returns_table(tabulate(records))["episodes"].tolist() == [4]
        assert left_out(records) == "4 older records that were measured again later, 4 of them of another checkpoint"


def test_without_a_context_the_control_is_no_further_evidence(make_rollouts):
    streams = make_rollouts(1, 0, 300, method="bc", train_trajectories=None)
    older = [r.model_copy(update={"target_policy": "data_best", "target_return": 5.0}) for r in streams]
    control = [record.model_copy(update={"context": False}) for record in streams]
    assert returns_table(tabulate([*older, *streams, *control]))["episodes"].tolist() == [len(streams)]


def test_a_control_counts_next_to_its_rollout(make_rollouts):
    records = [*make_rollouts(2, 0, 100), *make_rollouts(2, 0, 50, context=False), *make_rollouts(4, 0, 100)]
    assert scores(records, memory=False) == [[51], []]
    episodes = episode_returns(tabulate(records))
    assert episodes[~episodes["memory"]]["iqm"].tolist() == [51, 51]
    assert left_out(records) == ""


def test_failed_episodes_are_counted_and_in_no_mean(make_rollouts):
    """Two streams at 100 and 102, which gain 10 an episode, and what is left of them in each seed."""
    whole, cut, gone, control = (make_rollouts(3, seed, 100, gain=10) for seed in (0, 1, 2, 0))
    cut = [cut[0], cut[1].model_copy(update={"returns": (500.0, None, None)})]
    gone = [record.model_copy(update={"returns": (None, None, None)}) for record in gone]
    control = [record.model_copy(update={"context": False, "returns": (90.0, 92.0, None)}) for record in control]
    records = [*whole, *cut, *gone, *control]
    (row,) = returns_table(tabulate(records)).to_dict("records")
    assert (row["seeds"], row["episodes"], row["failed"]) == (2, 10, 2 + 6 + 2)
    assert scores(records, "first") == [[101, 300]]
    assert scores(records) == [[111, (110 + 500) / 2]]
    assert scores(records, "best") == [[121, (120 + 500) / 2]]
    assert scores(records, "last") == [[121, 120]], "of the stream that has a last episode"
    assert scores(records, memory=False) == [[]], "a control of some seeds is not compared with all of them"
    assert "2 control records" in left_out(records)
    assert "2 streams without a return" in left_out(records)
    assert scores(records, counted="paired") == [[106]]
    assert scores(records, memory=False, counted="paired") == [[91]], "the two episodes that have a return in both"


@pytest.mark.parametrize("cut", [pytest.param("rollout", marks=pytest.mark.slow), "control"])
def test_an_episode_that_failed_on_one_side_counts_on_neither(cut, make_rollouts):
    """Memory changes nothing; the first start is an easy one, and one stream fails after it."""
    both = [record for context in (True, False) for record in make_rollouts(3, 0, 0, context=context)]
    both = [record.model_copy(update={"returns": (900.0, 100.0, 100.0)}) for record in both]
    index = {"rollout": 0, "control": 3}[cut]
    both[index] = both[index].model_copy(update={"returns": (900.0, None, None)})
    assert returns_table(tabulate(both))["failed"].tolist() == [2]
    assert left_out(both) == ""
    for metric in ("first", "last", "mean", "best"):
        assert scores(both, metric) == scores(both, metric, memory=False), metric
    np.testing.assert_allclose(scores(both), [[(900 + 1100 / 3) / 2]])
    np.testing.assert_allclose(scores(both, counted="paired"), scores(both, counted="paired", memory=False))
    episodes = episode_returns(tabulate(both)).pivot(index="episode", columns="memory", values="iqm")
    assert (episodes[True] == episodes[False]).all()


def test_a_control_that_leaves_nothing_of_a_seed_is_not_compared(make_rollouts):
    rollout = make_rollouts(2, 0, 100)
    control = [r.model_copy(update={"context": False, "returns": (None, None)}) for r in rollout]
    assert scores([*rollout, *control]) == [[101]]
    assert scores([*rollout, *control], memory=False) == [[]]
    assert returns_table(tabulate([*rollout, *control]))["failed"].tolist() == [4]


def test_a_control_counts_for_the_same_starts_only(make_rollouts):
    """Memory changes nothing, but its rollouts also have easy starts, or an easy seed."""
    both = [record for context in (True, False) for record in make_rollouts(2, 0, 100, context=context)]
    easy = [record.model_copy(update={"environment_seed": record.environment_seed + 2}) for record in both[:2]]
    easy = [record.model_copy(update={"returns": (900.0, 900.0)}) for record in easy]
    for more in (easy, make_rollouts(2, 1, 900)):
        records = [*both, *more]
        assert max(scores(records)[0]) >= 500
        assert scores(records, counted="paired") == scores(records, counted="paired", memory=False) == [[101]]
        assert scores(records, memory=False) == [[]]
        assert "2 control records" in left_out(records)
    assert scores(both, memory=False) == [[101]]
    first_failed = [both[0].model_copy(update={"returns": (None, None)}), *both[1:]]
    assert scores(first_failed, counted="paired") == scores(first_failed, counted="paired", memory=False) == [[102]]


def test_a_run_of_two_prompts_or_lengths_has_one_checkpoint(make_rollouts):
    new = {"checkpoint_hash": "b", "created": LATER}
    old = make_rollouts(2, 0, 100, checkpoint_hash="a", prompt_trajectories=1, prompt_seed=0)
    records = [*old, *make_rollouts(2, 0, 900, prompt_trajectories=1, prompt_seed=1, **new)]
    assert (scores(records), "2 of them of another checkpoint" in left_out(records)) == ([[901]], True)
    old = make_rollouts(1, 0, 100, checkpoint_hash="a", train_trajectories=2)
    table = returns_table(tabulate([*old, *make_rollouts(2, 0, 900, **new)]))
    assert table["test_trajectories"].tolist() == [2]
    for asked in (
        {"prompt_trajectories": 1, "prompt_seed": 0},
        {"target_policy": "given"},
    ):
        records = [*make_rollouts(2, 0, 800, checkpoint_hash="a", **asked), *make_rollouts(2, 0, 300, **new)]
        assert scores(records) == [[301]], asked
    elsewhere = make_rollouts(2, 0, 800, checkpoint_hash="a", task="walker_walk", train_task="cartpole_swingup")
    table = returns_table(tabulate([*elsewhere, *make_rollouts(2, 0, 300, **new)]))
    assert table["task"].tolist() == ["cartpole_swingup"]


def test_rollouts_in_another_task_are_a_separate_method(make_rollouts):
    records = [
        *make_rollouts(2, 0, 1),
        *make_rollouts(2, 0, 3, train_task="cartpole_balance"),
    ]
    assert by_method(records) == {
        "Agentic Transformer": [2],
        "Agentic Transformer, trained on cartpole_balance": [4],
    }
    assert left_out(records) == ""


def test_a_control_alone_is_counted_not_shown(make_rollouts):
    records = [*make_rollouts(2, 0, 100), *make_rollouts(8, 0, 50, context=False)]
    assert returns_table(tabulate(records))["test_trajectories"].tolist() == [2]
    assert "2 control records" in left_out(records)


def test_methods_without_context_are_references(make_ablation, make_rollouts):
    table = returns_table(tabulate(make_ablation()))
    assert table[table["kind"] == "reference"]["family"].tolist() == ["random", "bc"]
    assert set(table[table["kind"] == "context"]["family"]) == {"at"}
    table = returns_table(tabulate(make_rollouts(1, 0, 300, method="bc10", train_trajectories=None)))
    assert (table["method"].tolist(), table["kind"].tolist()) == (["bc10"], ["reference"])


def test_a_reference_level_has_the_most_episodes(make_rollouts):
    values = {"method": "bc", "train_trajectories": None}
    table = returns_table(tabulate([*make_rollouts(4, 0, 1.0, **values), *make_rollouts(1, 0, 9.0, **values)]))
    assert len(table) == 2
    assert levels(table, "cartpole_swingup")["test_trajectories"].tolist() == [4]


def test_the_newer_of_two_measurements_counts(make_rollouts):
    old = make_rollouts(2, 0, 100, created=datetime(2025, 1, 1, tzinfo=UTC), checkpoint_hash="another")
    new = make_rollouts(2, 0, 300, created=datetime(2025, 1, 2, tzinfo=UTC), steps_trained=4000)
    assert scores([*new, *old]) == [[301]]
    settings = {"model.layers": "1"}
    again = [*make_rollouts(2, 0, 1.0, settings=settings), *make_rollouts(2, 0, 5.0, settings=settings)]
    assert scores(again) == [[6]]
    assert left_out(again) == "2 older records that were measured again later"


def test_results_of_different_datasets_are_not_mixed(make_rollouts):
    with pytest.raises(UserError, match=r"cartpole_swingup: .*different datasets \(aaa and bbb\)"):
        tabulate([*make_rollouts(1, 0, 1, data_fingerprint="aaa"), *make_rollouts(1, 1, 1, data_fingerprint="bbb")])


def test_names_separate_methods_only_where_needed(make_rollouts):
    assert list(by_method(make_rollouts(1, 0, 1))) == ["Agentic Transformer"]
    both = by_method([*make_rollouts(1, 0, 1), *make_rollouts(1, 0, 1, token_set="dt3")])
    assert list(both) == ["Agentic Transformer, dt3", "Agentic Transformer, ring4"]
    assert "Agentic Transformer, target own" in by_method(
        [*make_rollouts(1, 0, 1), *make_rollouts(1, 0, 1, target_policy="own")]
    )
    best = make_rollouts(1, 0, 300, method="bc-10%", train_trajectories=None)
    assert list(by_method(best)) == ["Behaviour cloning, best 10%"]


def test_methods_that_the_report_does_not_show_lengthen_no_name(make_rollouts):
    """Only a control was measured with the other token set, and all rollouts to the other target failed."""
    control = make_rollouts(1, 0, 1, token_set="dt3", context=False)
    failed = [r.model_copy(update={"returns": (None,)}) for r in make_rollouts(1, 0, 1, target_policy="own")]
    records = [*make_rollouts(1, 0, 1), *control, *failed]
    assert list(by_method(records)) == ["Agentic Transformer"]
    assert scores(records) == [[2]]


def test_methods_of_one_name_stay_apart(make_rollouts):
    """A variant has the name of a token set of the plan."""
    sets = [r for name in ("at5", "dt3") for r in make_rollouts(1, 0, 100, token_set=name)]
    found = by_method([*sets, *make_rollouts(1, 0, 900, token_set="dt3", variant="dt3")])
    title = "Agentic Transformer, "
    assert found == {f"{title}at5": [101], f"{title}dt3": [101], f"{title}dt3 (variant dt3)": [901]}


def test_given_targets_are_separate_methods(make_rollouts):
    records = [
        record
        for target in (500.0, 848.3331, 848.3333)
        for record in make_rollouts(2, 0, 1, target_policy="given", target_return=target)
    ]
    expected = [f"Agentic Transformer, target given {target}" for target in ("500", "848.3331", "848.3333")]
    assert list(by_method(records)) == expected
    assert left_out(records) == ""


def test_curves_over_training_or_rollout_lengths(make_rollouts):
    table = returns_table(tabulate([record for length in (4, 1, 2) for record in make_rollouts(length, 0, 1)]))
    assert (table["length"].tolist(), set(table["curve"])) == ([1, 2, 4], {""})
    records = [
        record for train in (2, 8) for test in (4, 1) for record in make_rollouts(test, 0, 1, train_trajectories=train)
    ]
    table = returns_table(tabulate(records))
    assert table["curve"].tolist() == ["trained on 2"] * 2 + ["trained on 8"] * 2
    assert table["length"].tolist() == [1, 4, 1, 4]


def test_rollouts_to_compare_prompts_with_are_on_no_curve_of_context_lengths(make_rollouts):
    records = [record for n in (1, 4) for record in make_rollouts(n, 0, 1)]
    records += [
        r for k in (0, 2) for r in make_rollouts(1, 0, 1, train_trajectories=4, prompt_trajectories=k, prompt_seed=k)
    ]
    table = returns_table(tabulate(records)).set_index(
        ["train_trajectories", "prompt_trajectories", "test_trajectories"]
    )
    assert table["length"].dropna().to_dict() == {(1, 0, 1): 1.0, (4, 0, 4): 4.0}


def test_a_recipe_has_the_settings_that_decide_what_is_learned() -> None:
    base = {"data": "x.h5", "task": "walker_walk", "run": "runs/a"}
    assert recipe(TrainConfig.model_validate(base)) == {}
    elsewhere = {"seed": 3, "data": "y.h5", "run": "b", "mesh": {"data": 2}}
    same = {"model": {"remat": "layers", "token_set": "at5"}, "context": {"trajectories": 8}}
    assert recipe(TrainConfig.model_validate(base | elsewhere | same)) == {}
    other = {"context": {"order": "random"}, "optimiser": {"learning_rate": 3e-4, "batch_size": 2}}
    assert recipe(TrainConfig.model_validate(base | other)) == {
        "context.order": "random", "optimiser.learning_rate": "0.0003", "optimiser.batch_size": "2",
    }  # fmt: skip


def test_a_recipe_has_the_settings_of_its_kind_of_model() -> None:
    base = {"data": "x.h5", "task": "walker_walk", "run": "a"}
    context = {"trajectories": 8, "order": "random", "best_fraction": 0.5}
    found = {}
    for kind in ("transformer", "behaviour_cloning", "td3_bc"):
        changes = {
            "context": context,
            "actor_critic": {"discount": 0.9},
            "model": {"kind": kind, "heads": 4, "width": 64},
        }
        found[kind] = set(recipe(TrainConfig.model_validate(base | changes)))
    both = {"context.best_fraction", "model.width"}
    assert found["transformer"] == both | {"model.heads", "context.order"}
    assert found["behaviour_cloning"] == both | {"model.kind", "context.trajectories", "context.order"}
    assert found["td3_bc"] == both | {"model.kind", "actor_critic.discount"}


def test_runs_of_other_settings_replace_and_join_nothing(make_rollouts):
    """The same task, method, length and seeds, once with the trajectories in random order."""
    usual = [r for n in (1, 4) for seed in range(2) for r in make_rollouts(n, seed, 100.0 * n + seed, settings={})]
    settings = {"context.order": "random"}
    other = [r for seed in range(2) for r in make_rollouts(4, seed, 50.0 + seed, settings=settings)]
    assert left_out([*usual, *other]) == ""
    assert by_method([*usual, *other]) == {
        "Agentic Transformer, context.order ascending": [101, 102, 401, 402],
        "Agentic Transformer, context.order random": [51, 52],
    }
    seeds = [*make_rollouts(2, 0, 1.0, settings={}), *make_rollouts(2, 1, 9.0, settings={"model.layers": "6"})]
    assert scores(seeds) == [[2], [10]], "these are not seeds of one cell"


def test_settings_that_follow_from_the_length_split_no_curve(make_rollouts):
    """Equal tokens: the longer the context, the fewer contexts in a batch."""
    records = [r for n in (1, 2, 4) for r in make_rollouts(n, 0, 1.0, settings={"optimiser.batch_size": str(8 // n)})]
    assert returns_table(tabulate(records))["length"].tolist() == [1, 2, 4]
    assert list(by_method(records)) == ["Agentic Transformer"]


@pytest.mark.parametrize(("trajectories", "target"), [(4, "best"), (1, "none")])
def test_at_and_dt_with_equal_seeds_and_starts_are_two_runs(make_rollouts, trajectories, target):
    """Both are evaluated on one episode. The hashes of their checkpoints are unknown."""
    records = []
    for level, context in ((100.0, {"trajectories": trajectories, "target": target}), (7.0, {"target": "own"})):
        config = TrainConfig(data="a.h5", task="cartpole_swingup", run="a", context={"trajectories": 1} | context)
        found = make_rollouts(1, 0, level, method=method_of(config), token_set="dt3", settings=recipe(config))
        records += [record.model_copy(update={"train_trajectories": config.context.trajectories}) for record in found]
    assert [record.method for record in records] == ["at", "at", "dt", "dt"]
    results = tabulate(records)
    assert results.attrs["left_out"] == []
    assert results.groupby("run")["return"].apply(list).tolist() in ([[100, 102], [7, 9]], [[7, 9], [100, 102]])
    assert sorted(scores(records)) == [[8], [101]]
    assert len(by_method(records)) == 2


def test_several_tasks_in_turn_have_a_curve_of_their_own(make_rollouts):
    settings = {"context.other_tasks": "('cartpole_balance',)"}
    one = [r for n in (1, 2) for r in make_rollouts(n, 0, 100.0 * n, settings={})]
    both = [r for n in (1, 2) for r in make_rollouts(n, 0, 10.0 * n, method="at-2tasks", settings=settings)]
    assert by_method([*one, *both]) == {
        "Agentic Transformer": [101, 201], "Agentic Transformer, 2 tasks in turn": [11, 21],
    }  # fmt: skip


def test_runs_whose_own_and_other_tasks_are_exchanged_are_separate(make_rollouts):
    """Both were trained on the task that they are measured in, and no record names another one."""
    records = [
        record
        for other, level in (("cartpole_balance", 1.0), ("cartpole_swingup", 9.0))
        for record in make_rollouts(2, 0, level, method="at-2tasks", settings={"context.other_tasks": f"('{other}',)"})
    ]
    assert left_out(records) == ""
    assert sorted(scores(records)) == [[2], [10]]


def test_references_of_other_settings_are_separate(make_rollouts):
    values = {"method": "bc", "train_trajectories": None, "token_set": None}
    records = [
        *make_rollouts(1, 0, 1.0, **values, settings={}),
        *make_rollouts(1, 0, 9.0, **values, settings={"model.width": "512"}),
    ]
    assert by_method(records) == {
        "Behaviour cloning, model.width 128": [2], "Behaviour cloning, model.width 512": [10],
    }  # fmt: skip


def test_a_variant_is_named_as_in_the_plan(make_rollouts):
    """Next to the cells of the plan, at two lengths; the tokens are named only where one name has several."""
    usual = [r for n in (2, 4) for r in make_rollouts(n, 0, 100.0 * n, settings={})]
    values = {"settings": {"context.order": "random"}, "token_set": "dt3", "variant": "random order"}
    named = [r for n in (2, 4) for r in make_rollouts(n, 0, 10.0 * n, **values)]
    equal = make_rollouts(2, 0, 1.0, settings={}, variant="equal settings")
    assert left_out([*usual, *named, *equal]) == ""
    assert by_method([*usual, *named, *equal]) == {
        "Agentic Transformer": [201, 401],
        "Agentic Transformer, equal settings": [2],
        "Agentic Transformer, random order": [21, 41],
    }
    other = make_rollouts(2, 0, 5.0, **(values | {"token_set": "at5"}))
    assert "Agentic Transformer, random order, dt3" in by_method([*named, *other])
    cloned = make_rollouts(1, 0, 1.0, method="bc", train_trajectories=None, variant="wide")
    assert list(by_method(cloned)) == ["Behaviour cloning, wide"]


def test_a_table_for_notebooks_has_plain_columns(make_ablation, write_results):
    results = read_results(write_results(make_ablation()))
    mean = results[results["counts"] & results["memory"]].groupby(["method", "train_trajectories"])["return"].mean()
    assert mean["Agentic Transformer", 4] == pytest.approx(618)
    assert isinstance(results, pd.DataFrame)
