"""Plans as they are written, and the cells that they make."""

import errno
import json
from pathlib import Path

import pytest
import yaml

from ringrl.config import merged, read_yaml
from ringrl.configs import preset
from ringrl.errors import UserError
from ringrl.evaluation.protocol import FIRST_SEED
from ringrl.methods import method_of
from ringrl.study.cells import cells, check, is_finished, references, write
from ringrl.study.cost import cost
from ringrl.study.plan import AblationPlan, read_plan
from ringrl.study.timing import Timing, shape

BASELINES = ("bc", "bc-10%", "dt", "td3", "td3+bc")


def plan_of(write_plan, **changes) -> AblationPlan:
    return read_plan(write_plan(Path("x.h5"), **changes))


def test_cells_cross_lengths_seeds_and_baselines_at_equal_tokens(write_plan) -> None:
    plan = plan_of(write_plan, trajectories=[1, 2, 4], trajectories_per_batch=8, seeds=[0, 1])
    found = list(cells(plan))
    assert len(found) == 2 * (3 + 1)
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        config = cell.config
        assert config.context.trajectories * config.optimiser.batch_size == 8
        assert config.run == plan.output / cell.name
        assert config.optimiser.steps == 3
    assert [cell.config.seed for cell in found] == [0] * 4 + [1] * 4
    names = ["bc_seed0", "at_1_seed0", "at_2_seed0", "at_4_seed0"]
    assert [cell.name for cell in found[:4]] == [f"jaco_reach_top_left/{name}" for name in names]
    assert [method_of(cell.config) for cell in found[:4]] == ["bc", "dt", "at", "at"]
    assert [[p.episodes for p in cell.protocols] for cell in found[:4]] == [[1], [1], [2], [4]]
    assert [[p.control for p in cell.protocols] for cell in found[:4]] == [[False], [False], [True], [True]]


def test_every_method_may_stand_beside_the_others_and_sees_as_much(write_plan) -> None:
    """Of steps of 250, jaco's episodes, whatever a batch is made of."""
    changes = {"methods": ["at", "ad"], "baselines": list(BASELINES), "trajectories": [2, 4], "seeds": [5]}
    settings = {"model": {"token_set": "fused1"}, "context": {"best_fraction": 0.5}, "optimiser": {"steps": 64}}
    plan = plan_of(write_plan, **changes, trajectories_per_batch=8, settings=settings)
    found = {cell.folder.name: cell.config for cell in cells(plan)}
    assert {name: method_of(config) for name, config in found.items()} == {
        "bc_seed5": "bc-50%", "bc-10_seed5": "bc-10%", "dt_seed5": "dt", "td3_seed5": "td3", "td3+bc_seed5": "td3+bc",
        "at_2_seed5": "at", "at_4_seed5": "at", "ad_2_seed5": "ad", "ad_4_seed5": "ad",
    }  # fmt: skip
    for config in found.values():
        optimiser = config.optimiser
        row = 1 if config.model.kind == "td3_bc" else 250 * config.context.trajectories
        assert optimiser.steps * optimiser.batch_size * row == 64 * 8 * 250
        assert config.seed == 5
    assert found["td3_seed5"].optimiser.batch_size == 256
    assert found["at_2_seed5"].model.token_set == "fused1"
    assert found["dt_seed5"].model.token_set == "dt3"
    assert found["ad_4_seed5"].context.best_fraction == 1, "a history has no gaps"


def test_the_budget_of_steps_leaves_the_contexts_of_a_batch_alone(write_plan) -> None:
    settings = {"optimiser": {"steps": 7, "batch_size": 3}}
    plan = plan_of(write_plan, budget="steps", trajectories=[1, 3, 5], settings=settings, baselines=["bc", "td3"])
    optimisers = {cell.folder.name: cell.config.optimiser for cell in cells(plan)}
    assert {optimiser.steps for optimiser in optimisers.values()} == {7}
    assert {o.batch_size for name, o in optimisers.items() if name.startswith("at")} == {3}


