"""What is planned for a checkpoint: method, target, prompt, and what the records say."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from ringrl.config import MeshConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampler import ContextSampler
from ringrl.errors import UserError
from ringrl.evaluation import protocol as protocol_module
from ringrl.evaluation.play import play
from ringrl.evaluation.programs import Programs
from ringrl.evaluation.protocol import (
    Protocol,
    evaluate_policy,
    evaluate_random,
    plan_policy,
    plan_random,
    programs_of,
)
from ringrl.evaluation.records import library_versions
from ringrl.model.parallel import MESH_AXES, Parallel
from ringrl.training import TrainedPolicy, load_policy
from ringrl.training.budget import budget

TASK, OTHER = "jaco_reach_top_left", "jaco_reach_bottom_right"


@pytest.fixture(scope="module")
def trained(at_run: Path) -> TrainedPolicy:
    return load_policy(at_run)


def with_config(trained: TrainedPolicy, **changes: object) -> TrainedPolicy:
    """The same, as if trained with other settings; those of the context are changed one by one."""
    config = trained.info.config
    if "context" in changes:
        changes["context"] = config.context.model_copy(update=changes["context"])
    info = dataclasses.replace(trained.info, config=config.model_copy(update=changes))
    return dataclasses.replace(trained, info=info)


@pytest.mark.parametrize(("later", "method"), [(0.0, "td3+bc"), (0.5, "td3+bc+her")])
def test_an_actor_critic_is_rolled_out_and_named(make_run: Callable[..., Path], later: float, method: str) -> None:
    model = {"kind": "td3_bc", "layers": 1, "width": 16}
    run = make_run(model=model, actor_critic={"hindsight": {"later": later}})
    (record,) = evaluate_policy(load_policy(run), run, Protocol(environments=1))
    assert record.method == method
    assert (record.token_set, record.train_trajectories, record.steps_trained) == (None, None, 2)
    assert (record.target_return, record.target_policy) == (None, "none")
    assert 0 <= record.returns[0] <= 250
    with pytest.raises(UserError, match=r"has no context \(td3\+bc"):
        plan_policy(load_policy(run), run, Protocol(prompt_trajectories=1))


def test_behaviour_cloning_is_asked_for_nothing(make_run: Callable[..., Path]) -> None:
    run = make_run(model={"kind": "behaviour_cloning", "layers": 1, "width": 16})
    plan = plan_policy(load_policy(run), run, Protocol(target="q0.5"))
    assert (plan.shared.method, plan.shared.target_policy, plan.shared.target_return) == ("bc", "none", None)


def test_what_training_took_is_told(trained: TrainedPolicy, at_run: Path) -> None:
    """And is no part of what tells evaluations apart: a run's log may be gone."""
    shared = plan_policy(trained, at_run, Protocol()).shared
    assert shared.budget == budget(trained.info, trained.step, at_run)
    assert shared.budget.tokens > 0
    elsewhere = plan_policy(trained, at_run / "nowhere", Protocol()).shared
    assert (elsewhere.budget.seconds, elsewhere.evaluation) == (None, shared.evaluation)


def test_tasks_of_a_policy_share_its_programs(trained: TrainedPolicy, at_run: Path) -> None:
    programs = programs_of(trained, Protocol(), TASK)
    plans = [plan_policy(trained, at_run, Protocol(), task=task, programs=programs) for task in (TASK, OTHER)]
    for plan in plans:
        play(plan)
        assert len(programs) == 2, "for the first step, and for the others"


def test_a_cache_in_bfloat16_is_told_and_rounds(trained: TrainedPolicy, at_run: Path) -> None:
    exact, rounded = (plan_policy(trained, at_run, Protocol(1, cache_dtype=dtype)) for dtype in (None, "bfloat16"))
    assert (exact.shared.cache_dtype, rounded.shared.cache_dtype) == (None, "bfloat16")
    assert exact.shared.evaluation != rounded.shared.evaluation
    assert play(exact)[0].returns != play(rounded)[0].returns


