from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringrl.data.sampling.sampler import eligible_episodes
from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

TASK = "cartpole_swingup"
LENGTHS = [4, 9, 2, 9, 7, 1, 5, 3]  # 40 steps


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, random_episode, write_store) -> EpisodeStore:
    """A store of eight episodes with several lengths."""
    path: Path = tmp_path_factory.mktemp("selection") / "mixed.h5"
    return write_store(path, "cartpole", [random_episode("cartpole", n, i) for i, n in enumerate(LENGTHS)])


@given(few=st.integers(9, 45), more=st.integers(0, 40), seed=st.integers(0, 2**40))
def test_a_subset_is_as_large_as_fits_and_holds_every_smaller_one(mixed, few, more, seed):
    smaller, larger = eligible_episodes(mixed, TASK, seed, few), eligible_episodes(mixed, TASK, seed, few + more)
    assert set(smaller) <= set(larger)
    for chosen, limit in ((smaller, few), (larger, few + more)):
        assert (np.diff(chosen) > 0).all(), "in the order of collection, none twice"
        steps = mixed.lengths[chosen].sum()
        assert steps <= limit
        assert steps + max(LENGTHS) > limit or len(chosen) == len(LENGTHS), "one more might not have fitted"
    assert eligible_episodes(mixed, TASK, seed, few).tolist() == smaller.tolist()


def test_without_a_limit_all_are_taken_and_with_one_the_seed_decides(mixed):
    assert eligible_episodes(mixed, TASK, 3, None).tolist() == list(range(8))
    assert len({tuple(eligible_episodes(mixed, TASK, seed, 20)) for seed in range(20)}) > 10
    counts = np.bincount(np.concatenate([eligible_episodes(mixed, TASK, seed, 9) for seed in range(400)]), minlength=8)
    assert counts.min() > 20, "every episode can be the first"
    with pytest.raises(UserError, match=r"max_transitions: 8 is less than one episode of .*mixed\.h5 \(9 steps\)"):
        eligible_episodes(mixed, TASK, 0, 8)


def test_the_best_are_those_of_the_subset(mixed):
    returns = mixed.returns(TASK)
    for seed in range(10):
        chosen = eligible_episodes(mixed, TASK, seed, 20)
        found = eligible_episodes(mixed, TASK, seed, 20, 0.5)
        assert len(found) == round(0.5 * len(chosen))
        assert set(found) < set(chosen)
        assert returns[found].min() >= returns[np.setdiff1d(chosen, found)].max()
        assert found.tolist() == sorted(found)