def test_tasks_token_sets_and_test_lengths_are_crossed(write_plan) -> None:
    changes = {"data": None, "task": None, "datasets": {"walker_walk": "w.h5", "cartpole_swingup": "c.h5"}}
    plan = plan_of(
        write_plan, **changes, token_sets=["fused1", "dt3"], test_trajectories=[1, 4], seeds=[0], baselines=["bc"],
        task_settings={"cartpole_swingup": {"optimiser": {"steps": 9}}},
    )  # fmt: skip
    found = {cell.name: cell for cell in cells(plan)}
    names = ["bc_seed0", "at_1_fused1_seed0", "at_2_fused1_seed0", "at_1_dt3_seed0", "at_2_dt3_seed0"]
    assert list(found) == [f"{task}/{name}" for task in ("walker_walk", "cartpole_swingup") for name in names]
    assert found["walker_walk/at_2_dt3_seed0"].config.model.token_set == "dt3"
    assert [p.episodes for p in found["walker_walk/at_2_dt3_seed0"].protocols] == [1, 4]
    assert [p.episodes for p in found["walker_walk/bc_seed0"].protocols] == [1]
    assert {p.environments * p.episodes for cell in found.values() for p in cell.protocols} == {8}
    for name, cell in found.items():
        assert str(cell.config.data) == ("w.h5" if name.startswith("walker") else "c.h5")
        assert cell.config.optimiser.steps == (3 if name.startswith("walker") else 9)


@pytest.mark.parametrize(
    ("changes", "episodes"),
    [
        ({"trajectories": [1, 2, 8]}, 3 * 8),
        ({"trajectories": [2, 3], "budget": "steps"}, 3 * 6),
        ({"trajectories": [1, 2, 4], "test_trajectories": [2]}, 3 * 2),
        ({"methods": []}, 3),
    ],
)
def test_everything_is_rolled_out_from_the_same_starts(write_plan, changes: dict, episodes: int) -> None:
    """Whatever the length, all cells play as many whole contexts as give as many episodes, and random actions too."""
    plan = plan_of(write_plan, environments=3, trajectories_per_batch=8, baselines=["bc", "dt"], **changes)
    protocols = [protocol for cell in cells(plan) for protocol in cell.protocols]
    assert {(p.environments * p.episodes, p.seed) for p in protocols} == {(episodes, FIRST_SEED)}
    assert {reference.episodes for reference in references(plan)} == {episodes}


def test_videos_are_of_the_lowest_seed(write_plan) -> None:
    plan = plan_of(write_plan, seeds=[4, 2], baselines=["bc"], videos=True)
    assert {cell.folder.name for cell in cells(plan) if cell.videos} == {"bc_seed2", "at_1_seed2", "at_2_seed2"}


def finish(work) -> None:
    """As if it had been done."""
    write(work.folder / "cell.yaml", yaml.safe_dump(work.describe()))
    write(work.folder / "evaluation.jsonl", "{}")
    write(work.folder / "finished.json", json.dumps({"did": work.describe()}))


