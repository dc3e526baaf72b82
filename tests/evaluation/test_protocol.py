"""Evaluations made from a protocol: method, target, prompt, and the fields of the records."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ringrl.config import MeshConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.errors import UserError
from ringrl.evaluation import (
    Evaluation,
    Protocol,
    TrainedPolicy,
    evaluate_policy,
    evaluate_random,
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

TASK, OTHER = "jaco_reach_top_left", "jaco_reach_bottom_right"


@pytest.fixture(scope="module")
def trained(at_run: Path) -> TrainedPolicy:
    return load_policy(at_run)


def with_config(trained: TrainedPolicy, **changes: object) -> TrainedPolicy:
    """Return the policy as if trained with other settings; settings of the context are changed one by one."""
    config = trained.info.config
    if "context" in changes:
        changes["context"] = config.context.model_copy(update=changes["context"])
    info = dataclasses.replace(trained.info, config=config.model_copy(update=changes))
    return dataclasses.replace(trained, info=info)


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


@pytest.mark.parametrize(
    ("target", "policy", "expected"),
    [
        ("best", "data_best", np.max),
        ("0.5x", "0.5x data_best", lambda returns: returns.max() / 2),
        ("q0.5", "data_quantile_0.5", np.median),
        ("12.5", "given", lambda returns: 12.5),
    ],
)
@pytest.mark.parametrize("task", [TASK, OTHER])
def test_targets_are_those_of_the_task_and_recorded(
    trained: TrainedPolicy,
    at_run: Path,
    jaco_store: EpisodeStore,
    task: str,
    target: str,
    policy: str,
    expected: Callable,
) -> None:
    template = policy_evaluation(trained, Protocol(target=target), task=task).template
    assert template.target_policy == policy
    assert template.target_return == pytest.approx(float(expected(jaco_store.returns(task))))
    assert template.train_task == (None if task == TASK else TASK)


def test_other_tasks_of_the_run_were_trained_on(trained: TrainedPolicy, at_run: Path) -> None:
    several = with_config(trained, context={"other_tasks": (OTHER,)})
    tasks = (TASK, OTHER, "jaco_reach_top_right")
    evaluations = [policy_evaluation(several, Protocol(target="3"), task=task) for task in tasks]
    assert [evaluation.template.train_task for evaluation in evaluations] == [None, None, TASK]


def test_targets_use_the_episodes_of_the_training(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    best_two = with_config(trained, context={"best_fraction": 0.25})
    target = policy_evaluation(best_two, Protocol(target="q0")).template.target_return
    assert target == sorted(jaco_store.returns(TASK).tolist())[-2]


def test_a_prompt_is_drawn_as_training_contexts_are(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    protocol = Protocol(environments=2, prompt_trajectories=3, prompt_seed=4, target="0.5x")
    evaluation = policy_evaluation(trained, protocol)
    template, returns = evaluation.template, jaco_store.returns(TASK)
    assert (template.prompt_trajectories, template.prompt_seed, len(set(template.prompt_episodes))) == (3, 4, 3)
    assert template.prompt_returns == tuple(returns[list(template.prompt_episodes)].tolist())
    assert list(template.prompt_returns) == sorted(template.prompt_returns), "the best comes last"
    context = evaluation.prompt
    assert context is not None
    assert context.reward.shape == (1, 750)
    np.testing.assert_array_equal(context.trajectory[0], np.repeat([0, 1, 2], 250))
    np.testing.assert_array_equal(context.position[0], np.arange(750))
    for place, number in enumerate(template.prompt_episodes):
        episode, steps = jaco_store.episode(number), slice(250 * place, 250 * place + 250)
        np.testing.assert_array_equal(context.action[0, steps], episode["action"][1:])
        expected = trained.info.normalisation.observation(episode["observation"][:-1])
        np.testing.assert_allclose(context.observation[0, steps], expected, atol=1e-6)
        assert context.return_to_go[0, steps.start] == pytest.approx(template.target_return / 250)
        reached = returns[number] >= template.target_return
        assert context.completion[0, steps.stop - 1] == reached
    drawn = (Protocol(prompt_trajectories=3, prompt_seed=seed) for seed in range(6))
    assert len({policy_evaluation(trained, protocol).template.prompt_episodes for protocol in drawn}) > 2


@pytest.mark.slow
def test_a_prompt_longer_than_the_training_contexts_is_computed_once(
    at_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the streams, each episode of the control, and each group."""
    evaluation = policy_evaluation(load_policy(at_run), Protocol(2, 2, control=True, prompt_trajectories=4, target="3"))
    assert evaluation.prompt is not None
    np.testing.assert_array_equal(evaluation.prompt.trajectory[0, ::250], [0, 1, 2, 2])
    prompts, prefill = [], CompiledPolicy.prefill
    monkeypatch.setattr(CompiledPolicy, "prefill", lambda self, prompt: prompts.append(prompt) or prefill(self, prompt))
    roll_out(evaluation, groups=2)
    assert len(prompts) == 6
    assert all(prompt is prompts[0] for prompt in prompts)


