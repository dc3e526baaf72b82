"""Runs of one method that differ in their settings are told apart, and those that do not are not."""

import numpy as np

from ringrl.config import TrainConfig
from ringrl.evaluation.records import recipe
from ringrl.study.report_cells import gather, series_of


def names(grid) -> dict[str, list[float]]:
    """The scores of each variant, all lengths after one another."""
    found: dict[str, list[float]] = {}
    for cell in grid.cells:
        found.setdefault(grid.name(cell.variant), []).extend(cell.runs().tolist())
    return found


def test_a_recipe_is_what_is_learned_from_and_how() -> None:
    base = {"data": "x.h5", "task": "walker_walk", "run": "runs/a"}
    assert recipe(TrainConfig.model_validate(base)) == {}
    apart = {
        "seed": 3,
        "data": "y.h5",
        "run": "b",
        "mesh": {"data": 2},
        "model": {"remat": "layers", "token_set": "at5"},
    }
    assert recipe(TrainConfig.model_validate(base | apart | {"context": {"trajectories": 8}})) == {}
    told = {"context": {"order": "random"}, "optimiser": {"learning_rate": 3e-4, "batch_size": 2}}
    assert recipe(TrainConfig.model_validate(base | told)) == {
        "context.order": "random", "optimiser.learning_rate": "0.0003", "optimiser.batch_size": "2",
    }  # fmt: skip


def test_a_recipe_has_what_its_kind_of_model_heeds() -> None:
    base = {"data": "x.h5", "task": "walker_walk", "run": "a"}
    changes = {
        "context": {"trajectories": 8, "order": "random", "best_fraction": 0.5},
        "actor_critic": {"discount": 0.9},
    }
    found = {}
    for kind in ("transformer", "behaviour_cloning", "td3_bc"):
        model = {"kind": kind, "heads": 4, "width": 64}
        found[kind] = set(recipe(TrainConfig.model_validate(base | changes | {"model": model})))
    both = {"context.best_fraction", "model.width"}
    assert found["transformer"] == both | {"model.heads", "context.order"}
    assert found["behaviour_cloning"] == both | {"model.kind", "context.trajectories", "context.order"}
    assert found["td3_bc"] == both | {"model.kind", "actor_critic.discount"}


def test_other_orders_displace_and_join_nothing(make_rollouts):
    """The same task, method, length and seeds, and once the trajectories in random order."""
    usual = [r for n in (1, 4) for seed in range(2) for r in make_rollouts(n, seed, 100.0 * n + seed, settings={})]
    settings = {"context.order": "random"}
    other = [r for n in (4,) for seed in range(2) for r in make_rollouts(n, seed, 50.0 + seed, settings=settings)]
    grid = gather([*usual, *other])
    assert (grid.superseded, grid.displaced) == (0, 0)
    assert names(grid) == {
        "Agentic Transformer, context.order ascending": [101, 102, 401, 402],
        "Agentic Transformer, context.order random": [51, 52],
    }


def test_seeds_of_other_settings_are_no_seeds_of_one_cell(make_rollouts):
    records = [*make_rollouts(2, 0, 1.0, settings={}), *make_rollouts(2, 1, 9.0, settings={"model.layers": "6"})]
    assert [cell.seeds for cell in gather(records).cells] == [(0,), (1,)]


def test_what_goes_with_the_length_alone_splits_no_curve(make_rollouts):
    """Equal tokens: the longer the context, the fewer of them in a batch."""
    records = [r for n in (1, 2, 4) for r in make_rollouts(n, 0, 1.0, settings={"optimiser.batch_size": str(8 // n)})]
    (series,) = series_of(gather(records).cells)
    assert [length for length, _ in series.points] == [1, 2, 4]
    assert list(names(gather(records))) == ["Agentic Transformer"]


def test_a_decision_transformer_of_its_own_is_no_point_of_the_agentic_curve(make_rollouts):
    """As --method dt makes it: with the same tokens, and an embedding of the timestep, beside a length of 1."""
    own = {"context.target": "own", "model.timestep_embedding": "True"}
    agentic = [r for n in (2, 4) for r in make_rollouts(n, 0, 100.0 * n, token_set="dt3", settings={})]
    first = make_rollouts(1, 0, 100.0, method="dt", token_set="dt3", settings={"optimiser.batch_size": "8"})
    alone = make_rollouts(1, 0, 7.0, method="dt", token_set="dt3", settings=own)
    both = gather([*agentic, *first, *alone])
    assert both.displaced == both.superseded == 0
    assert names(both) == {"Agentic Transformer": [101, 201, 401], "Decision Transformer": [8]}
    without = gather([*agentic, *alone])
    assert names(without) == {"Agentic Transformer": [201, 401], "Decision Transformer": [8]}


def test_several_tasks_in_turn_have_a_curve_of_their_own(make_rollouts):
    settings = {"context.other_tasks": "('cartpole_balance',)"}
    one = [r for n in (1, 2) for r in make_rollouts(n, 0, 100.0 * n, method="dt" if n == 1 else "at", settings={})]
    both = [
        r
        for n in (1, 2)
        for r in make_rollouts(n, 0, 10.0 * n, method="dt-2tasks" if n == 1 else "at-2tasks", settings=settings)
    ]
    assert names(gather([*one, *both])) == {
        "Agentic Transformer": [101, 201], "Agentic Transformer, 2 tasks in turn": [11, 21],
    }  # fmt: skip


def test_runs_whose_own_and_other_tasks_are_exchanged_are_told_apart(make_rollouts):
    """Both were trained on the task that they are measured in, and no record names another one."""
    records = [
        record
        for other, level in (("cartpole_balance", 1.0), ("cartpole_swingup", 9.0))
        for record in make_rollouts(2, 0, level, method="at-2tasks", settings={"context.other_tasks": f"('{other}',)"})
    ]
    grid = gather(records)
    assert grid.superseded == 0
    assert sorted(cell.runs()[0] for cell in grid.cells) == [2, 10]


def test_the_same_run_measured_again_still_counts_once(make_rollouts):
    settings = {"model.layers": "1"}
    old, new = make_rollouts(2, 0, 1.0, settings=settings), make_rollouts(2, 0, 5.0, settings=settings)
    grid = gather([*old, *new])
    assert grid.superseded == 2
    np.testing.assert_allclose(grid.cells[0].runs(), [6])


def test_references_are_told_apart_too(make_rollouts):
    values = {"method": "bc", "train_trajectories": None, "token_set": None}
    records = [
        *make_rollouts(1, 0, 1.0, **values, settings={}),
        *make_rollouts(1, 0, 9.0, **values, settings={"model.width": "512"}),
    ]
    assert names(gather(records)) == {
        "Behaviour cloning, model.width 128": [2], "Behaviour cloning, model.width 512": [10],
    }  # fmt: skip


def test_a_level_stands_for_the_most_episodes(make_rollouts):
    values = {"method": "bc", "train_trajectories": None}
    grid = gather([*make_rollouts(4, 0, 1.0, **values), *make_rollouts(1, 0, 9.0, **values)])
    (cell,) = grid.levels("cartpole_swingup")
    assert (cell.test, len(grid.references("cartpole_swingup"))) == (4, 2)
