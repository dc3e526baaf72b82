"""A part of a batch, read alone, equals that part of the whole batch, and only its rows are read."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringrl.attention import LAYOUTS, layout_positions
from ringrl.config import ContextConfig
from ringrl.context import Context
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.data.store import EpisodeStore

TASK = "cartpole_swingup"
LENGTHS = [6, 1, 9, 4, 9, 2]
PADDED = 32  # steps; contexts hold up to 27


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, random_episode, write_store) -> EpisodeStore:
    """A store of random episodes with several lengths."""
    path = tmp_path_factory.mktemp("contexts") / "mixed.h5"
    return write_store(path, "cartpole", [random_episode("cartpole", n, i) for i, n in enumerate(LENGTHS)])


@pytest.fixture(scope="module")
def made(mixed: EpisodeStore) -> ContextSampler:
    config = ContextConfig(trajectories=3, order="random")
    return ContextSampler(mixed, TASK, config, Normalisation.of(mixed), 4, 0)


@pytest.fixture(scope="module")
def segments(tmp_path_factory, random_episode, write_store) -> ContextSampler:
    """A sampler of segments of four steps, the first two with a larger weight."""
    episodes = [random_episode("cartpole", n, i) for i, n in enumerate([6, 5, 9, 4, 9, 7])]
    store = write_store(tmp_path_factory.mktemp("contexts") / "segments.h5", "cartpole", episodes)
    config = ContextConfig(trajectories=3, order="random", segment_steps=4, first_steps=2, first_steps_weight=50)
    return ContextSampler(store, TASK, config, Normalisation.of(store), 4, 0)


@pytest.fixture(scope="module", params=["made", "segments"])
def either(request: pytest.FixtureRequest) -> ContextSampler:
    """A sampler of whole episodes, or of segments."""
    return request.getfixturevalue(request.param)


def assert_part(found: Context, whole: Context, rows: slice, times: Any) -> None:
    expected = jax.tree.map(lambda x: x[rows][:, times], whole)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path), strict=True)


ascending_times = st.one_of(
    st.sets(st.integers(0, PADDED - 1)).map(lambda times: np.array(sorted(times))),
    st.builds(lambda a, n, s: np.arange(a, PADDED, s)[:n], *(st.integers(low, 20) for low in (0, 0, 1))),
    st.tuples(st.sampled_from(LAYOUTS), st.sampled_from([2, 4, 8]), st.integers(0, 7)).map(
        lambda x: np.asarray(layout_positions(x[0], PADDED, x[1])).reshape(x[1], -1)[x[2] % x[1]]
    ),
).map(lambda times: times.astype(np.int64))


@settings(max_examples=150)
@given(step=st.integers(0, 5), first=st.integers(0, 4), past=st.integers(0, 4), times=ascending_times)
def test_a_rectangle_equals_that_part_of_the_batch(either, step, first, past, times):
    draw, rows = either.draw(step), slice(first, past)
    whole = either.read(draw, slice(None), np.arange(PADDED))
    assert_part(either.batch(step), whole, slice(None), slice(0, either.time))
    assert_part(either.read(draw, rows, times), whole, rows, times)


class Recorded:
    """An array that records the rows that are read."""

    def __init__(self, array: np.ndarray, rows: set[int]) -> None:
        self.array, self.rows, self.shape = array, rows, array.shape

    def __getitem__(self, rows: slice | np.ndarray | int) -> np.ndarray:
        self.rows.update(np.atleast_1d(np.arange(len(self.array))[rows]).tolist())
        return self.array[rows]


@pytest.fixture
def recording(mixed: EpisodeStore) -> Callable[[], dict[str, set[int]]]:
    """Replace the store's arrays by recording ones, and return the recorded rows."""
    rows: dict[str, set[int]] = {key: set() for key in mixed.arrays}
    mixed.arrays = {key: Recorded(array, rows[key]) for key, array in mixed.arrays.items()}  # type: ignore[misc]
    yield lambda: rows
    mixed.__init__(mixed.path)  # type: ignore[misc]


@pytest.mark.parametrize("times", [[0], [5], [6], [9, 10, 11], [3, 7, 11, 15], [28, 30], "starts"])
def test_only_the_rows_that_are_needed_are_read(mixed, made, recording, times):
    draw = made.draw(1)
    times = draw.starts[2, :3].tolist() if times == "starts" else times
    made.read(draw, slice(2, 3), np.array(times))
    observation, action, reward = set(), set(), set()
    for t in times:
        k = int(np.searchsorted(draw.starts[2], t, side="right")) - 1
        if k == 3:
            continue  # padding
        first = int(mixed.offsets[draw.episodes[2, k]])
        row = first + t - int(draw.starts[2, k])
        observation.add(row)
        before = row if row > first else int(mixed.offsets[draw.episodes[2, k - 1] + 1]) - 1 if k else None
        action |= {row + 1, before, row} - {None}  # the row of a state has the action before the state
        reward |= {*range(first, row + 2), before} - {None}
    read = recording()
    assert read["observation"] == observation
    assert read["action"] == action
    assert read[f"reward/{TASK}"] <= reward
    assert {key for key, rows in read.items() if rows} <= {"observation", "action", f"reward/{TASK}"}
    assert observation or times == [28, 30]


@pytest.mark.parametrize("times", [[-3, 2], [2, 1], [2, 2]])
def test_times_that_do_not_ascend_are_rejected(made, times):
    with pytest.raises(ValueError, match="expected ascending times, none below 0"):
        made.read(made.draw(0), slice(None), np.array(times))
