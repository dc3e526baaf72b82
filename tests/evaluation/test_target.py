"""The target return of a policy, and the prompt before its first episode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringrl.data import EpisodeStore
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.errors import UserError
from ringrl.evaluation import (
    Evaluation,
    Protocol,
    TrainedPolicy,
    load_policy,
    policy_evaluation,
)
from ringrl.evaluation.actors import CompiledPolicy
from ringrl.evaluation.evaluate import roll_out
from ringrl.evaluation.protocol import prompt_only_evaluation
from ringrl.evaluation.target import TargetPolicy
from tests.evaluation.rollouts import OTHER, TASK, with_config

RETURNS = np.array([10, 50, 20, 40, 30], np.float32)


@pytest.mark.parametrize(
    ("text", "name", "chosen"),
    [
        ("best", "data_best", 50),
        ("1x", "data_best", 50),
        ("0.9x", "0.9x data_best", 45),
        ("1.5X", "1.5x data_best", 75),
        ("q0.75", "data_quantile_0.75", 40),
        ("q0", "data_quantile_0", 10),
        ("q0.33333333", "data_quantile_0.33333333", 70 / 3),
        ("0.90000001x", "0.90000001x data_best", 45),
        ("800", "given", 800),
        (800, "given", 800),
        ("-3.5", "given", -3.5),
    ],
)
def test_target_policies(text, name, chosen):
    policy = TargetPolicy.parse(text)
    assert policy.name == name
    assert policy.choose(RETURNS) == pytest.approx(chosen)


@pytest.mark.parametrize("text", ["", "good", "q1.1", "q-0.1", "q", "x", "nan", "inf", "infx", "0.9 x y"])
def test_other_targets_raise(text):
    with pytest.raises(UserError, match="--target"):
        TargetPolicy.parse(text)


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
        assert prompt not in {tuple(row) for row in sampler.draw(seed).episodes.tolist()}


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
