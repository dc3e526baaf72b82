"""Evaluations made from a protocol: method, target, prompt, and the fields of the records."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from ringrl.config import MeshConfig
from ringrl.data import EpisodeStore
from ringrl.errors import UserError
from ringrl.evaluation import (
    Evaluation,
    Protocol,
    TrainedPolicy,
    evaluate_policy,
    load_policy,
    policy_evaluation,
    random_evaluation,
)
from ringrl.evaluation import protocol as protocol_module
from ringrl.evaluation.actors import CompiledPolicy
from ringrl.evaluation.evaluate import roll_out
from ringrl.evaluation.protocol import prompt_only_evaluation
from ringrl.evaluation.records import library_versions
from ringrl.evaluation.scores import summarise
from ringrl.model.parallel import MESH_AXES, Parallel
from ringrl.training.budget import budget
from tests.evaluation.rollouts import OTHER, TASK, with_config


def test_an_actor_critic_is_rolled_out_under_its_method(make_run: Callable[..., Path]) -> None:
    run = make_run(model={"kind": "td3_bc", "layers": 1, "width": 16})
    (record,) = evaluate_policy(load_policy(run), Protocol(environments=1))
    assert record.method == "td3+bc"
    assert (record.token_set, record.train_trajectories, record.steps_trained) == (None, None, 2)
    assert (record.target_return, record.target_policy) == (None, "none")
    assert 0 <= record.returns[0] <= 250
    with pytest.raises(UserError, match=r"has no context \(td3\+bc"):
        policy_evaluation(load_policy(run), Protocol(prompt_trajectories=1))


def test_behaviour_cloning_has_no_target(make_run: Callable[..., Path]) -> None:
    run = make_run(model={"kind": "behaviour_cloning", "layers": 1, "width": 16})
    evaluation = policy_evaluation(load_policy(run), Protocol(target="q0.5"))
    assert (evaluation.template.method, evaluation.template.target_policy, evaluation.template.target_return) == (
        "bc",
        "none",
        None,
    )


def test_records_state_the_training_cost(trained: TrainedPolicy, at_run: Path) -> None:
    """The cost is not part of the hash, since the log of a run may be missing."""
    template = policy_evaluation(trained, Protocol()).template
    assert template.budget == budget(trained.info, trained.step, at_run)
    assert template.budget.tokens > 0
    elsewhere = policy_evaluation(dataclasses.replace(trained, run=at_run / "nowhere"), Protocol()).template
    assert (elsewhere.budget.seconds, elsewhere.evaluation) == (None, template.evaluation)


@pytest.mark.slow
def test_tasks_of_a_policy_share_its_programs(trained: TrainedPolicy, at_run: Path) -> None:
    compiled = CompiledPolicy(trained.policy)
    evaluations = [policy_evaluation(trained, Protocol(), task=task, compiled=compiled) for task in (TASK, OTHER)]
    for evaluation in evaluations:
        roll_out(evaluation)
        assert compiled.act.func._cache_size() == 2, "one for the first step, one for the others"


@pytest.mark.slow
def test_contexts_divided_over_eight_devices(trained: TrainedPolicy, at_run: Path, eight_devices: None) -> None:
    """The same actions to rounding, on given states: in a simulation, contacts amplify rounding."""
    divided = load_policy(at_run, mesh=MeshConfig(seq=8))
    assert divided.parameter_hash == trained.parameter_hash
    evaluations = [
        policy_evaluation(policy, Protocol(1, prompt_trajectories=1)) for policy in (load_policy(at_run), divided)
    ]
    actors = [evaluation.make_actor(0) for evaluation in evaluations]
    steps = jax.tree.map(lambda x: x[:, :20], evaluations[0].prompt)
    for actor, evaluation in zip(actors, evaluations, strict=True):
        actor.start(1, 20, evaluation.prompt)
    for time in range(20):
        step = jax.tree.map(lambda x, time=time: x[:, time : time + 1], steps)
        expected, found = (np.asarray(actor.act(step)) for actor in actors)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        for actor in actors:
            actor.observe(step)


def test_meshes_that_do_not_act_are_errors(at_run: Path, make_run: Callable[..., Path], eight_devices: None) -> None:
    with pytest.raises(UserError, match=r"^mesh: only mesh.seq divides a policy that acts"):
        load_policy(at_run, mesh=MeshConfig(seq=2, data=2))
    cloned = make_run(model={"kind": "behaviour_cloning", "layers": 1, "width": 16})
    with pytest.raises(UserError, match=r"^mesh.seq: behaviour_cloning has no context"):
        load_policy(cloned, mesh=MeshConfig(seq=2))


def test_a_missing_dataset_raises_only_if_needed(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.h5"
    elsewhere.write_bytes(jaco_store.path.read_bytes())
    moved, run = with_config(trained, data=tmp_path / "gone.h5"), at_run
    policy_evaluation(moved, Protocol())
    policy_evaluation(moved, Protocol(target="3"), task=OTHER)
    needs = [(Protocol(target="q0.5"), TASK), (Protocol(prompt_trajectories=1), TASK), (Protocol(), OTHER)]
    for protocol, task in needs:
        with pytest.raises(UserError, match="is missing; give its path with --data"):
            policy_evaluation(moved, protocol, task=task)
        policy_evaluation(moved, protocol, task=task, data=elsewhere)
    moved = with_config(load_policy(run), data=tmp_path / "gone.h5")  # on the current devices
    (record,) = evaluate_policy(moved, Protocol(environments=1, target="q0.5"), data=elsewhere)
    assert record.target_return == np.median(jaco_store.returns(TASK))
    with pytest.raises(UserError, match=r"--prompt-trajectories: .*9 are more than the 8"):
        policy_evaluation(moved, Protocol(prompt_trajectories=9), data=elsewhere)


def test_the_hash_of_an_evaluation_depends_on_everything_that_decides_it(
    trained: TrainedPolicy, at_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_of(task: str = TASK, run: Path = at_run, command: str = "", **changes: object) -> str:
        protocol = Protocol(**({"environments": 2, "target": "10"} | changes))
        moved = dataclasses.replace(trained, run=run)
        return str(policy_evaluation(moved, protocol, task=task, command=command).template.evaluation)

    base = hash_of()
    assert hash_of(command="typed otherwise", run=tmp_path / "moved") == base
    others = [
        hash_of(task=OTHER), hash_of(environments=3), hash_of(episodes=2), hash_of(seed=5), hash_of(control=True),
        hash_of(target="11"), hash_of(prompt_trajectories=1), hash_of(prompt_trajectories=1, prompt_seed=1),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)
    changes = {"step": 1, "parameter_hash": "another", "parallel": Parallel(jax.make_mesh((1, 1, 1, 1), MESH_AXES))}
    for name, value in changes.items():
        changed = dataclasses.replace(trained, **{name: value})
        found = policy_evaluation(changed, Protocol(2, target="10")).template.evaluation
        assert (found == base) is (name == "parallel"), "a ring of one is one device"
    monkeypatch.setattr(Parallel, "ring_size", 2)
    assert hash_of() != base
    monkeypatch.undo()
    monkeypatch.setattr(protocol_module, "library_versions", lambda: library_versions() | {"optax": "other"})
    assert hash_of() == base, "optax does not change a result"
    monkeypatch.setattr(protocol_module, "library_versions", lambda: library_versions() | {"mujoco": "other"})
    assert hash_of() != base


def test_only_policies_that_are_computed_depend_on_their_libraries(
    trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluations() -> dict[str, Evaluation]:
        prompted = policy_evaluation(trained, Protocol(2, prompt_trajectories=1))
        alone = {method: prompt_only_evaluation(prompted, method) for method in ("copy", "clone")}
        return {"at": prompted, "random": random_evaluation(TASK, Protocol(2)), **alone}

    def hashed(one: Evaluation, **changes) -> str | None:
        template = one.template.model_copy(update={"evaluation": None, **changes})
        return protocol_module._with_hash(template, one.protocol).evaluation

    before = evaluations()
    of_device = {name for name, one in before.items() if hashed(one, device="other") != hashed(one)}
    assert of_device == {"at", "clone"}
    results = {"lengths": (5,), "terminated": (True,)}
    assert all(hashed(one, **results) == hashed(one) for one in before.values()), "results decide nothing"
    monkeypatch.setattr(protocol_module, "library_versions", lambda: library_versions() | {"jax": "other"})
    after = evaluations()
    changed = {name for name in before if before[name].template.evaluation != after[name].template.evaluation}
    assert changed - {"copy"} == {"at", "clone"}  # copy repeats an evaluation of the policy, whose hash it contains


def test_at_and_dt_of_equal_parameters_seeds_and_starts_are_different_evaluations(
    trained: TrainedPolicy, at_run: Path
) -> None:
    decision = with_config(trained, context={"trajectories": 1, "target": "own"})
    at, dt = (policy_evaluation(policy, Protocol(2, target="10")) for policy in (trained, decision))
    assert (at.template.method, dt.template.method) == ("at", "dt")
    assert at.template.checkpoint_hash == dt.template.checkpoint_hash
    np.testing.assert_array_equal(at.seeds, dt.seeds)
    records = [
        evaluation.template.model_copy(update={"environment_seed": int(seed), "returns": (level,)})
        for evaluation, level in ((at, 1.0), (dt, 2.0))
        for seed in evaluation.seeds[:, 0]
    ]
    assert [(found.method, found.metrics["mean"]) for found in summarise(records)] == [("at", 1.0), ("dt", 2.0)]
    assert (at.is_finished(records[:2]), at.is_finished(records[2:])) == (True, False)


def test_random_actions_do_not_depend_on_other_streams() -> None:
    two = roll_out(random_evaluation(TASK, Protocol(environments=2, episodes=2, seed=70)))
    (alone,) = roll_out(random_evaluation(TASK, Protocol(environments=1, episodes=2, seed=72)))
    assert alone.returns == two[1].returns != two[0].returns
    assert (alone.target_policy, alone.target_return, alone.environment_seed) == ("none", None, 72)
    assert not random_evaluation(TASK, Protocol(control=True)).protocol.control


@pytest.mark.parametrize("name", ["environments", "episodes"])
def test_numbers_that_are_too_small_raise(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: 0 is too small; give at least 1 \\(--{name}\\)$"):
        Protocol(**{name: 0})
    with pytest.raises(
        UserError, match=r"prompt_trajectories: -1 is too small; give at least 0 \(--prompt-trajectories\)"
    ):
        Protocol(prompt_trajectories=-1)


def test_seeds_are_below_2_to_the_32() -> None:
    assert Protocol(environments=3, episodes=2, seed=2**32 - 6).seed == 2**32 - 6
    for seed in (2**32 - 5, 99999999999999999999):
        with pytest.raises(UserError, match=rf"^--seed: the episodes would start from seeds {seed} to {seed + 5}, "):
            Protocol(environments=3, episodes=2, seed=seed)