def test_contexts_divided_over_eight_devices(
    trained: TrainedPolicy, at_run: Path, make_run: Callable[..., Path], eight_devices: None
) -> None:
    """The same actions to rounding, on states that are told and not simulated: contacts would blow rounding up."""
    divided = load_policy(at_run, mesh=MeshConfig(seq=8))
    assert divided.parameter_hash == trained.parameter_hash
    plans = [
        plan_policy(policy, at_run, Protocol(1, prompt_trajectories=1)) for policy in (load_policy(at_run), divided)
    ]
    actors = [plan.make_actor(0) for plan in plans]
    steps = jax.tree.map(lambda x: x[:, :20], plans[0].prompt)
    for actor, plan in zip(actors, plans, strict=True):
        actor.start(1, 20, plan.prompt)
    for time in range(20):
        step = jax.tree.map(lambda x, time=time: x[:, time : time + 1], steps)
        expected, found = (np.asarray(actor.act(step)) for actor in actors)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        for actor in actors:
            actor.observe(step)
    with pytest.raises(UserError, match=r"^mesh: a policy that acts is divided along mesh.seq alone"):
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
def test_targets_are_of_the_task_and_logged(
    trained: TrainedPolicy,
    at_run: Path,
    jaco_store: EpisodeStore,
    task: str,
    target: str,
    policy: str,
    expected: Callable,
) -> None:
    shared = plan_policy(trained, at_run, Protocol(target=target), task=task).shared
    assert shared.target_policy == policy
    assert shared.target_return == pytest.approx(float(expected(jaco_store.returns(task))))
    assert shared.train_task == (None if task == TASK else TASK)


def test_every_task_that_took_its_turn_was_trained_on(trained: TrainedPolicy, at_run: Path) -> None:
    several = with_config(trained, context={"other_tasks": (OTHER,)})
    tasks = (TASK, OTHER, "jaco_reach_top_right")
    plans = [plan_policy(several, at_run, Protocol(target="3"), task=task) for task in tasks]
    assert [plan.shared.train_task for plan in plans] == [None, None, TASK]


