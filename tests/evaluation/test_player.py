"""A player must act as a rollout does, whoever holds the loop."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ringrl.envs import make, make_vec
from ringrl.errors import UserError
from ringrl.evaluation import Protocol, evaluate_policy, load_policy

slow = partial(pytest.param, marks=pytest.mark.slow)
RUNS = {
    "at with a window": {"model": {"layers": 1, "width": 16, "token_set": "dt3", "episode_window": 3}},
    "segments": {"context": {"trajectories": 3, "segment_steps": 8}},
    "bc": {"model": {"kind": "behaviour_cloning", "layers": 1, "width": 16}, "context": {"trajectories": 1}},
}


def play(player, environment, seeds: list[list[int]], steps: int = 250) -> np.ndarray:
    """Return the rewards (episodes, steps, environments) of episodes or their first steps."""
    rewards = []
    for seed in seeds:
        observation, _ = environment.reset(seed=seed)
        for _ in range(steps):
            observation, reward, terminated, truncated, _ = environment.step(player.act(observation))
            player.observe(reward, terminated, truncated)
            rewards.append(reward)
        assert np.all(truncated) == (steps == 250)
    return np.array(rewards).reshape(len(seeds), steps, -1)


@pytest.mark.parametrize(
    ("kind", "episodes"),
    [("at with a window", 1), slow("at with a window", 2), slow("segments", 1), slow("bc", 2)],
)
def test_a_player_equals_a_rollout(
    kind: str, episodes: int, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(make_run(**RUNS[kind]))
    prompt = None if kind == "bc" else 2
    protocol = Protocol(2, episodes, target="7", prompt_trajectories=prompt or 0, prompt_seed=3)
    monkeypatch.setattr("ringrl.evaluation.policy._ENDLESS", 250 * episodes)  # a memory of the same shape rounds alike
    expected = np.array([record.returns for record in evaluate_policy(policy, protocol)])
    one = policy.player(target=7, prompt=prompt, prompt_seed=3, batch=2)
    seeds = (protocol.seed + np.arange(2 * episodes).reshape(2, episodes)).T.tolist()
    environment = make_vec("jaco_reach_top_left", 2)
    rewards = play(one, environment, seeds)
    np.testing.assert_array_equal(rewards.cumsum(axis=1)[:, -1].T, expected)
    one.clear()
    again = play(one, environment, seeds[:1], steps=60)
    np.testing.assert_array_equal(again, rewards[:1, :60], err_msg="something is left after `clear`")


def test_one_environment_without_a_batch_axis(at_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(at_run))
    environment = make("jaco_reach_top_left")
    (record,) = evaluate_policy(policy, Protocol(1, 2))
    monkeypatch.setattr("ringrl.evaluation.policy._ENDLESS", 500)
    found = play(policy.player(), environment, [1_000_000, 1_000_001])
    np.testing.assert_allclose(found.sum((1, 2)), record.returns, rtol=1e-6)
    assert re.fullmatch(r"TrainedPolicy\(at, n=3, jaco_reach_top_left, step 2, \d\d,\d{3} parameters\)", repr(policy))
    found = f"RunInfo(at, n=3, jaco_reach_top_left, 2,000 transitions, best return {policy.info.best_return:.4g})"
    assert repr(policy.info) == found
    assert repr(environment) == "ExoRLEnv(jaco_reach_top_left, observation (42,), action (9,), 250 steps)"
    found = "ExoRLVectorEnv(walker_run, observation (2, 24), action (2, 6), 1000 steps)"
    assert repr(make_vec("walker_run", 2)) == found


def test_an_episode_that_ends_early(at_run: Path) -> None:
    """Positions go on without a gap, the return-to-go starts again, and the memory stays."""
    seen = []
    one = load_policy(at_run).player(target=5.0)
    act = one._actor.act
    one._actor.act = lambda step: (seen.append(step), act(step))[1]
    for steps in (3, 2):
        for step in range(steps):
            one.act(np.zeros(42))
            one.observe(2.0 if steps == 3 else 1.0, terminated=step == steps - 1)
    one.act(np.zeros(42))
    assert [int(step.position[0, 0]) for step in seen] == [0, 1, 2, 3, 4, 5]
    assert [int(step.start[0, 0]) for step in seen] == [0, 0, 0, 3, 3, 5]
    assert [int(step.timestep[0, 0]) for step in seen] == [0, 1, 2, 0, 1, 0]
    assert [int(step.trajectory[0, 0]) for step in seen] == [0, 0, 0, 1, 1, 2]
    left = [float(step.return_to_go[0, 0]) for step in seen]
    np.testing.assert_allclose(np.array(left) / left[0], [1, 0.6, 0.2, 1, 0.8, 1], rtol=1e-6)
    completions = [float(step.previous.completion[0, 0]) for step in seen]
    assert completions == [0, 0, 0, 1, 0, 0], "the first episode reached its target of 5"


def test_episodes_of_a_batch_may_end_at_different_steps(at_run: Path) -> None:
    policy, random, actions = load_policy(at_run), np.random.default_rng(0), []
    observations, rewards = random.normal(size=(12, 2, 42)).astype(np.float32), random.uniform(size=(12, 2))
    ends = np.array([[2, 6], [4, 5]]).T  # steps after which the episodes of each environment end
    for streams in ([0, 1], [0], [1]):
        one = policy.player(batch=len(streams))
        found = []
        for step in range(12):
            found.append(one.act(observations[step, streams]).copy())
            one.observe(rewards[step, streams], terminated=[step in ends[:, stream] for stream in streams])
        actions.append(np.stack(found, axis=1))
    np.testing.assert_allclose(actions[0], np.concatenate(actions[1:]), rtol=1e-5, atol=1e-5)
    together = policy.player(batch=2)
    for step in range(5):
        moved = together.act(observations[step])
        together.observe(rewards[step])
    assert np.abs(moved - actions[0][:, 4]).max() > 1e-6, "an end has an effect"


def test_errors_of_a_loop(at_run: Path) -> None:
    policy = load_policy(at_run)
    one = policy.player(batch=2)
    observation = np.zeros((2, 42))
    with pytest.raises(UserError, match=r"observation: has shape \(42,\), expected \(2, 42\)"):
        one.act(observation[0])
    with pytest.raises(UserError, match=r"call act\(observation\) first"):
        one.observe(1.0)
    with pytest.raises(UserError, match=r"^observation: is not finite"):
        one.act(np.full((2, 42), np.nan))
    one.act(observation)[:] = np.nan  # a copy: the player remembers its own action
    assert np.isfinite(one._pending).all()
    for wrong in ({"place": observation}, (observation, np.zeros(3))):
        with pytest.raises(
            UserError, match=r"^observation: is no array of numbers \(2, 42\); ringrl\.envs\.make flattens"
        ):
            policy.player(batch=2).act(wrong)
    with pytest.raises(UserError, match=r"call observe\(reward\) first"):
        one.act(observation)
    with pytest.raises(UserError, match=r"reward: \[nan, 1.0\] is not finite"):
        one.observe([np.nan, 1])
    for reward in (0.0, [0.0], np.zeros((2, 1))):
        with pytest.raises(UserError, match=r"^reward: has shape \(.*\), expected \(2,\)"):
            one.observe(reward)
    with pytest.raises(UserError, match=r"^truncated: has shape \(3,\), expected \(2,\)"):
        one.observe([1.0, 2.0], truncated=[False] * 3)
    for prompt in ("3", 3.0, True, [1, 2]):
        with pytest.raises(UserError, match=r"^prompt: expected a number of trajectories or a context, got "):
            policy.player(prompt=prompt)
    one.observe([1.0, 2.0])
    for _ in range(249):
        one.act(observation)
        one.observe([0.0, 0.0])
    with pytest.raises(UserError, match=r"have 250 steps; call reset_episode\(\)"):
        one.act(observation)
    one.reset_episode()
    one.act(observation)
    with pytest.raises(UserError, match=r"reset_episode: the reward of the last action is unknown"):
        one.reset_episode()
    with pytest.raises(UserError, match="--target"):
        policy.player(target="much")
    with pytest.raises(UserError, match="environments: 0 is too small"):
        policy.player(batch=0)
    with pytest.raises(UserError, match="was trained on jaco and cannot act in task walker_walk"):
        policy.player(task="walker_walk")
