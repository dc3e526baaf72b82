"""Layouts against a NumPy definition, and their balance of causal work."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringrl.attention import from_layout, layout_positions, pad_to_layout, shard_positions, to_layout
from ringrl.attention.layout import LAYOUTS, check_length, length_multiple


def order(layout: str, length: int, ring: int) -> np.ndarray:
    """Return the order of tokens by definition: the tokens of device 0, then of device 1, ..."""
    tokens = np.arange(length)
    if layout == "contiguous" or ring == 1:
        return tokens
    if layout == "striped":
        return np.concatenate([tokens[device::ring] for device in range(ring)])
    chunks = np.split(tokens, 2 * ring)
    return np.concatenate([np.concatenate([chunks[r], chunks[2 * ring - 1 - r]]) for r in range(ring)])


@st.composite
def sequences(draw) -> tuple[str, int, int, np.ndarray, int]:
    """(layout, ring size, length, array, sequence axis)."""
    layout, ring = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 6))
    length = draw(st.integers(1, 4)) * length_multiple(layout, ring)
    shape = draw(st.lists(st.integers(1, 3), max_size=3))
    axis = draw(st.integers(0, len(shape)))
    shape.insert(axis, length)
    x = np.arange(math.prod(shape)).reshape(shape)
    return layout, ring, length, x, axis - draw(st.sampled_from([0, len(shape)]))


@settings(max_examples=25)
@given(sequences())
def test_to_layout_equals_the_definition_and_from_layout_inverts_it(sequence):
    layout, ring, length, x, axis = sequence
    there = to_layout(x, layout, ring, axis)
    np.testing.assert_array_equal(there, np.take(x, order(layout, length, ring), axis))
    np.testing.assert_array_equal(from_layout(there, layout, ring, axis), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring", [1, 2, 3, 8])
def test_positions_match_the_tokens(layout, ring):
    length = 2 * length_multiple(layout, ring)
    expected = order(layout, length, ring)
    np.testing.assert_array_equal(layout_positions(layout, length, ring), expected)
    np.testing.assert_array_equal(to_layout(jnp.arange(length), layout, ring, 0), expected)
    piece = jax.jit(lambda index: shard_positions(layout, ring, length // ring, index))
    for index, tokens in enumerate(np.split(expected, ring)):
        np.testing.assert_array_equal(piece(index), tokens)
        assert piece(index).dtype == jnp.int32


def visible_pairs(layout: str, length: int, ring: int) -> np.ndarray:
    """Return the number of visible pairs (hop, device) when device r holds the keys of device r - hop."""
    tokens = np.split(order(layout, length, ring), ring)
    return np.array(
        [[(tokens[r][:, None] >= tokens[(r - hop) % ring]).sum() for r in range(ring)] for hop in range(ring)]
    )


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_causal_work_is_balanced(ring):
    """Zigzag has equal work on every device in every hop, striped up to half a local chunk."""
    tokens = 64
    local = tokens // ring
    own = np.array([shard_positions("zigzag", ring, local, r) for r in range(ring)])
    assert (np.sort(own.ravel()) == np.arange(tokens)).all()
    zigzag, striped, contiguous = (visible_pairs(layout, tokens, ring) for layout in LAYOUTS[::-1])
    assert (zigzag == zigzag[:, :1]).all()
    assert (zigzag[1:] == local**2 // 2).all()
    assert np.ptp(striped, axis=1).max() == local
    assert (contiguous[1:].min(1) == 0).all()
    assert (contiguous[1:].max(1) == local**2).all()
    actual = (own[:, :, None] >= own[0][None, None, :]).sum((1, 2))
    assert (actual[1:] == zigzag[1:, 0].max()).all(), "the library's own positions, not only the definition"


@pytest.mark.parametrize(
    ("layout", "ring", "length", "nearest"),
    [
        ("zigzag", 4, 21, "16 or 24"),
        ("zigzag", 4, 3, "use 8 tokens"),
        ("striped", 4, 21, "20 or 24"),
        ("contiguous", 8, 9, "8 or 16"),
    ],
)
def test_errors_name_the_nearest_lengths_that_divide(layout, ring, length, nearest):
    for call in (
        lambda: to_layout(np.zeros((1, length)), layout, ring),
        lambda: from_layout(np.zeros((1, length)), layout, ring),
        lambda: layout_positions(layout, length, ring),
        lambda: check_length("q", length, layout, ring),
    ):
        with pytest.raises(ValueError, match=nearest):
            call()


def test_errors_name_the_argument():
    x = np.zeros((1, 8))
    for message, call in (
        ("^layout: 'spiral'", lambda: to_layout(x, "spiral", 2)),
        ("^ring_size: ", lambda: to_layout(x, "zigzag", 0)),
        ("^axis: 2 ", lambda: to_layout(x, "zigzag", 2, axis=2)),
        ("^axis: -3 ", lambda: pad_to_layout(x, "zigzag", 2, axis=-3)),
        ("^layout: 'spiral'", lambda: shard_positions("spiral", 2, 4, 0)),
        ("^local_length: a sequence of 6 tokens does not divide", lambda: shard_positions("zigzag", 2, 3, 0)),
        ("^x: expected 32-bit integers", lambda: to_layout(np.array([[5, 2**32 + 5]]), "striped", 2)),
        ("^x: expected 32-bit integers", lambda: from_layout(np.array([[5, -(2**31) - 1]]), "striped", 2)),
        ("^x: expected 32-bit integers", lambda: pad_to_layout(np.array([[5, 2**33]]), "striped", 2)),
        ("^value: 256 is not a value of .*uint8", lambda: pad_to_layout(x.astype(np.uint8), "striped", 2, value=256)),
        ("^value: -1 is not a value of .*uint32", lambda: pad_to_layout(x.astype(np.uint32), "striped", 2, value=-1)),
        ("^value: 0.5 is not a value of .*int32", lambda: pad_to_layout(x.astype(np.int32), "striped", 2, value=0.5)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_int64_within_32_bits_keeps_its_values():
    ids = np.array([[5, 2**31 - 1, -(2**31), 7]])
    np.testing.assert_array_equal(from_layout(to_layout(ids, "striped", 2), "striped", 2), ids)
    np.testing.assert_array_equal(pad_to_layout(ids, "striped", 8, value=-1)[0, 4:], -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_padding_is_minimal(layout, length):
    x = np.ones((2, length, 3), np.int32)
    padded = pad_to_layout(x, layout, 4, value=7)
    added = padded.shape[1] - length
    assert padded.shape[1] % length_multiple(layout, 4) == 0
    assert 0 <= added < length_multiple(layout, 4)
    np.testing.assert_array_equal(padded[:, :length], x)
    assert (padded[:, length:] == 7).all()
    assert pad_to_layout(x[:, :, 0], layout, 4, axis=-1).shape == padded.shape[:2]
