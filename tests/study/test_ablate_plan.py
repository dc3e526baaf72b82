"""Plans as they are written, and their cells."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ringrl.config_files import merged, read_yaml, to_yaml
from ringrl.configs import preset
from ringrl.errors import UserError
from ringrl.evaluation.protocol import FIRST_SEED, Protocol
from ringrl.evaluation.records import append_records, data_records
from ringrl.methods import method_of
from ringrl.study.cells import Cell, attempt, cells, references, write
from ringrl.study.cost import cost
from ringrl.study.plan import AblationPlan, read_plan
from ringrl.training.checkpoints import with_checksum

BASELINES = ("bc", "bc-10%", "bc-25%", "bc-50%", "dt", "td3", "td3+bc")


def plan_of(write_plan, **changes) -> AblationPlan:
    return read_plan(write_plan(Path("x.h5"), **changes))


def test_cells_cross_lengths_seeds_and_baselines_at_equal_tokens(write_plan) -> None:
    plan = plan_of(write_plan, trajectories=[1, 2, 4], trajectories_per_batch=8, seeds=[0, 1])
    found = cells(plan)
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
    assert [method_of(cell.config) for cell in found[:4]] == ["bc", "at", "at", "at"]
    assert [[p.episodes for p in cell.protocols] for cell in found[:4]] == [[1], [1], [2], [4]]
    assert [[p.control for p in cell.protocols] for cell in found[:4]] == [[False], [False], [True], [True]]


def test_all_methods_see_equal_numbers_of_timesteps(write_plan) -> None:
    """Batches of contexts and batches of transitions alike."""
    changes = {"methods": ["at", "ad"], "baselines": list(BASELINES), "trajectories": [2, 4], "seeds": [5]}
    settings = {"model": {"token_set": "fused1"}, "context": {"best_fraction": 0.5}, "optimiser": {"steps": 64}}
    plan = plan_of(write_plan, **changes, trajectories_per_batch=8, settings=settings)
    found = {cell.folder.name: cell.config for cell in cells(plan)}
    assert {name: method_of(config) for name, config in found.items()} == {
        "bc_seed5": "bc-50%", "bc-10_seed5": "bc-10%", "bc-25_seed5": "bc-25%", "bc-50_seed5": "bc-50%",
        "dt_seed5": "dt", "td3_seed5": "td3", "td3+bc_seed5": "td3+bc",
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


def test_the_budget_steps_keeps_the_batch_size(write_plan) -> None:
    settings = {"optimiser": {"steps": 7, "batch_size": 3}}
    plan = plan_of(
        write_plan, budget="steps", trajectories=[1, 3, 5], episodes=15, settings=settings, baselines=["bc", "td3"]
    )
    optimisers = {cell.folder.name: cell.config.optimiser for cell in cells(plan)}
    assert {optimiser.steps for optimiser in optimisers.values()} == {7}
    assert {o.batch_size for name, o in optimisers.items() if name.startswith("at")} == {3}


def test_tasks_variants_and_test_lengths_are_crossed(write_plan) -> None:
    changes = {"data": None, "task": None, "datasets": {"walker_walk": "w.h5", "cartpole_swingup": "c.h5"}}
    plan = plan_of(
        write_plan, **changes, test_trajectories=[1, 4], episodes=8, baselines=["bc"], variants_only=True,
        sweep={"model.token_set": ["fused1", "dt3"]}, task_settings={"cartpole_swingup": {"optimiser": {"steps": 9}}},
    )  # fmt: skip
    found = {cell.name: cell for cell in cells(plan)}
    names = [f"{name}_token-set-{tokens}_seed0" for tokens in ("fused1", "dt3") for name in ("bc", "at_1", "at_2")]
    assert list(found) == [f"{task}/{name}" for task in ("walker_walk", "cartpole_swingup") for name in names]
    longest = found["walker_walk/at_2_token-set-dt3_seed0"]
    assert longest.config.model.token_set == "dt3"
    assert [p.episodes for p in longest.protocols] == [1, 4]
    assert [p.episodes for p in found["walker_walk/bc_token-set-dt3_seed0"].protocols] == [1]
    assert {p.environments * p.episodes for cell in found.values() for p in cell.protocols} == {8}
    for name, cell in found.items():
        assert str(cell.config.data) == ("w.h5" if name.startswith("walker") else "c.h5")
        assert cell.config.optimiser.steps == (3 if name.startswith("walker") else 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"trajectories": [1, 2, 8]},
        {"trajectories": [2, 3], "budget": "steps"},
        {"trajectories": [1, 2, 4], "test_trajectories": [2]},
        {"methods": []},
        {"parts": [{"tasks": ["jaco_reach_top_left"], "methods": ["ad"], "trajectories": [4], "baselines": []}]},
    ],
)
def test_all_cells_have_the_same_starts(write_plan, changes: dict) -> None:
    """Contexts of n episodes come in episodes / n streams, and random actions have as many episodes."""
    plan = plan_of(write_plan, episodes=24, trajectories_per_batch=8, baselines=["bc", "dt"], **changes)
    protocols = [protocol for cell in cells(plan) for protocol in cell.protocols]
    assert {(p.environments * p.episodes, p.seed) for p in protocols} == {(24, FIRST_SEED)}
    assert [r.about["episodes"] for r in references(plan) if r.about["kind"] == "random"] == [24]


def test_prompts_shorter_than_the_context_divide_the_starts(write_plan) -> None:
    prompts = {"trajectories": [3, 0, 1], "draws": 2}
    plan = plan_of(write_plan, trajectories=[1, 2, 4], trajectories_per_batch=4, episodes=8, prompts=prompts)
    found = {cell.folder.name: [p for p in cell.protocols if p.episodes == 1] for cell in cells(plan)}
    empty = Protocol(8)
    one, three = (
        [Protocol(4, seed=FIRST_SEED + 4 * draw, prompt_trajectories=k, prompt_seed=draw) for draw in (0, 1)]
        for k in (1, 3)
    )
    assert found == {
        "bc_seed0": [empty], "at_1_seed0": [empty], "at_2_seed0": [empty, *one], "at_4_seed0": [empty, *one, *three],
    }  # fmt: skip


def test_prompts_are_copied_once(write_plan) -> None:
    prompts = {"trajectories": [0, 1, 2], "draws": 2, "controls": ["shuffled"]}
    changes = {"trajectories": [2, 4], "trajectories_per_batch": 4, "episodes": 4}

    def make(**more) -> dict[str, Cell]:
        return {c.folder.name: c for c in cells(plan_of(write_plan, **changes, prompts=prompts | more))}

    plain, found = make(), make(baselines=["copy"])
    longest = found["at_4_seed0"]
    prompted = [p for p in longest.protocols if p.prompt_trajectories and p.prompt_order == "kept"]
    assert longest.prompt_only == tuple(("copy", p) for p in prompted)
    assert [p.prompt_trajectories for p in prompted] == [1, 1, 2, 2]
    assert longest.about == plain["at_4_seed0"].about | {"prompt_baselines": ["copy"]}
    simulated = cost(plain["at_4_seed0"]).simulated
    assert cost(longest).simulated == simulated + 8 * 250
    assert cost(make(baselines=["copy", "clone"])["at_4_seed0"]).simulated == simulated + 16 * 250
    for name in plain.keys() - {"at_4_seed0"}:
        assert found[name].about == plain[name].about, "finished cells of older plans remain finished"
        assert not found[name].prompt_only


def test_prompts_as_controls(write_plan) -> None:
    """Every prompt again: shuffled, and of each other task that the cell was trained on."""
    own, other = "jaco_reach_top_left", "jaco_reach_top_right"
    prompts = {"trajectories": [0, 1, 2], "draws": 1, "controls": ["shuffled", own, other]}
    changes = {"task": own, "trajectories": [4], "trajectories_per_batch": 4, "baselines": [], "prompts": prompts}
    (cell,) = cells(plan_of(write_plan, settings={"context": {"other_tasks": [other]}}, **changes))
    changed = [{}, {"prompt_task": own}, {"prompt_task": other}]
    one = [Protocol(4, prompt_trajectories=1, **change) for change in changed]
    changed.insert(1, {"prompt_order": "shuffled"})
    two = [Protocol(4, prompt_trajectories=2, **change) for change in changed]
    assert [p for p in cell.protocols if p.prompt_trajectories] == [*one, *two]
    with pytest.raises(UserError, match=f"no cell is trained on {own} and another task"):
        cells(plan_of(write_plan, **changes))


def test_a_plan_in_another_folder(write_plan, tmp_path) -> None:
    part = {"seeds": [7]}
    plan = plan_of(write_plan, data="jaco.h5", output="results", parts=[part]).inside(tmp_path / "public")
    assert {cell.config.data for cell in cells(plan)} == {tmp_path / "public" / "jaco.h5"}
    assert {cell.folder.parent.parent for cell in cells(plan)} == {tmp_path / "public" / "results"}
    assert plan_of(write_plan, output="/results").inside(tmp_path).output == Path("/results")


def test_every_task_has_references(write_plan) -> None:
    own, other, third = (f"jaco_reach_{place}" for place in ("top_left", "top_right", "bottom_left"))
    plan = plan_of(
        write_plan, task=own, trajectories=[2], test_tasks=[third], settings={"context": {"other_tasks": [other]}}
    )
    found = [(one.about["task"], one.about["kind"], one.about.get("data")) for one in references(plan, {own: "abc"})]
    kinds = [("random", None), ("data", "abc")]
    assert sorted(found, key=str) == sorted([(task, *kind) for task in (own, other, third) for kind in kinds], key=str)


def test_references_of_test_tasks_use_the_first_dataset_of_their_domain(write_plan) -> None:
    files = {"walker_walk": "w.h5", "jaco_reach_top_left": "a.h5", "jaco_reach_top_right": "b.h5"}
    fingerprints = {task: f"of {file}" for task, file in files.items()}
    test_tasks = ["jaco_reach_bottom_left", "walker_run"]
    plan = plan_of(write_plan, data=None, task=None, datasets=files, trajectories=[2], test_tasks=test_tasks)
    found = {(one.about["task"], str(one.data), one.about.get("data")) for one in references(plan, fingerprints)}
    expected = files | {"jaco_reach_bottom_left": "a.h5", "walker_run": "w.h5"}
    assert found == {(task, file, of) for task, file in expected.items() for of in (None, f"of {file}")}


def test_tasks_that_are_not_trained_on_are_evaluated(write_plan) -> None:
    own, more = "jaco_reach_top_left", ["jaco_reach_top_right", "jaco_reach_top_left"]
    found = cells(plan_of(write_plan, task=own, trajectories=[2], test_tasks=more))
    for cell in found:
        assert cell.config.tasks == (own,)
        assert cell.tasks == (own, more[0])
        assert cell.about["test_tasks"] == more[:2]
        assert cost(cell).simulated == (2 * 4 if "at" in cell.folder.name else 4) * 250 * 2, "both tasks, control"
    assert "test_tasks" not in cells(plan_of(write_plan, task=own, trajectories=[2]))[0].about
    two = {"data": None, "task": None, "datasets": {own: "jaco.h5", "walker_walk": "walker.h5"}}
    found = cells(plan_of(write_plan, **two, trajectories=[2], test_tasks=more[:1]))
    assert {(cell.config.task, cell.tasks) for cell in found} == {
        (own, (own, more[0])),
        ("walker_walk", ("walker_walk",)),
    }
    with pytest.raises(UserError, match="test_tasks: the plan has no dataset for walker_walk; leave it out"):
        cells(plan_of(write_plan, task=own, test_tasks=["walker_walk"]))


def test_methods_leave_out_settings_without_effect(write_plan) -> None:
    """Only algorithm distillation has a stride in its history. Methods without a context have no segments."""
    context = {"history_stride": 2, "segment_steps": 50, "segment_start_share": 0.2}
    context |= {"first_steps": 5, "first_steps_weight": 50}
    settings = {"context": context, "model": {"past_rewards": "off"}}
    baselines = ["bc", "bc-10%", "dt", "td3+bc"]
    found = cells(plan_of(write_plan, methods=["at", "ad"], trajectories=[2], baselines=baselines, settings=settings))
    contexts = {cell.folder.name: cell.config.context for cell in found}
    assert [name for name, context in contexts.items() if context.history_stride == 2] == ["ad_2_seed0"]
    assert {name for name, context in contexts.items() if context.segment_steps is None} >= {"bc_seed0", "bc-10_seed0"}


def test_variants_change_one_setting_of_every_cell(write_plan) -> None:
    """The settings of a variant override the settings of a method."""
    variants = {"as collected": {"context": {"order": "history"}}, "wide": {"model": {"width": 32}}}
    changes = {"trajectories": [2], "baselines": ["bc"], "variants": variants}
    found = {cell.folder.name: cell for cell in cells(plan_of(write_plan, **changes))}
    names = ["", "_as-collected", "_wide"]
    assert list(found) == [f"{method}{name}_seed0" for name in names for method in ("bc", "at_2")]
    assert [cell.variant for cell in found.values()] == [None, None, "as collected", "as collected", "wide", "wide"]
    base = found["at_2_seed0"].config
    for name, change in (("as-collected", {"context": {"order": "history"}}), ("wide", {"model": {"width": 32}})):
        cell = found[f"at_2_{name}_seed0"]
        assert cell.config == type(base).model_validate(merged(base.model_dump(), change | {"run": cell.folder}))
    only = plan_of(write_plan, **changes, variants_only=True)
    assert [cell.folder.name for cell in cells(only)] == list(found)[2:]


def test_a_decision_transformer_of_twenty_steps(write_plan) -> None:
    variants = {"20 steps": {"context": {"segment_steps": 20, "segment_start_share": 0}}}
    part = {"methods": [], "baselines": ["dt"], "budget": "steps", "variants_only": True, "variants": variants}
    found = {cell.folder.name: cell for cell in cells(plan_of(write_plan, baselines=["dt"], parts=[part]))}
    context = found["dt_20-steps_seed0"].config.context
    assert (context.steps(250), context.segment_start_share, context.target) == (20, 0, "own")
    assert found["dt_seed0"].config.context.steps(250) == 250
    assert len(found) == 4


def test_a_sweep_makes_a_variant_of_every_combination(write_plan) -> None:
    sweep = {"optimiser.learning_rate": [0.001, 0.003], "model.episode_window": [5, None, [1, 20]]}
    layers = {"settings": {"model": {"layers": 2}}, "baselines": [], "trajectories": [1], "variants_only": True}
    part = {"trajectories": [2], "sweep": {"model.width": [32]}}
    found = {cell.variant: cell for cell in cells(plan_of(write_plan, **layers, sweep=sweep, parts=[part]))}
    assert {name: (c.config.optimiser.learning_rate, c.config.model.episode_window) for name, c in found.items()} == {
        "learning rate 0.001, episode window 5": (0.001, (5,)),
        "learning rate 0.001, episode window none": (0.001, ()),
        "learning rate 0.001, episode window [1, 20]": (0.001, (1, 20)),
        "learning rate 0.003, episode window 5": (0.003, (5,)),
        "learning rate 0.003, episode window none": (0.003, ()),
        "learning rate 0.003, episode window [1, 20]": (0.003, (1, 20)),
        "width 32": (0.001, ()),
    }
    assert found["learning rate 0.001, episode window [1, 20]"].folder.name.startswith("at_1_learning-rate-0.001-epis")
    with pytest.raises(UserError, match="optimiser: there is no setting learning_rat; did you mean learning_rate"):
        cells(plan_of(write_plan, sweep={"optimiser.learning_rat": [1]}))


def test_parts_override_keys_of_the_plan_and_merge_settings(write_plan) -> None:
    tasks = ["jaco_reach_top_left", "jaco_reach_top_right"]
    part = {
        "tasks": tasks[1:], "methods": ["at"], "baselines": [], "budget": "steps", "episodes": 6, "trajectories": [3],
        "settings": {"optimiser": {"batch_size": 5}}, "seeds": [1],
    }  # fmt: skip
    changes = {"task": None, "tasks": tasks, "methods": [], "baselines": ["bc"], "seeds": [0, 1]}
    plan = plan_of(write_plan, **changes, parts=[part])
    found = {cell.name: cell for cell in cells(plan)}
    assert list(found) == [
        f"{tasks[0]}/bc_seed0", f"{tasks[1]}/bc_seed0", f"{tasks[0]}/bc_seed1", f"{tasks[1]}/bc_seed1",
        f"{tasks[1]}/at_3_seed1",
    ]  # fmt: skip
    config = found[f"{tasks[1]}/at_3_seed1"].config
    assert (config.optimiser.batch_size, config.optimiser.steps, config.model.width) == (5, 3, 16)
    assert found[f"{tasks[1]}/bc_seed1"].config.optimiser.batch_size == 2
    random = {r.about["task"]: r.about["episodes"] for r in references(plan) if r.about["kind"] == "random"}
    assert random == {tasks[0]: 4, tasks[1]: 6}, "the references of a task cover all of its cells"
    with pytest.raises(UserError, match=r"jaco_reach_top_right/bc_seed0: two parts of the plan make this cell"):
        cells(plan_of(write_plan, **changes, parts=[{"tasks": tasks[1:]}]))
    with pytest.raises(UserError, match=r"^parts\.0: settings: optimiser\.batch_size: has no effect"):
        cells(plan_of(write_plan, **changes, parts=[part | {"budget": "tokens", "trajectories": [1]}]))


def finish(work, seconds: float = 1.0) -> None:
    """Leave the files of a finished cell."""
    write(work.folder / "cell.yaml", to_yaml(with_checksum(work.about)))
    write(work.folder / "evaluation.jsonl", "")
    append_records(work.folder / "evaluation.jsonl", data_records("x", np.ones(1), data_fingerprint="", versions={}))
    write(work.folder / "finished.json", json.dumps({"did": work.about, "seconds": seconds}))


def test_finished_cells_are_recognised(write_plan) -> None:
    """More to roll out is rolled out; other data or fewer episodes are rejected; lost results are redone."""
    before = {"trajectories": [2], "baselines": [], "trajectories_per_batch": 4}

    def make(data: str = "abc", **changes):
        return cells(plan_of(write_plan, **before | changes), {"jaco_reach_top_left": data})[0]

    cell = make()
    finish(cell)
    assert cell.is_finished
    cell.check()
    prompted = make(prompts={"trajectories": [0, 1], "draws": 2})
    for more in (make(trajectories=[2, 4]), make(episodes=8), make(test_trajectories=[1, 2]), prompted):
        assert more.is_finished == (more.about == cell.about)
        more.check()
    for other, words in (
        (make("xyz"), r"cell\.yaml: data was abc, but is xyz in the plan"),
        (make(episodes=2), "episodes was 4, but is 2 in the plan"),
        (make(control=False), "control was True, but is False in the plan"),
    ):
        assert not other.is_finished
        with pytest.raises(UserError, match=words):
            other.check()
    finish(prompted)
    with pytest.raises(UserError, match="episodes was 4, but is 8 in the plan"):  # draws divide the starts
        make(prompts={"trajectories": [0, 1], "draws": 2}, episodes=8).check()
    finish(cell)
    whole = (cell.folder / "evaluation.jsonl").read_text()
    for damaged in ("", whole.replace("1.0", "2.0")):
        (cell.folder / "evaluation.jsonl").write_text(damaged)
        assert not cell.is_finished


def test_tasks_and_baselines_can_be_added_to_a_finished_cell(write_plan) -> None:
    places = ["jaco_reach_top_right", "jaco_reach_bottom_left"]
    prompts = {"trajectories": [0, 1], "draws": 2}

    def make(tasks: list[str], baselines: list[str]) -> Cell:
        changes = {"test_tasks": tasks, "prompts": prompts | {"baselines": baselines}}
        return cells(plan_of(write_plan, trajectories=[2], baselines=[], **changes))[0]

    finish(make(places[:1], ["copy"]))
    for more in (make(places, ["copy"]), make(places[:1], ["copy", "clone"])):
        more.check()
        assert not more.is_finished


def test_a_changed_description_of_a_cell_is_noticed(write_plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "run", lambda self, command: None)
    variants = {"variants": {"NAME": {"model": {"loss_on": "last"}}}, "variants_only": True}
    plan = write_plan(Path("x.h5"), trajectories=[2], baselines=[], **variants)
    plan.write_text(plan.read_text().replace("NAME", "'08'"))  # a number to other readers of YAML
    (cell,) = cells(read_plan(plan))
    results = cell.folder / "evaluation.jsonl"
    write(results, "")
    append_records(results, data_records("x", np.ones(2), data_fingerprint="", versions={}))
    assert attempt(cell, None) is None
    cell.check()
    path = cell.folder / "cell.yaml"
    whole = path.read_text()
    for damaged, words in (
        (whole.replace("episodes: 4", "episodes: 2"), "was edited or damaged (its checksum differs)"),
        (whole[: whole.index("data:")], "was edited or damaged (its checksum differs)"),
        ("", "is empty"),
    ):
        path.write_text(damaged)
        with pytest.raises(UserError, match=rf"^{re.escape(f'{path}: {words}')}.*") as error:
            cell.check()
        assert "; remove it if" in str(error.value)
    assert cell.is_finished
    lines = results.read_text()
    results.write_text(lines.partition("\n")[0] + "\n")
    assert not cell.is_finished, "a whole line is gone"
    results.write_text(lines)
    finished = cell.folder / "finished.json"
    assert cell.seconds is not None
    whole = finished.read_text()
    for damaged in (whole.replace('"seconds": ', '"seconds": 1'), whole[:-9], "", "[]\n"):
        finished.write_text(damaged)
        assert not cell.is_finished
        assert cell.seconds is None


def test_a_cell_whose_environment_ends_python_has_failed(write_plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "run", lambda self, command: sys.exit(0))
    (cell,) = cells(plan_of(write_plan, trajectories=[2], baselines=[]))
    assert attempt(cell, None) == "SystemExit: 0"


def test_the_reference_belongs_to_one_dataset(write_plan) -> None:
    plan = plan_of(write_plan)
    (data,) = [r for r in references(plan, {"jaco_reach_top_left": "abc"}) if r.about["kind"] == "data"]
    finish(data)
    assert data.is_finished
    (other,) = [r for r in references(plan, {"jaco_reach_top_left": "xyz"}) if r.about["kind"] == "data"]
    with pytest.raises(UserError, match="data was abc, but is xyz in the plan"):
        other.check()


def test_several_tasks_of_one_dataset(write_plan) -> None:
    plan = plan_of(write_plan, task=None, tasks=["walker_walk", "walker_run"])
    assert plan.datasets == {"walker_walk": Path("x.h5"), "walker_run": Path("x.h5")}


def test_the_demos_cells() -> None:
    """The quick start shows their returns."""
    plan = AblationPlan.model_validate(read_yaml(preset("demo")) | {"data": "x.h5", "output": "runs"})
    found = cells(plan)
    names = ["at_8_no-target", "bc-10"]
    assert [cell.folder.name for cell in found] == [f"{name}_seed{seed}" for seed in (0, 1) for name in names]
    transformer, cloning = (cell.config for cell in found[:2])
    assert (cloning.model.kind, cloning.model.layers, cloning.model.width) == ("behaviour_cloning", 2, 256)
    assert (cloning.context.other_tasks, cloning.context.best_fraction) == ((), 0.1)
    tasks = ("point_mass_maze_reach_top_right", "point_mass_maze_reach_bottom_left")
    assert transformer.tasks == tasks
    context = transformer.context
    assert (context.trajectories, context.segment_steps, context.best_fraction, context.target) == (8, 32, 0.4, "none")
    prompts = {(p.prompt_trajectories, p.prompt_task) for p in found[0].protocols}
    assert prompts == {(0, None), *((length, task) for length in (1, 7) for task in (None, *tasks))}
