"""Target returns follow from the text of `--target` and the returns of the training data."""

import numpy as np
import pytest

from ringrl.errors import UserError
from ringrl.evaluation.target import TargetPolicy

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
