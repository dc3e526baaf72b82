"""Errors in plans and in their settings, one line each."""

import errno
from pathlib import Path

import pytest

from ringrl.config_files import merged
from ringrl.errors import UserError
from ringrl.study.cells import cells, write
from ringrl.study.plan import AblationPlan, read_plan


def plan_of(write_plan, **changes) -> AblationPlan:
    return read_plan(write_plan(Path("x.h5"), **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trajectories": [3]}, "3 does not divide"),
        ({"trajectories": [0]}, r"trajectories\.0: expected greater than or equal to 1"),
        ({"trajectories": []}, "trajectories"),
        ({"seeds": "many"}, "seeds"),
        ({"seeds": [1, 1]}, "seeds: contains a value twice"),
        ({"seeds": [0, -1]}, r"seeds\.1: expected greater than or equal to 0"),
        ({"seeds": [2**32]}, r"seeds\.0: .*less than 4294967296"),
        ({"seeds": 3}, "seeds: expected a list"),
        ({"unknown": 1}, "there is no setting unknown; choose from datasets, output"),
        ({"baseline": ["bc"]}, "there is no setting baseline; did you mean baselines"),
        ({"baselines": ["at"]}, r"baselines\.0: .*'bc', 'bc-10%', 'bc-25%', 'bc-50%', 'dt', 'td3' or 'td3\+bc'"),
        ({"methods": ["dt"]}, r"methods\.0: .*'at' or 'ad'"),
        ({"methods": [], "baselines": []}, "name at least one"),
        ({"budget": "money"}, "budget: .*'tokens' or 'steps'"),
        ({"task": "walker_wlak"}, "walker_walk"),
        ({"test_tasks": ["walker_wlak"]}, "walker_walk"),
        ({"test_tasks": ["walker_walk", "walker_walk"]}, "test_tasks: contains a value twice"),
        ({"tasks": ["walker_walk"]}, "data with task, or data with tasks"),
        ({"data": None}, "give datasets"),
        ({"datasets": {"walker_walk": "x.h5"}}, "give datasets"),
        ({"task": None, "tasks": "walker_walk"}, "a list of names"),
        ({"task_settings": {"walker_walk": {}}}, "walker_walk is not a task of the plan"),
        ({"episodes": 3}, "episodes: 3 cannot be divided into contexts of 1, 2 episodes; give a multiple of 2"),
        ({"prompts": {"trajectories": [0, 1]}}, "2 episodes and 5 prompts; give a multiple of 10"),
        ({"prompts": {"trajectories": [-1]}}, r"prompts\.trajectories\.0: expected greater than or equal to 0"),
        ({"variants_only": True}, "variants_only: there are no variants"),
        ({"parts": [{"tasks": ["walker_walk"]}]}, r"parts\.0: tasks: \['walker_walk'\] is not a list of tasks"),
        ({"parts": [{}, {"output": "x"}]}, r"parts\.1: output cannot differ between the parts"),
        ({"sweep": {"model.layers": 2}}, r"sweep: give a list of values for each setting, as in \{optimiser"),
        ({"sweep": {"seed": [1, 1]}}, "sweep: contains a value twice"),
        (
            {"sweep": {"model.layers": [1]}, "variants": {"x": {}}},
            "sweep: makes variants of its own; leave variants out",
        ),
        ({"parts": [{"seed": 1}]}, r"parts\.0: there is no setting seed; did you mean seeds"),
        ({"parts": [{"settings": 3}]}, r"parts\.0: settings"),
    ],
)
def test_errors_in_plans_name_the_key(write_plan, changes: dict[str, object], words: str) -> None:
    path = write_plan(Path("x.h5"), **changes)
    with pytest.raises(UserError, match=words) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_best_checkpoint_needs_held_out_episodes(write_plan) -> None:
    with pytest.raises(UserError, match="at_1: checkpoint: best needs held-out episodes; set validation_fraction in"):
        cells(plan_of(write_plan, baselines=[], checkpoint="best"))


def test_errors_in_settings_name_the_setting(write_plan) -> None:
    plan = plan_of(write_plan, settings=merged({}, {"model": {"layers": 0}}))
    with pytest.raises(UserError, match=r"model\.layers"):
        cells(plan)
    tasks = ["jaco_reach_top_left", "jaco_reach_top_right"]
    plan = plan_of(write_plan, task=None, tasks=tasks, task_settings={tasks[1]: {"optimiser": {"steps": 0}}})
    with pytest.raises(UserError, match=rf"^{tasks[1]}, bc: .*task_settings .*optimiser\.steps"):
        cells(plan)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"context": {"order": "random"}}}, r"^settings: context\.order: has no effect"),
        ({"settings": {"context": {"trajectories": 8}}}, r"^settings: context\.trajectories: has no effect"),
        ({"settings": {"seed": 5}}, "^settings: seed: has no effect"),
        ({"settings": {"optimiser": {"batch_size": 64}}}, r"batch_size: has no effect.*use trajectories_per_batch"),
        ({"task_settings": {"jaco_reach_top_left": {"context": {"target": "own"}}}},
         r"^task_settings: jaco_reach_top_left: context\.target: has no effect"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_rejected(write_plan, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cells(plan_of(write_plan, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"context": {"best_fraction": 0.5}}, "baselines": ["bc-10%"]},
        {"settings": {"optimiser": {"steps": 64}}, "baselines": ["td3+bc"], "methods": [], "trajectories": [1]},
        {"settings": {"optimiser": {"batch_size": 64}}, "budget": "steps"},
    ],
)
def test_settings_with_effect_are_accepted(write_plan, changes: dict[str, object]) -> None:
    assert cells(plan_of(write_plan, **changes))


def test_a_failed_write_leaves_the_old_file_and_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "failed.txt", "before")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"failed\.txt: the disk, .* is full .*: free some space"):
            write(tmp_path / "failed.txt", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("failed.txt", "before")]
