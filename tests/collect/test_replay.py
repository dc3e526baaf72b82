import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringrl.collect.learner import Replay
from ringrl.config import ActorCriticConfig
from ringrl.envs import DOMAINS

LENGTH = 7
DOMAIN = dataclasses.replace(DOMAINS["cartpole"], episode_length=LENGTH)


def _replay(steps: list[int]) -> tuple[Replay, list[dict[str, np.ndarray]]]:
    """Return a replay of episodes with these steps. The observations contain the numbers of episode and row."""
    random = np.random.default_rng(0)
    replay, recorded = Replay(DOMAIN, len(steps) + 1, column=1), []
    for number in range(len(steps)):
        observation = np.zeros((LENGTH + 1, 5), np.float32)
        observation[:, 0], observation[:, 1] = number, np.arange(LENGTH + 1)
        action = random.uniform(-1, 1, (LENGTH + 1, 1)).astype(np.float32)
        reward = random.random((LENGTH + 1, 2)).astype(np.float32)
        discount = np.ones((LENGTH + 1, 1), np.float32)
        discount[steps[number]] = number % 2  # every other episode terminates
        recorded.append({"observation": observation, "action": action, "reward": reward, "discount": discount})
        replay.put(number, recorded[-1], steps[number])
    return replay, recorded


@settings(max_examples=60)
@given(
    whole=st.integers(0, 4),
    growing=st.integers(0, 3),
    grown=st.integers(0, LENGTH),
    steps=st.integers(1, 5),
    discount=st.floats(0.5, 1, exclude_max=True),
)
def test_samples_are_n_step_transitions_of_the_filled_part(whole, growing, grown, steps, discount):
    if whole == 0 and growing * grown == 0:
        return
    replay, recorded = _replay([LENGTH] * whole + [grown] * growing)
    batch = replay.sample(np.random.default_rng(0), (3, 40), ActorCriticConfig(n_step=steps, discount=discount))
    assert batch.observation.shape == batch.following.shape == (3, 40, 5)
    assert batch.action.shape == (3, 40, 1)
    assert batch.reward.shape == batch.discount.shape == (3, 40)
    assert all(array.dtype == np.float32 for array in batch)
    for at in np.ndindex(3, 40):
        number, row = (int(value) for value in batch.observation[at][:2])
        episode = recorded[number]
        filled = LENGTH if number < whole else grown
        assert row < filled
        last = min(row + steps, filled)
        np.testing.assert_array_equal(batch.following[at], episode["observation"][last])
        np.testing.assert_array_equal(batch.action[at], episode["action"][row + 1])
        rewards = [discount**k * float(episode["reward"][row + 1 + k, 1]) for k in range(last - row)]
        assert float(batch.reward[at]) == pytest.approx(sum(rewards), rel=1e-5)
        is_followed = last < filled or number % 2
        assert float(batch.discount[at]) == pytest.approx(discount ** (last - row) * is_followed, rel=1e-5)


def test_every_transition_is_drawn_equally_often():
    replay, _ = _replay([LENGTH, LENGTH, 3, 3])
    assert replay.transitions == 2 * LENGTH + 2 * 3
    batch = replay.sample(np.random.default_rng(0), (40_000,), ActorCriticConfig())
    drawn = np.zeros((4, LENGTH))
    np.add.at(drawn, (np.asarray(batch.observation[:, 0], int), np.asarray(batch.observation[:, 1], int)), 1)
    assert (drawn[2:, 3:] == 0).all()
    often = np.concatenate([drawn[:2].ravel(), drawn[2:, :3].ravel()])
    np.testing.assert_allclose(often, 40_000 / replay.transitions, rtol=0.1)
