"""Names and settings of methods are consistent, and every method trains and evaluates."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from ringrl.config import TrainConfig
from ringrl.config_files import merged, read_yaml
from ringrl.configs import preset
from ringrl.data import EpisodeStore
from ringrl.errors import UserError
from ringrl.evaluation import Protocol, evaluate_policy, load_policy, random_evaluation, roll_out
from ringrl.methods import METHODS, MethodName, check_method, method_of, title_of
from ringrl.training import train

REQUIRED = {"data": "unused", "task": "jaco_reach_top_left", "run": "unused"}
TRAINED = get_args(MethodName)
SHARED = {
    "model": {"layers": 1, "width": 16, "heads": 1, "kv_heads": 1, "token_set": "fused1"},
    "optimiser": {"steps": 3, "batch_size": 2, "warmup_steps": 0},
}
SMALL = {"model": {"layers": 1, "width": 16}, "optimiser": {"batch_size": 2}}


def config_of(name: str, *shared: dict) -> TrainConfig:
    values: dict = dict(REQUIRED)
    for settings in (*shared, METHODS[name].settings):
        values = merged(values, settings or {})
    return TrainConfig.model_validate(values)


def test_the_table_contains_all_trained_methods_and_random() -> None:
    assert {name for name, method in METHODS.items() if method.settings is not None} == set(TRAINED)
    assert set(METHODS) == {*TRAINED, "random", "copy", "clone"}
    with pytest.raises(TypeError):
        METHODS["new"] = METHODS["bc"]  # type: ignore[index]


@pytest.mark.parametrize("name", TRAINED)
def test_method_of_inverts_the_table(name: MethodName) -> None:
    assert method_of(config_of(name)) == name
    assert method_of(config_of(name, read_yaml(preset("small")))) == name
    check_method(config_of(name), name)


@pytest.mark.parametrize("name", TRAINED)
def test_other_tasks_apply_to_methods_with_a_context_only(name: MethodName) -> None:
    """Methods without a context ignore other tasks, so that one plan fits all methods."""
    others = {"context": {"other_tasks": ["jaco_reach_top_right", "jaco_reach_bottom_left"]}}
    config = config_of(name, others)
    assert method_of(config) == (f"{name}-3tasks" if config.model.kind == "transformer" else name)
    assert bool(config.context.other_tasks) == (config.model.kind == "transformer")
    check_method(config, name)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("other", TRAINED)
def test_a_method_overrides_the_settings_of_another(name: MethodName, other: MethodName) -> None:
    """On the command line, --method overrides --config."""
    config = config_of(name, METHODS[other].settings, {"context": {"trajectories": 4}})
    if other == "ad" and name in ("at", "dt"):  # the user chooses the sampling of at and dt
        with pytest.raises(UserError, match=f"--method {name}: context.sampling history_window belongs to ad"):
            check_method(config, name)
        return
    check_method(config, name)


@pytest.mark.parametrize("token_set", ["at5", "ring4", "fused1"])
def test_token_sets_of_the_agentic_transformer_are_free(token_set: str) -> None:
    config = config_of("at", {"model": {"token_set": token_set}})
    assert (method_of(config), config.model.token_set) == ("at", token_set)


@pytest.mark.parametrize(
    ("name", "changes", "called"),
    [
        ("bc", {"context": {"best_fraction": 0.5}}, "bc-50%"),
        ("ad", {"context": {"trajectories": 1}}, "ad"),
        ("at", {"context": {"target": "none"}}, "at"),
        ("at", {"context": {"trajectories": 1}}, "at"),  # the shortest context of an ablation
        ("at", {"context": {"target": "none", "trajectories": 1}}, "at"),
    ],
)
def test_names_beyond_the_table(name: MethodName, changes: dict, called: str) -> None:
    values = merged(config_of(name).model_dump(), changes)
    config = TrainConfig.model_validate(values)
    assert method_of(config) == called
    check_method(config, name)


@pytest.mark.parametrize(
    ("name", "changes", "called"),
    [
        ("at", {"context": {"trajectories": 1, "target": "own"}}, "dt"),
        ("dt", {"context": {"trajectories": 3}}, "at"),
        ("dt", {"context": {"target": "none"}}, "at"),
        ("ad", {"context": {"target": "best"}}, "at"),
        ("ad", {"context": {"order": "ascending"}}, "at"),
        ("bc", {"model": {"kind": "transformer"}}, "at"),
        ("dt", {"context": {"target": "best"}}, "at"),
        ("td3", {"actor_critic": {"behaviour_cloning": 0.1}}, r"td3\+bc"),
        ("td3+bc", {"actor_critic": {"behaviour_cloning": 0}}, "td3"),
    ],
)
def test_settings_of_another_method_are_rejected(name: MethodName, changes: dict, called: str) -> None:
    config = TrainConfig.model_validate(merged(config_of(name).model_dump(), changes))
    with pytest.raises(UserError, match=rf"--method .* the run is {called} \(") as caught:
        check_method(config, name)
    assert "\n" not in str(caught.value)


def test_settings_follow_the_papers() -> None:
    """Settings from the papers, apart from sizes."""
    context, model = config_of("ad").context, config_of("dt").model
    assert (context.order, context.sampling, context.target) == ("history", "history_window", "none")
    assert (config_of("dt").context.trajectories, config_of("dt").context.target) == (1, "own")
    assert (model.token_set, model.timestep_embedding) == ("dt3", True)
    fractions = [config_of(name).context.best_fraction for name in ("bc", "bc-10%", "bc-25%", "bc-50%")]
    assert fractions == [1, 0.1, 0.25, 0.5]
    assert config_of("td3").actor_critic.behaviour_cloning == 0
    assert config_of("td3+bc").actor_critic.behaviour_cloning == pytest.approx(1 / 2.5)
    at = config_of("at").context
    assert (at.order, at.target, at.trajectories > 1) == ("ascending", "best", True)


@pytest.fixture(scope="module")
def trained(jaco_store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("methods") / "run"
        count = {"context": {"trajectories": 2 if name in ("at", "ad") else 1}}  # a tenth of eight episodes is one
        values = merged(config_of(name, SHARED, count).model_dump(), SMALL)
        return train(TrainConfig.model_validate(values | {"data": jaco_store.path, "run": folder}), quiet=True)

    return run


@pytest.mark.slow  # of each kind of model: tests of training and evaluation
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains_and_evaluates(name: str, trained: Callable[[str], Path]) -> None:
    run = trained(name)
    policy = load_policy(run)
    before = jax.tree.leaves(policy.info.make_policy())
    records = evaluate_policy(policy, Protocol(environments=2))
    assert [record.method for record in records] == [name] * 2
    for record in records:
        assert record.steps_trained == 3
        assert 0 <= record.returns[0] <= 250
    after = jax.tree.leaves(policy.policy)
    assert any(not np.array_equal(x, y) for x, y in zip(before, after, strict=True)), "parameters changed"


def test_random_actions_are_evaluated() -> None:
    records = roll_out(random_evaluation(REQUIRED["task"], Protocol(environments=2)))
    assert [record.method for record in records] == ["random"] * 2


@pytest.mark.parametrize(
    ("name", "trajectories", "title"),
    [
        ("at", 1, "Agentic Transformer, 1 trajectory"),
        ("dt", 1, "Decision Transformer, 1 trajectory"),
        ("at-4tasks", 2, "Agentic Transformer, 4 tasks in turn, 2 trajectories"),
        ("bc-30%", None, "Behaviour cloning, best 30%"),
        ("bc-10%", None, METHODS["bc-10%"].title),
        ("my-own", None, "my-own"),
        ("my-2tasks", None, "my-2tasks"),
    ],
)
def test_titles(name: str, trajectories: int | None, title: str) -> None:
    assert title_of(name, trajectories) == title
