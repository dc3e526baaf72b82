"""Rollouts whose episodes end at different steps, against plain loops and the full forward pass."""

import gymnasium
import jax
import numpy as np
import pytest

from ringrl.envs import make_vec
from ringrl.evaluation.actors import CompiledPolicy, PolicyActor, SegmentActor
from ringrl.evaluation.rollout import Group, rollout
from tests.evaluation.rollouts import ARRAYS, SHORT, RecordingActor, assert_same, play, seeds, tiny


class Ragged(gymnasium.Env):
    """Episodes of 1 to 6 steps, by their seed: odd ones terminate, even ones are truncated."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (42,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (9,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, int(self.np_random.integers(1, 7))
        self.place = self.np_random.normal(size=42).astype(np.float32)
        return self.place, {}

    def step(self, action):
        self.steps += 1
        self.place = np.roll(self.place, 1) + np.float32(action.sum())
        ends = self.steps >= self.length
        return self.place, float(np.cos(self.place[0]) ** 2), ends and self.length % 2 == 1, ends, {}


def ragged(number: int) -> gymnasium.vector.VectorEnv:
    if "Ragged-v0" not in gymnasium.registry:
        gymnasium.register("Ragged-v0", lambda: Ragged(), max_episode_steps=6, disable_env_checker=True)
    return make_vec("gymnasium:Ragged-v0", number)


def alone(seeds: np.ndarray, actor_seed: int) -> tuple[list[float], list[int], np.ndarray]:
    """Return returns, lengths and all steps (observation, action, timestep, start) of one stream, by a plain loop."""
    environment, random = Ragged(), np.random.default_rng(actor_seed)
    returns, lengths, rows, first = [], [], [], 0
    for seed in seeds.tolist():
        observation, _ = environment.reset(seed=seed)
        rewards: list[float] = []
        while True:
            action = random.uniform(-1, 1, 9).astype(np.float32)
            rows.append(np.concatenate([SHORT.observation(observation), action, [len(rewards), first]]))
            observation, reward, terminated, truncated, _ = environment.step(action)
            rewards.append(reward)
            if terminated or truncated:
                break
        returns.append(float(np.add.accumulate(rewards)[-1]))
        lengths.append(len(rewards))
        first += len(rewards)
    return returns, lengths, np.stack(rows)


@pytest.mark.parametrize("sizes", [(4,), (1, 3)])
def test_streams_whose_episodes_end_early_equal_plain_loops(sizes):
    """No stream waits for another, and none changes another one."""
    returns, played, observed = play([ragged(size) for size in sizes], episodes=5, most_steps=6)
    for stream, own in enumerate(seeds(4, 5)):
        expected, lengths, rows = alone(own, stream)
        np.testing.assert_array_equal(returns[stream], expected)
        assert [int(episode.length[stream]) for episode in played] == lengths
        assert [bool(episode.terminated[stream]) for episode in played] == [length % 2 == 1 for length in lengths]
        assert [int(episode.steps[stream]) for episode in played] == lengths
        if len(sizes) > 1:
            continue  # the groups' contexts have different lengths
        context = jax.tree.map(lambda x, stream=stream, rows=rows: x[stream, : len(rows)], observed)
        parts = (context.observation, context.action, context.timestep[:, None], context.start[:, None])
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), rows)
        np.testing.assert_array_equal(context.position, np.arange(len(rows)))
        np.testing.assert_array_equal(context.trajectory, np.repeat(np.arange(5), lengths))
    assert len({tuple(episode.length) for episode in played}) > 1


def test_a_segment_has_the_last_steps_also_after_the_first_stream_has_ended():
    class Compiled:
        def act_after(self, prefix, segment, index):
            shown.append(segment.timestep[:, : index + 1])
            places.append((segment.start[:, : index + 1], segment.trajectory[:, : index + 1]))
            return np.zeros((4, 9), np.float32)

    shown, places = list[np.ndarray](), list[tuple[np.ndarray, np.ndarray]]()
    longest_last = sorted(range(20), key=lambda seed: len(alone(np.array([seed]), 0)[2]))[::6]
    rollout([Group(SegmentActor(Compiled(), 3), ragged(4))], SHORT, seeds=np.array(longest_last)[:, None],
            target_return=None, most_steps=6)  # fmt: skip
    assert len(shown) == 6
    assert shown[-1][0, -1] < 5, "the first stream has ended earlier"
    for step, segment in enumerate(shown):
        assert segment[3].tolist() == [*range(max(0, step - 2), step + 1)]
    assert not any(start.any() or trajectory.any() for start, trajectory in places), "the first stream's next episode"


def test_memory_does_not_grow_with_the_limit_of_steps():
    whole, episodes, _ = play([ragged(3)], episodes=4, most_steps=6)
    returns, again, _ = play([ragged(3)], episodes=4, most_steps=10**15)
    np.testing.assert_array_equal(returns, whole)
    for one, other in zip(again, episodes, strict=True):
        assert_same([getattr(one, name) for name in ARRAYS], [getattr(other, name) for name in ARRAYS])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"token_set": "at5"}, marks=pytest.mark.slow),
        {"token_set": "fused1", "episode_window": (2,), "heads": 4, "kv_heads": 2},
    ],
)
def test_actions_in_episodes_of_different_lengths_equal_the_full_forward_pass(settings):
    policy = tiny(trajectory_embedding=True, **settings)
    recorder = RecordingActor(PolicyActor(CompiledPolicy(policy)))
    rollout([Group(recorder, ragged(3))], SHORT, seeds=seeds(3, 4), target_return=2.0, most_steps=6)
    expected = np.asarray(policy.actions(recorder.context))
    for stream, own in enumerate(seeds(3, 4)):
        steps = sum(alone(own, 0)[1])
        found = recorder.context.action[stream, :steps]
        np.testing.assert_allclose(found, expected[stream, :steps], rtol=1e-5, atol=1e-5)
