"""Checksums change with any single value."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringrl.training.checkpoints import array_checksums, with_checksum, without_checksum

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
def test_one_flipped_bit_changes_the_checksum_of_its_array_only(name: str, bit: int) -> None:
    before = dict(zip(sorted(TREE), array_checksums(TREE), strict=True))
    after = dict(zip(sorted(TREE), array_checksums(TREE | {name: flipped(TREE[name], bit)}), strict=True))
    assert [key for key in before if before[key] != after[key]] == [name]


def test_values_with_a_checksum_survive_json() -> None:
    values = {"mean": [0.1, 1e-300, float("nan")], "name": "walker", "nothing": None, "deep": {"b": 1, "a": 2.0}}
    text = json.dumps(with_checksum(values))
    assert json.dumps(without_checksum(json.loads(text)), sort_keys=True) == json.dumps(values, sort_keys=True)
    with pytest.raises(ValueError, match="its checksum differs"):
        without_checksum(values)
    for was, now in (("0.1", "0.3"), ("walker", "wblker"), ("2.0", "6.0"), ('"b"', '"c"')):
        assert was in text
        with pytest.raises(ValueError, match="its checksum differs"):
            without_checksum(json.loads(text.replace(was, now)))
