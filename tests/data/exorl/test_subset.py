import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringrl.data.exorl.importer import chosen_episodes


@given(st.sampled_from(["first", "last", "spread"]), st.none() | st.integers(1, 400), st.integers(1, 300))
def test_a_subset_is_as_large_as_its_limit_and_in_order(rule, limit, episodes):
    chosen, _ = chosen_episodes(rule, limit, episodes)
    assert len(chosen) == min(episodes, limit or episodes)
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < episodes


@pytest.mark.parametrize(
    ("rule", "limit", "indices", "description"),
    [
        ("first", 3, [0, 1, 2], "3 of 10 episodes, the first ones"),
        ("last", 3, [7, 8, 9], "3 of 10 episodes, the last ones"),
        ("spread", 4, [0, 3, 6, 9], "4 of 10 episodes, at equal distances"),
        ("spread", 1, [0], "1 of 10 episodes, at equal distances"),
        ("last", 10, list(range(10)), "all 10 episodes"),
    ],
)
def test_the_rules(rule, limit, indices, description):
    chosen, found = chosen_episodes(rule, limit, 10)
    assert (chosen.tolist(), found) == (indices, description)