def test_copying_a_prompt_repeats_an_episode_from_the_same_start(at_run: Path, jaco_store: EpisodeStore) -> None:
    """The dataset's first episode began from environment seed 0."""
    trained = load_policy(at_run)  # on the current devices
    evaluation = policy_evaluation(trained, Protocol(2, seed=0, prompt_trajectories=8))
    (first, second), by_policy = (roll_out(one) for one in (prompt_only_evaluation(evaluation, "copy"), evaluation))
    returns = jaco_store.returns(TASK)
    assert first.returns[0] == pytest.approx(returns[0], abs=1e-3)
    assert abs(second.returns[0] - returns[0]) > 1e-3
    assert first.prompt_episodes == by_policy[0].prompt_episodes
    assert (first.method, first.settings) == ("copy", {})
    assert first.evaluation != by_policy[0].evaluation
    assert first.checkpoint_hash is first.train_trajectories is first.budget is None
    with pytest.raises(UserError, match="--policy copy: there is no prompt; give --prompt-trajectories"):
        prompt_only_evaluation(policy_evaluation(trained, Protocol()), "copy")


@pytest.mark.parametrize(("order", "target"), [("descending", "own"), ("history", "best")])
def test_a_prompt_has_the_order_and_targets_of_the_run(
    trained: TrainedPolicy, at_run: Path, order: str, target: str
) -> None:
    changed = with_config(trained, context={"order": order, "target": target})
    evaluation = policy_evaluation(changed, Protocol(prompt_trajectories=4))
    returns = list(evaluation.template.prompt_returns)
    if order == "descending":
        assert returns == sorted(returns, reverse=True)
    else:
        assert list(evaluation.template.prompt_episodes) == sorted(evaluation.template.prompt_episodes)
    assert evaluation.prompt is not None
    starts = evaluation.prompt.return_to_go[0, ::250] * 250
    np.testing.assert_allclose(
        starts, returns if target == "own" else [evaluation.template.target_return] * 4, rtol=1e-5
    )