def test_what_is_finished_is_finished_as_it_is_now(write_plan) -> None:
    """More to roll out is done; other seconds, data or streams are another study's, and what is missing is made."""
    before = {"trajectories": [2], "baselines": [], "budget": "time", "seconds": 60.0, "trajectories_per_batch": 4}
    (cell,) = cells(plan_of(write_plan, **before), {"jaco_reach_top_left": "abc"})
    finish(cell)
    assert is_finished(cell)
    check(cell)
    longer = next(cells(plan_of(write_plan, **before | {"trajectories": [2, 4]}), {"jaco_reach_top_left": "abc"}))
    filmed = next(cells(plan_of(write_plan, **before, videos=True), {"jaco_reach_top_left": "abc"}))
    for more in (longer, filmed):
        assert not is_finished(more)
        check(more)
    for changes, data, said in (
        ({"seconds": 90.0}, "abc", r"cell\.yaml: seconds was 60\.0, the plan says 90\.0"),
        ({}, "xyz", r"cell\.yaml: data was abc, the plan says xyz"),
        ({"environments": 9}, "abc", "environments was 2, the plan says 9"),
        ({"control": False}, "abc", "control was True, the plan says False"),
    ):
        (other,) = cells(plan_of(write_plan, **before | changes), {"jaco_reach_top_left": data})
        assert not is_finished(other)
        with pytest.raises(UserError, match=said):
            check(other)
    (cell.folder / "evaluation.jsonl").write_text("")
    assert not is_finished(cell)
    finish(filmed)
    assert is_finished(filmed)
    assert is_finished(cell), "and filmed besides"


def test_what_is_trained_costs_no_training_any_more(write_plan) -> None:
    (cell,) = cells(plan_of(write_plan, trajectories=[2], baselines=[], settings={"optimiser": {"steps": 30}}))
    timings = {shape(cell): Timing(start=5.0, step=2.0, evaluation=7.0)}
    whole = cost(cell, timings)
    assert (whole.steps, whole.tokens, whole.seconds) == (30, 30 * 2 * 250 * 4, 5 + 60 + 7)
    assert whole.simulated == 2 * 2 * 250 * 2, "streams, episodes, steps, and the control"
    for name in ("10", "20", "25.orbax-checkpoint-tmp"):
        (cell.folder / "checkpoints" / name).mkdir(parents=True)
    rest = cost(cell, timings)
    assert (rest.steps, rest.simulated, rest.seconds) == (10, whole.simulated, 5 + 20 + 7)


def test_the_datasets_returns_are_of_the_dataset_that_is_there(write_plan) -> None:
    plan = plan_of(write_plan)
    (data,) = [r for r in references(plan, {"jaco_reach_top_left": "abc"}) if r.kind == "data"]
    finish(data)
    assert is_finished(data)
    (other,) = [r for r in references(plan, {"jaco_reach_top_left": "xyz"}) if r.kind == "data"]
    with pytest.raises(UserError, match="data was abc, the plan says xyz"):
        check(other)


def test_several_tasks_of_one_dataset(write_plan) -> None:
    plan = plan_of(write_plan, task=None, tasks=["walker_walk", "walker_run"])
    assert plan.datasets == {"walker_walk": Path("x.h5"), "walker_run": Path("x.h5")}


def test_the_demos_cells() -> None:
    """What docs/results.md and the README show is of these."""
    plan = AblationPlan.model_validate(read_yaml(preset("demo")) | {"data": "x.h5", "output": "runs"})
    found = list(cells(plan))
    names = ["bc", "at_1", "at_2", "at_4"]
    assert [cell.folder.name for cell in found] == [f"{name}_seed{seed}" for seed in (0, 1) for name in names]
    cloning, *transformers = (cell.config for cell in found[:4])
    assert (cloning.model.kind, cloning.model.layers, cloning.model.width) == ("behaviour_cloning", 2, 256)
    assert [config.optimiser.batch_size for config in (cloning, *transformers)] == [4, 4, 2, 1]
    for config in (cloning, *transformers):
        context, optimiser = config.context, config.optimiser
        assert (context.order, context.target, context.sampling) == ("ascending", "best", "uniform")
        assert (context.best_fraction, optimiser.steps, optimiser.learning_rate) == (0.5, 400, 0.003)
    assert {(c.model.token_set, c.model.layers, c.model.width) for c in transformers} == {("fused1", 1, 64)}


