import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringrl.data.exorl.importer import Subset
from ringrl.errors import UserError

RULES = ["first", "last", "random", "spread"]


@given(
    rule=st.sampled_from(RULES),
    episodes=st.integers(1, 300),
    max_episodes=st.none() | st.integers(1, 400),
    max_transitions=st.none() | st.integers(50, 20_000),
    seed=st.integers(0, 2**32),
)
def test_a_subset_is_as_large_as_its_limits_and_in_order(rule, episodes, max_episodes, max_transitions, seed):
    chosen = Subset(rule, max_episodes, max_transitions, seed).choose(episodes, 50)
    assert len(chosen) == min(episodes, max_episodes or episodes, (max_transitions or 50 * episodes) // 50)
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < episodes


def test_the_rules():
    assert Subset("first", 3).choose(10, 50).tolist() == [0, 1, 2]
    assert Subset("last", 3).choose(10, 50).tolist() == [7, 8, 9]
    assert Subset("spread", 4).choose(10, 50).tolist() == [0, 3, 6, 9]
    assert Subset("spread", 1).choose(10, 50).tolist() == [0]
    drawn = [Subset("random", 3, seed=seed).choose(1000, 50).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert Subset("first", 3, 149).choose(10, 50).tolist() == [0, 1]


def test_every_episode_is_drawn_equally_often():
    counts = np.zeros(20)
    for seed in range(400):
        counts[Subset("random", 5, seed=seed).choose(20, 50)] += 1
    assert 60 < counts.min() < 100 < counts.max() < 140


def test_description_of_a_subset():
    assert Subset("spread", 10).describe(10, 10_000) == "10 of 10,000 episodes, at equal distances"
    assert Subset("random", 10, seed=3).describe(10, 240) == "10 of 240 episodes, at random (seed 3)"
    assert Subset("random", 500).describe(240, 240) == "all 240 episodes"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_episodes": 0}, "--max-episodes: 0 is too small"),
        ({"max_transitions": -1}, "--max-transitions: -1 is too small"),
        ({"seed": -1}, "--seed is -1"),
        ({"max_transitions": 49}, "--max-transitions is 49, less than one episode of 50 steps"),
    ],
)
def test_limits_that_leave_nothing(values, message):
    with pytest.raises(UserError, match=message):
        Subset(**values).choose(10, 50)
