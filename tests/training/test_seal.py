"""A seal that one changed value breaks, whatever the value."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringrl.training.seal import array_seals, sealed, unsealed

TREE = {
    "float": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.asarray(jnp.linspace(0, 3, 5, dtype=jnp.bfloat16)),
    "count": np.array(7, np.int32),
    "zeros": np.zeros(6, np.float32),
}


def flipped(array: np.ndarray, bit: int) -> np.ndarray:
    content = bytearray(array.tobytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    return np.frombuffer(bytes(content), array.dtype).reshape(array.shape)


@given(st.sampled_from(sorted(TREE)), st.integers(0, 10_000))
def test_one_flipped_bit_breaks_the_seal_of_its_array_alone(name: str, bit: int) -> None:
    before = dict(zip(sorted(TREE), array_seals(TREE), strict=True))
    after = dict(zip(sorted(TREE), array_seals(TREE | {name: flipped(TREE[name], bit)}), strict=True))
    assert [key for key in before if before[key] != after[key]] == [name]


def test_what_was_sealed_comes_back_through_json() -> None:
    values = {"mean": [0.1, 1e-300, float("nan")], "name": "walker", "nothing": None, "deep": {"b": 1, "a": 2.0}}
    text = json.dumps(sealed(values))
    assert json.dumps(unsealed(json.loads(text)), sort_keys=True) == json.dumps(values, sort_keys=True)
    assert unsealed({"old": 1}) == {"old": 1}, "what was written before there were seals"
    for was, now in (("0.1", "0.3"), ("walker", "wblker"), ("2.0", "6.0"), ('"b"', '"c"')):
        assert was in text
        with pytest.raises(ValueError, match="seal is broken"):
            unsealed(json.loads(text.replace(was, now)))