def test_the_example_crosses_what_its_head_says() -> None:
    plan = read_plan(preset("study_example"))
    assert len(plan.datasets) == 2
    assert len(list(cells(plan))) == 2 * 3 * (4 + 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trajectories": [3]}, "3 does not divide"),
        ({"trajectories": [0]}, "0 trajectories are too few"),
        ({"trajectories": []}, "trajectories"),
        ({"seeds": "many"}, "seeds"),
        ({"seeds": [1, 1]}, "seeds: a value stands there twice"),
        ({"seeds": [0, -1]}, r"seeds\.1: .*greater than or equal to 0"),
        ({"seeds": [2**32]}, r"seeds\.0: .*less than 4294967296"),
        ({"seeds": 3}, "seeds: give a list"),
        ({"unknown": 1}, "there is no setting unknown; choose from datasets, output"),
        ({"baseline": ["bc"]}, "there is no setting baseline; did you mean baselines"),
        ({"baselines": ["at"]}, r"baselines\.0: .*'bc', 'bc-10%', 'dt', 'td3' or 'td3\+bc'"),
        ({"methods": ["dt"]}, r"methods\.0: .*'at' or 'ad'"),
        ({"methods": [], "baselines": []}, "name at least one"),
        ({"budget": "money"}, "budget: .*'tokens', 'steps' or 'time'"),
        ({"task": "walker_wlak"}, "walker_walk"),
        ({"tasks": ["walker_walk"]}, "data with task, or data with tasks"),
        ({"data": None}, "give datasets"),
        ({"datasets": {"walker_walk": "x.h5"}}, "give datasets"),
        ({"task": None, "tasks": "walker_walk"}, "a list of names"),
        ({"task_settings": {"walker_walk": {}}}, "walker_walk is none of the plan's tasks"),
    ],
)
def test_wrong_plans_are_refused_by_name(write_plan, changes: dict[str, object], said: str) -> None:
    path = write_plan(Path("x.h5"), **changes)
    with pytest.raises(UserError, match=said) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_refused_by_name(write_plan) -> None:
    plan = plan_of(write_plan, settings=merged({}, {"model": {"layers": 0}}))
    with pytest.raises(UserError, match=r"model\.layers"):
        list(cells(plan))
    tasks = ["jaco_reach_top_left", "jaco_reach_top_right"]
    plan = plan_of(write_plan, task=None, tasks=tasks, task_settings={tasks[1]: {"optimiser": {"steps": 0}}})
    with pytest.raises(UserError, match=rf"^{tasks[1]}, bc: .*task_settings .*optimiser\.steps"):
        list(cells(plan))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"context": {"order": "random"}}}, r"^settings: context\.order: has no effect"),
        ({"settings": {"context": {"trajectories": 8}}}, r"^settings: context\.trajectories: has no effect"),
        ({"settings": {"seed": 5}}, "^settings: seed: has no effect"),
        ({"settings": {"optimiser": {"batch_size": 64}}}, r"^settings: optimiser\.batch_size: has no effect"),
        ({"task_settings": {"jaco_reach_top_left": {"context": {"target": "own"}}}},
         r"^task_settings: jaco_reach_top_left: context\.target: has no effect"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(write_plan, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(cells(plan_of(write_plan, **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"context": {"best_fraction": 0.5}}, "baselines": ["bc-10%"]},
        {"settings": {"optimiser": {"steps": 64}}, "baselines": ["td3+bc"], "methods": [], "trajectories": [1]},
        {"settings": {"optimiser": {"batch_size": 64}}, "budget": "steps"},
    ],
)
def test_settings_with_effect_are_not(write_plan, changes: dict[str, object]) -> None:
    assert list(cells(plan_of(write_plan, **changes)))


def test_what_cannot_be_written_leaves_nothing_and_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "failed.txt", "before")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"failed\.txt: cannot be written \(No space left on device\); free some"):
            write(tmp_path / "failed.txt", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("failed.txt", "before")]


def test_settings_of_a_run_are_told_from_a_plan() -> None:
    with pytest.raises(UserError, match=r"tiny\.yaml: is a file of settings for `ringrl train --config`, not a plan"):
        read_plan(preset("tiny"))
