import numpy as np
import pytest

from ringrl.evaluation.streams import stream_scores

nan = np.nan
RETURNS = np.array([[1, 5, 3], [4, 2, nan], [7, nan, nan], [nan, nan, nan]])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("first", [1, 4, 7, nan]), ("last", [3, nan, nan, nan]), ("mean", [3, 3, 7, nan]), ("best", [5, 4, 7, nan])],
)
def test_scores_stand_on_what_finished(metric, expected):
    np.testing.assert_array_equal(stream_scores(RETURNS, metric), expected)