def test_a_prompt_equals_a_context_of_the_sampler(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    """With the target of a training context, a prompt is identical to one."""
    evaluation = policy_evaluation(trained, Protocol(prompt_trajectories=3))
    best = f"{max(evaluation.template.prompt_returns)!r}"
    evaluation = policy_evaluation(trained, Protocol(prompt_trajectories=3, target=best))
    info = trained.info
    sampler = ContextSampler(jaco_store, TASK, info.config.context, info.normalisation, 1, info.config.seed)
    expected = sampler.batch(2**64)
    for name in ("observation", "action", "return_to_go", "completion", "trajectory"):
        np.testing.assert_array_equal(getattr(evaluation.prompt, name), getattr(expected, name), err_msg=name)


def test_prompts_as_controls(trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore) -> None:
    """The same episodes in another order or without rewards, and the episodes and rewards of another task."""

    def drawn(**control: Any) -> Evaluation:
        return policy_evaluation(trained, Protocol(prompt_trajectories=3, target="2", **control))

    other = OTHER
    kept, zero, shuffled, wrong = (
        drawn(**control)
        for control in ({}, {"prompt_rewards": "zero"}, {"prompt_order": "shuffled"}, {"prompt_task": other})
    )
    names = [one.template.prompt_control for one in (kept, zero, shuffled, wrong)]
    assert names == [None, "zero rewards", "shuffled", f"of {other}"]
    assert len({one.template.evaluation for one in (kept, zero, shuffled, wrong)}) == 4
    for one, context in (("same", kept.prompt), ("zero", zero.prompt)):
        assert context is not None
        assert (np.asarray(context.reward) != 0).any() == (one == "same")
        np.testing.assert_array_equal(context.observation, kept.prompt.observation)
    for context in (zero.prompt, zero.prompt.previous):
        assert not np.asarray(context.reward).any()
        assert not np.asarray(context.completion).any()
    np.testing.assert_allclose(zero.prompt.return_to_go, 2 / 250, rtol=1e-6)
    episodes = [list(one.template.prompt_episodes) for one in (kept, shuffled, wrong)]
    assert sorted(episodes[1]) == sorted(episodes[0]) != episodes[1]
    moved = [episodes[0].index(number) for number in episodes[1]]
    for name in ("observation", "action", "reward", "return_to_go", "completion", "timestep"):
        parts = np.asarray(getattr(kept.prompt, name))[0].reshape(3, 250, -1)
        np.testing.assert_array_equal(np.asarray(getattr(shuffled.prompt, name))[0].reshape(3, 250, -1), parts[moved])
    segments = with_config(trained, context={"segment_steps": 5, "segment_start_share": 0.0})
    of_segments = (
        policy_evaluation(segments, Protocol(prompt_trajectories=8, prompt_order=order)).prompt
        for order in ("kept", "shuffled")
    )
    first, second = (np.asarray(context.observation)[0].reshape(8, -1) for context in of_segments)
    assert sorted(map(tuple, first)) == sorted(map(tuple, second)), "the same steps of each episode"
    rewards = jaco_store.episode(episodes[2][0])[f"reward/{other}"][1:]
    np.testing.assert_allclose(wrong.prompt.reward[0, :250], rewards, rtol=1e-6)
    with pytest.raises(UserError, match="no prompt is drawn"):
        Protocol(prompt_order="shuffled")
    with pytest.raises(UserError, match="is the task itself"):
        drawn(prompt_task=TASK)
    with pytest.raises(UserError, match="no effect on one trajectory"):
        policy_evaluation(trained, Protocol(prompt_trajectories=1, prompt_order="shuffled"))


def test_prompts_are_not_contexts_of_the_training(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    """Prompt seeds are small numbers, as the steps of training."""
    random = with_config(trained, context={"order": "random", "trajectories": 4})
    info = random.info
    sampler = ContextSampler(jaco_store, TASK, info.config.context, info.normalisation, 6, info.config.seed)
    for seed in range(4):
        prompt = policy_evaluation(random, Protocol(prompt_trajectories=4, prompt_seed=seed)).template.prompt_episodes
        assert prompt not in {tuple(row) for row in sampler.plan(seed).episodes.tolist()}


def test_prompts_differ_where_all_training_contexts_are_the_same(trained: TrainedPolicy, at_run: Path) -> None:
    fixed = with_config(trained, context={"sampling": "fixed"})
    drawn = (Protocol(prompt_trajectories=3, prompt_seed=seed) for seed in range(6))
    assert len({policy_evaluation(fixed, protocol).template.prompt_episodes for protocol in drawn}) > 2


def test_in_another_task_prompts_and_targets_use_the_best_episodes_of_that_task(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    best_two = with_config(trained, context={"best_fraction": 0.25})
    chosen = np.sort(np.argsort(jaco_store.returns(OTHER))[-2:])
    assert set(chosen) != set(np.argsort(jaco_store.returns(TASK))[-2:]), "the other task has other best episodes"
    template = policy_evaluation(best_two, Protocol(prompt_trajectories=2), task=OTHER).template
    assert sorted(template.prompt_episodes) == chosen.tolist()
    assert template.target_return == jaco_store.returns(OTHER)[chosen].max()
    target = policy_evaluation(best_two, Protocol(target="q0"), task=OTHER).template.target_return
    assert target == jaco_store.returns(OTHER)[chosen].min()


def test_a_prompt_of_a_run_on_segments_has_segments(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    segments = with_config(trained, context={"segment_steps": 50})
    evaluation = policy_evaluation(segments, Protocol(prompt_trajectories=5, target="3"))
    prompt = evaluation.prompt
    assert prompt is not None
    assert prompt.reward.shape == (1, 250)
    firsts = prompt.timestep[0, ::50].tolist()
    assert len(set(firsts)) > 1
    for place, (number, first) in enumerate(zip(evaluation.template.prompt_episodes, firsts, strict=True)):
        rows, steps = jaco_store.episode(number), slice(50 * place, 50 * place + 50)
        np.testing.assert_array_equal(prompt.timestep[0, steps], np.arange(first, first + 50))
        np.testing.assert_array_equal(prompt.action[0, steps], rows["action"][first + 1 : first + 51])
        earned = rows[f"reward/{TASK}"][1 : first + 1].astype(np.float64).sum()
        assert prompt.return_to_go[0, steps.start] == pytest.approx((3 - earned) / 250, rel=1e-5)


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
    two = evaluate_random(TASK, Protocol(environments=2, episodes=2, seed=70))
    (alone,) = evaluate_random(TASK, Protocol(environments=1, episodes=2, seed=72))
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
