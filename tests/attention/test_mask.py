"""The mask rule against plain Python, tile kinds against the rule, and the oracle against a loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringrl.attention import attention
from ringrl.attention.mask import Rule, Side, classify, classify_pairs, visible
from tests.attention.reference import reference_attention

rules = st.builds(Rule, is_causal=st.booleans(), window=st.none() | st.tuples(st.integers(-1, 12), st.integers(0, 12)))


def tokens(size: int) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    """Return positions and segment ids of a tile, close together or arbitrary."""
    near = st.integers(-20, 20).flatmap(lambda start: st.just(list(range(start, start + size))))
    positions = near | st.lists(st.integers(-20, 20), min_size=size, max_size=size)
    same = st.integers(0, 2).map(lambda segment: [segment] * size)
    return st.tuples(positions, same | st.lists(st.integers(0, 2), min_size=size, max_size=size))


def prefixes(size: int) -> st.SearchStrategy[list[int]]:
    """Return the global prefixes of a tile: one for all queries, or arbitrary."""
    values = st.integers(-22, 22)
    return values.map(lambda prefix: [prefix] * size) | st.lists(values, min_size=size, max_size=size)


def side(*rows: tuple[list[int], ...]) -> Side:
    return Side(*(jnp.asarray(np.array(part, np.int32)) for part in zip(*rows, strict=True)))


def may_see(rule: Rule, query: tuple[int, int], key: tuple[int, int], prefix: int | None = None) -> bool:
    (query_position, query_segment), (key_position, key_segment) = query, key
    if query_segment != key_segment or (rule.is_causal and key_position > query_position):
        return False
    if rule.window is None or (prefix is not None and key_position < prefix):
        return True
    return query_position - rule.window[0] <= key_position <= query_position + rule.window[1]


@settings(max_examples=150)
@given(
    rule=rules,
    queries=st.tuples(tokens(4), tokens(4)),
    keys=st.tuples(tokens(5), tokens(5)),
    prefix=st.none() | st.tuples(prefixes(4), prefixes(4)),
)
def test_rule_and_tile_kinds(rule, queries, keys, prefix):
    query_side = side(*queries)._replace(prefix=None if prefix is None else jnp.asarray(prefix, jnp.int32))
    allowed = np.asarray(visible(rule, query_side, side(*keys)))
    for b, (query_row, key_row) in enumerate(zip(queries, keys, strict=True)):
        for i, query in enumerate(zip(*query_row, strict=True)):
            for j, key in enumerate(zip(*key_row, strict=True)):
                assert allowed[b, i, j] == may_see(rule, query, key, None if prefix is None else prefix[b][i])
    kind = classify(rule, query_side, side(*keys))
    assert bool(kind.all_visible) <= allowed.all(), "no mask arithmetic where some pair is hidden"
    assert bool(kind.any_visible) >= allowed.any(), "skipped where some pair is visible"


def test_tile_kinds_are_exact_for_tokens_in_order():
    """For one segment in order, minima and maxima classify every tile exactly."""
    windows = Rule(True, (9, 0)), Rule(False, (11, 3)), Rule(False, (0, 8)), Rule(True, (-1, 0)), Rule(False, (-1, 0))
    cases = [(rule, []) for rule in (Rule(), Rule(False), *windows)]
    cases += [(rule, [[prefix] * 4]) for rule in windows for prefix in (-15, -6, 0)]  # ends before the queries
    for rule, prefix in cases:
        for start in range(-24, 25):
            queries, keys = side((list(range(4)), [0] * 4, *prefix)), side((list(range(start, start + 6)), [0] * 6))
            allowed, kind = visible(rule, queries, keys), classify(rule, queries, keys)
            assert (bool(kind.any_visible), bool(kind.all_visible)) == (bool(allowed.any()), bool(allowed.all()))


@pytest.mark.parametrize("window", [(-1, 0), (5, 0), (12, 0)])
def test_tiles_between_the_prefix_and_the_window_are_skipped(window):
    """For documents in a row, only tiles with a visible pair are computed. Tiles may cross documents."""
    tile, lengths = 8, (40, 40, 28, 68, 16)
    positions, starts = np.arange(sum(lengths)), np.repeat(np.cumsum((0, *lengths[:-1])), lengths)
    queries, keys = side((positions, 0 * positions, starts)), side((positions, 0 * positions))
    allowed = np.asarray(visible(Rule(True, window), queries, keys)[0]).reshape(24, tile, 24, tile)
    tiles = [Side(*(None if x is None else x.reshape(-1, 1, tile) for x in part)) for part in (queries, keys)]
    some, every = map(np.asarray, classify_pairs(Rule(True, window), *tiles))
    np.testing.assert_array_equal(some, allowed.any((1, 3)))
    within = [len(set(starts[i : i + tile])) == 1 for i in range(0, len(starts), tile)]
    np.testing.assert_array_equal(every[within], allowed.all((1, 3))[within])
    assert some.sum() < np.tril(np.ones((24, 24))).sum(), "the window hides tiles of the own document"


def test_windows_up_to_int32(draw, quick):
    q, k, v = (draw(1, 13, 2, 2, 8)[name] for name in "qkv")
    unlimited, *windows = (
        quick(partial(attention, is_causal=False, local_window_size=size))(q, k, v)
        for size in (None, 2**31 - 1, 2**40, (2**31 - 1, 12), (12, 2**63))
    )
    for window in windows:
        np.testing.assert_array_equal(window, unlimited)


def test_any_segment_id_is_a_segment(draw, quick):
    q, k, v = (draw(1, 13, 2, 2, 8)[name] for name in "qkv")
    attend = quick(attention)
    for segment in (0, 7, -1, -2, 2**31 - 1):
        got = attend(q, k, v, segment_ids=jnp.full(13, segment))
        np.testing.assert_allclose(got, attend(q, k, v), rtol=1e-6, atol=1e-6, err_msg=str(segment))


def test_oracle_equals_the_definition(draw, oracle):
    arrays = draw(2, 6, 4, 2, 3)
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    positions, segments = np.array([[3, 1, 2, 9, 0, 5]] * 2), np.array([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 4]])
    rule, sides = Rule(True, (4, 0)), (positions, segments)
    o, lse, *_ = oracle(arrays, sides, sides, rule, scale=0.3, logits_soft_cap=2.0).values()
    for b, i, h in np.ndindex(2, 6, 4):
        query = (positions[b, i], segments[b, i])
        weights = np.array(
            [
                np.exp(2.0 * np.tanh(0.3 * q[b, i, h] @ k[b, j, h // 2] / 2.0))
                if may_see(rule, query, (positions[b, j], segments[b, j]))
                else 0.0
                for j in range(6)
            ]
        )
        assert weights.sum() > 0
        np.testing.assert_allclose(o[b, i, h], weights @ v[b, :, h // 2] / weights.sum(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[b, i, h], np.log(weights.sum()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradients_of_the_oracle_equal_those_of_jax(cap, draw, oracle):
    """With queries that see nothing."""
    arrays = draw(2, 9, 4, 2, 3)
    keys = np.tile(np.arange(9), (2, 1)), np.repeat([[0, 1]], [5, 4], axis=1).repeat(2, axis=0)
    queries = keys[0], np.where(keys[0] == 6, 7, keys[1])
    found = oracle(arrays, queries, keys, Rule(), logits_soft_cap=cap)
    assert np.isneginf(found["lse"][:, 6]).all()
    with jax.enable_x64(True):
        q, k, v, do, dlse = (jnp.asarray(arrays[name], jnp.float64) for name in ("q", "k", "v", "do", "dlse"))
        sides = [Side(*map(jnp.asarray, side)) for side in (queries, keys)]
        attend = lambda *qkv: reference_attention(*qkv, *sides, rule=Rule(), scale=3**-0.5, logits_soft_cap=cap)  # noqa: E731
        values, backward = jax.vjp(attend, q, k, v)
        expected = [np.asarray(x) for x in (*values, *backward((do, dlse)))]
    for x, other in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(x, other, rtol=1e-10, atol=1e-12)