def test_targets_are_of_the_episodes_that_were_trained_on(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    best_two = with_config(trained, context={"best_fraction": 0.25})
    target = plan_policy(best_two, at_run, Protocol(target="q0")).shared.target_return
    assert target == sorted(jaco_store.returns(TASK).tolist())[-2]


def test_a_prompt_is_drawn_as_training_contexts_are(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    protocol = Protocol(environments=2, prompt_trajectories=3, prompt_seed=4, target="0.5x")
    plan = plan_policy(trained, at_run, protocol)
    shared, returns = plan.shared, jaco_store.returns(TASK)
    assert (shared.prompt_trajectories, shared.prompt_seed, len(set(shared.prompt_episodes))) == (3, 4, 3)
    assert shared.prompt_returns == tuple(returns[list(shared.prompt_episodes)].tolist())
    assert list(shared.prompt_returns) == sorted(shared.prompt_returns), "the best comes last"
    context = plan.prompt
    assert context is not None
    assert context.reward.shape == (1, 750)
    np.testing.assert_array_equal(context.trajectory[0], np.repeat([0, 1, 2], 250))
    np.testing.assert_array_equal(context.position[0], np.arange(750))
    for place, number in enumerate(shared.prompt_episodes):
        episode, steps = jaco_store.episode(number), slice(250 * place, 250 * place + 250)
        np.testing.assert_array_equal(context.action[0, steps], episode["action"][1:])
        expected = trained.info.normalisation.observation(episode["observation"][:-1])
        np.testing.assert_allclose(context.observation[0, steps], expected, atol=1e-6)
        assert context.return_to_go[0, steps.start] == pytest.approx(shared.target_return / 250)
        reached = returns[number] >= shared.target_return
        assert context.completion[0, steps.stop - 1] == reached
    drawn = (Protocol(prompt_trajectories=3, prompt_seed=seed) for seed in range(6))
    assert len({plan_policy(trained, at_run, protocol).shared.prompt_episodes for protocol in drawn}) > 2


def test_a_prompt_longer_than_the_training_contexts_is_computed_once(
    at_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the streams, each episode of the control, and each group."""
    plan = plan_policy(load_policy(at_run), at_run, Protocol(2, 2, control=True, prompt_trajectories=4, target="3"))
    assert plan.prompt is not None
    np.testing.assert_array_equal(plan.prompt.trajectory[0, ::250], [0, 1, 2, 2])
    prompts, prefill = [], Programs.prefill
    monkeypatch.setattr(Programs, "prefill", lambda self, prompt: prompts.append(prompt) or prefill(self, prompt))
    play(plan, groups=2)
    assert len(prompts) == 6
    assert all(prompt is prompts[0] for prompt in prompts)


@pytest.mark.parametrize(("order", "target"), [("descending", "own"), ("history", "best")])
def test_a_prompt_follows_the_runs_own_order_and_targets(
    trained: TrainedPolicy, at_run: Path, order: str, target: str
) -> None:
    changed = with_config(trained, context={"order": order, "target": target})
    plan = plan_policy(changed, at_run, Protocol(prompt_trajectories=4))
    returns = list(plan.shared.prompt_returns)
    if order == "descending":
        assert returns == sorted(returns, reverse=True)
    else:
        assert list(plan.shared.prompt_episodes) == sorted(plan.shared.prompt_episodes)
    assert plan.prompt is not None
    starts = plan.prompt.return_to_go[0, ::250] * 250
    np.testing.assert_allclose(starts, returns if target == "own" else [plan.shared.target_return] * 4, rtol=1e-5)


def test_a_prompt_of_the_training_rules_is_what_the_sampler_gives(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    """With the target that a training context would have, a prompt is one, number by number."""
    plan = plan_policy(trained, at_run, Protocol(prompt_trajectories=3))
    best = f"{max(plan.shared.prompt_returns)!r}"
    plan = plan_policy(trained, at_run, Protocol(prompt_trajectories=3, target=best))
    info = trained.info
    sampler = ContextSampler(jaco_store, TASK, info.config.context, info.normalisation, 1, info.config.seed)
    expected = sampler.batch(2**64)
    for name in ("observation", "action", "return_to_go", "completion", "trajectory"):
        np.testing.assert_array_equal(getattr(plan.prompt, name), getattr(expected, name), err_msg=name)


def test_prompts_are_none_of_the_contexts_trained_on(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    """Where all are of history's order, seeds that coincide would show: few steps, and rows of a batch."""
    random = with_config(trained, context={"order": "random", "trajectories": 4})
    info = random.info
    sampler = ContextSampler(jaco_store, TASK, info.config.context, info.normalisation, 6, info.config.seed)
    for seed in range(4):
        prompt = plan_policy(random, at_run, Protocol(prompt_trajectories=4, prompt_seed=seed)).shared.prompt_episodes
        assert prompt not in {tuple(row) for row in sampler.plan(seed).episodes.tolist()}


def test_prompts_differ_where_all_training_contexts_are_the_same(trained: TrainedPolicy, at_run: Path) -> None:
    fixed = with_config(trained, context={"sampling": "fixed"})
    drawn = (Protocol(prompt_trajectories=3, prompt_seed=seed) for seed in range(6))
    assert len({plan_policy(fixed, at_run, protocol).shared.prompt_episodes for protocol in drawn}) > 2


def test_in_another_task_prompts_and_targets_are_of_the_episodes_that_were_trained_on(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore
) -> None:
    best_two = with_config(trained, context={"best_fraction": 0.25})
    chosen = np.sort(np.argsort(jaco_store.returns(TASK))[-2:])
    assert set(chosen) != set(np.argsort(jaco_store.returns(OTHER))[-2:]), "the other task's best are others"
    shared = plan_policy(best_two, at_run, Protocol(prompt_trajectories=2), task=OTHER).shared
    assert sorted(shared.prompt_episodes) == chosen.tolist()
    assert shared.target_return == jaco_store.returns(OTHER)[chosen].max()


def test_what_needs_the_data_says_so(
    trained: TrainedPolicy, at_run: Path, jaco_store: EpisodeStore, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.h5"
    elsewhere.write_bytes(jaco_store.path.read_bytes())
    moved, run = with_config(trained, data=tmp_path / "gone.h5"), at_run
    plan_policy(moved, run, Protocol())
    plan_policy(moved, run, Protocol(target="3"), task=OTHER)
    needs = [(Protocol(target="q0.5"), TASK), (Protocol(prompt_trajectories=1), TASK), (Protocol(), OTHER)]
    for protocol, task in needs:
        with pytest.raises(UserError, match="no longer there; say where it is with --data"):
            plan_policy(moved, run, protocol, task=task)
        plan_policy(moved, run, protocol, task=task, data=elsewhere)
    moved = with_config(load_policy(run), data=tmp_path / "gone.h5")  # on the devices that there are by now
    (record,) = evaluate_policy(moved, run, Protocol(environments=1, target="q0.5"), data=elsewhere)
    assert record.target_return == np.median(jaco_store.returns(TASK))
    with pytest.raises(UserError, match=r"--prompt-trajectories: .*9 do not fit the 8"):
        plan_policy(moved, run, Protocol(prompt_trajectories=9), data=elsewhere)


def test_the_hash_of_an_evaluation_tells_all_that_decides_it(
    trained: TrainedPolicy, at_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_of(task: str = TASK, run: Path = at_run, command: str = "", **changes: object) -> str:
        protocol = Protocol(**({"environments": 2, "target": "10"} | changes))
        return str(plan_policy(trained, run, protocol, task=task, command=command).shared.evaluation)

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
        found = plan_policy(changed, at_run, Protocol(2, target="10")).shared.evaluation
        assert (found == base) is (name == "parallel"), "a ring of one is one device"
    monkeypatch.setattr(Parallel, "ring_size", 2)
    assert hash_of() != base
    monkeypatch.undo()
    assert hash_of(cache_dtype=trained.info.config.model.dtype) == base, "which is what it is kept in anyway"
    monkeypatch.setattr(protocol_module, "library_versions", lambda: library_versions() | {"optax": "other"})
    assert hash_of() == base, "it decides nothing here"
    monkeypatch.setattr(protocol_module, "library_versions", lambda: library_versions() | {"mujoco": "other"})
    assert hash_of() != base


def test_random_actions_do_not_depend_on_what_is_beside_them() -> None:
    two = evaluate_random(TASK, Protocol(environments=2, episodes=2, seed=70))
    (alone,) = evaluate_random(TASK, Protocol(environments=1, episodes=2, seed=72))
    assert alone.returns == two[1].returns != two[0].returns
    assert (alone.target_policy, alone.target_return, alone.environment_seed) == ("none", None, 72)
    assert not plan_random(TASK, Protocol(control=True)).control


@pytest.mark.parametrize("name", ["environments", "episodes"])
def test_too_few_of_anything(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: 0 is too few"):
        Protocol(**{name: 0})
    with pytest.raises(UserError, match="prompt_trajectories: -1 is too few"):
        Protocol(prompt_trajectories=-1)


def test_there_are_2_to_the_32_starts() -> None:
    assert Protocol(environments=3, episodes=2, seed=2**32 - 6).seed == 2**32 - 6
    for seed in (2**32 - 5, 99999999999999999999):
        with pytest.raises(UserError, match=rf"^--seed: the episodes would start from seeds {seed} to {seed + 5}, "):
            Protocol(environments=3, episodes=2, seed=seed)
