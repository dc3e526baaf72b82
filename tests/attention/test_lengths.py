"""Queries and keys of their own lengths and positions, and contexts of different lengths, against the definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ringrl.attention import attention, from_layout, ring_attention, ring_attention_shard, to_layout
from ringrl.attention.mask import Rule

pytestmark = pytest.mark.usefixtures("eight_devices")

NAMES = ("o", "lse", "dq", "dk", "dv")
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
slow = partial(pytest.param, marks=pytest.mark.slow)
BATCH, FEW, MANY = 2, 16, 48
OF_TOKENS = ("segment_ids", "key_segment_ids", "positions", "key_positions", "global_prefix")
RANDOM = np.random.default_rng(3)
SEGMENTS = {tokens: np.sort(RANDOM.integers(0, 3, (BATCH, tokens)), axis=1) for tokens in (FEW, MANY)}
MASKS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"is_causal": False, "local_window_size": (9, 5)},
    "narrow": {"is_causal": False, "local_window_size": (3, 1)},
    "prefix": {"local_window_size": (3, 0), "global_prefix": RANDOM.integers(0, MANY, (BATCH, FEW))},
    "lengths": {"query_seq_lengths": np.array([11, 0]), "key_value_seq_lengths": np.array([40, 13])},
    "segments": {"segment_ids": SEGMENTS[FEW], "key_segment_ids": SEGMENTS[MANY], "is_causal": False},
    "positions": {
        "positions": RANDOM.integers(0, 99, (BATCH, FEW)), "key_positions": RANDOM.integers(0, 99, (BATCH, MANY)),
    },
}  # fmt: skip
RINGS = [(8, "contiguous", "ring", "narrow")]  # the window must not skip hops
RINGS += [
    (*((2, "striped"), (8, "contiguous"), (4, "zigzag"))[number % 3], "ring", mask) for number, mask in enumerate(MASKS)
]
RINGS += [(2, "striped", "ulysses", mask) for mask in ("window", "lengths")]
RINGS += [(4, "contiguous", "all_gather", mask) for mask in ("prefix", "positions")]


def arrays(draw, queries: int, keys: int) -> dict[str, np.ndarray]:
    found = draw(BATCH, max(queries, keys), 4, 2, 8)
    return {name: x[:, : keys if name in ("k", "v") else queries] for name, x in found.items()}


def expect(oracle, given: dict, **keywords) -> dict[str, np.ndarray]:
    """Return the definition's values for keywords of `attention`."""
    queries, keys = given["q"].shape[1], given["k"].shape[1]
    side = {
        "q": [keywords.get("positions", np.tile(np.arange(queries) + keys - queries, (BATCH, 1))),
              keywords.get("segment_ids", np.zeros((BATCH, queries), int))],
        "k": [keywords.get("key_positions", np.tile(np.arange(keys), (BATCH, 1))),
              keywords.get("key_segment_ids", np.zeros((BATCH, keys), int))],
    }  # fmt: skip
    for name, lengths, nothing in (("q", "query_seq_lengths", -1), ("k", "key_value_seq_lengths", -2)):
        if lengths in keywords:
            is_padding = np.arange(side[name][1].shape[1]) >= keywords[lengths][:, None]
            side[name][1] = np.where(is_padding, nothing, side[name][1])
    prefix = (keywords["global_prefix"],) if "global_prefix" in keywords else ()
    rule = Rule(keywords.get("is_causal", True), keywords.get("local_window_size"))
    return oracle(given, (*side["q"], *prefix), tuple(side["k"]), rule, scale=keywords.get("scale"))


def values(given: dict, attend, layout: str = "contiguous", ring: int = 1, **keywords) -> dict[str, jax.Array]:
    integers = {name: keywords.pop(name) for name in OF_TOKENS if name in keywords}

    @partial(jax.jit, compiler_options=QUICK)
    def run(given: dict, integers: dict) -> list[jax.Array]:
        given, integers = jax.tree.map(lambda x: to_layout(jnp.asarray(x), layout, ring), (given, integers))
        function = partial(attend, return_residual=True, **keywords, **integers)
        found, backward = jax.vjp(function, *(given[name] for name in "qkv"))
        return [from_layout(x, layout, ring) for x in (*found, *backward((given["do"], given["dlse"])))]

    return dict(zip(NAMES, run(given, integers), strict=True))


def assert_equal(got: dict, expected: dict) -> None:
    for name, x in expected.items():
        y, finite = np.asarray(got[name], np.float64), np.isfinite(x)
        np.testing.assert_array_equal(y[~finite], x[~finite], err_msg=name)
        assert np.abs(y[finite] - x[finite]).max() <= 1e-5 * np.abs(x[finite]).max(), name


@pytest.mark.parametrize("mask", [slow(name) if name in ("full", "window", "narrow") else name for name in MASKS])
def test_few_queries_and_many_keys(mask, draw, oracle):
    given = arrays(draw, FEW, MANY)
    assert_equal(values(given, attention, **MASKS[mask]), expect(oracle, given, **MASKS[mask]))


@pytest.mark.parametrize("mask", ["causal", slow("window")])
def test_many_queries_and_few_keys(mask, draw, oracle):
    """The first queries stand before all keys, so that a causal one sees nothing."""
    given = arrays(draw, MANY, FEW)
    expected = expect(oracle, given, **MASKS[mask])
    assert np.isneginf(expected["lse"][:, : MANY - FEW]).all() == (mask == "causal")
    assert_equal(values(given, attention, **MASKS[mask]), expected)


def test_lengths_of_self_attention(draw, oracle):
    given, keywords = arrays(draw, MANY, MANY), {"segment_ids": SEGMENTS[MANY], "positions": SEGMENTS[MANY] * 7}
    of_keys = {"key_segment_ids": SEGMENTS[MANY], "key_positions": SEGMENTS[MANY] * 7}
    lengths = {"key_value_seq_lengths": np.array([30, 48])}
    assert_equal(
        values(given, attention, **keywords, **lengths), expect(oracle, given, **keywords, **of_keys, **lengths)
    )


# One mask for each array that travels, each strategy, and hops that a window must not skip.
QUICK_RINGS = [("ring", "narrow"), ("ring", "prefix"), ("ring", "lengths"), ("ring", "positions")]
QUICK_RINGS += [("all_gather", "positions")]


@pytest.mark.parametrize(
    ("ring", "layout", "strategy", "mask"),
    [one if one[2:] in QUICK_RINGS and one[0] != 2 else slow(*one) for one in RINGS],
)
def test_around_the_ring(ring, layout, strategy, mask, draw, oracle):
    given, mesh = arrays(draw, FEW, MANY), Mesh(np.array(jax.devices()[:ring]), ("seq",))
    attend = partial(ring_attention, mesh=mesh, layout=layout, strategy=strategy)
    assert_equal(values(given, attend, layout, ring, **MASKS[mask]), expect(oracle, given, **MASKS[mask]))


@pytest.mark.parametrize("is_ring", [slow(False), True])
def test_a_traced_scale_has_a_gradient(is_ring, draw, oracle):
    given = arrays(draw, FEW, MANY)
    attend = partial(ring_attention, mesh=Mesh(np.array(jax.devices()[:2]), ("seq",)), layout="contiguous")
    attend = attend if is_ring else attention
    loss = jax.jit(
        jax.value_and_grad(lambda scale: (attend(*(given[n] for n in "qkv"), scale=scale) * given["do"]).sum())
    )
    value, gradient = loss(jnp.float32(0.3))
    before, at, after = (
        (expect(oracle, given, scale=scale)["o"] * given["do"]).sum() for scale in (0.3 - 1e-4, 0.3, 0.3 + 1e-4)
    )
    np.testing.assert_allclose(value, at, atol=1e-4)
    np.testing.assert_allclose(gradient, (after - before) / 2e-4, rtol=1e-4, atol=1e-4)


def test_strict_promotion(draw):
    given = arrays(draw, FEW, FEW)
    mesh = Mesh(np.array(jax.devices()[:2]), ("seq",))
    keywords = {"segment_ids": SEGMENTS[FEW], "local_window_size": (3, 0), "logits_soft_cap": 2.0}
    with jax.numpy_dtype_promotion("strict"):
        for attend in (attention, partial(ring_attention, mesh=mesh, layout="contiguous")):
            for dtype in ("float32", "bfloat16"):
                q, k, v = (jnp.asarray(given[name], dtype) for name in "qkv")
                jax.eval_shape(jax.grad(lambda q, k, v, attend=attend: attend(q, k, v, **keywords).sum()), q, k, v)


@pytest.mark.parametrize("ring", [slow(1), 2])
def test_one_context_without_the_batch_axis(ring, draw):
    given = arrays(draw, FEW, MANY)
    attend = partial(ring_attention, mesh=Mesh(np.array(jax.devices()[:ring]), ("seq",)), layout="contiguous")
    keywords = {"segment_ids": SEGMENTS[FEW][1], "key_segment_ids": SEGMENTS[MANY][1], "return_residual": True}
    whole = jax.jit(partial(attention, **keywords))(*(given[name][1:] for name in "qkv"))
    one = jax.jit(partial(attend, **keywords))(*(given[name][1] for name in "qkv"))
    for x, y in zip(one, whole, strict=True):
        np.testing.assert_allclose(x, y[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ring", [1, 2])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 0, 4), (2, 4, 0), (0, 4, 4)])
def test_without_tokens(batch, queries, keys, ring):
    attend = partial(ring_attention, mesh=Mesh(np.array(jax.devices()[:ring]), ("seq",)), return_residual=True)
    q, k = jnp.ones((batch, queries, 4, 8), jnp.bfloat16), jnp.ones((batch, keys, 2, 8), jnp.bfloat16)
    for one in (attend, partial(attention, return_residual=True)):
        (o, lse), backward = jax.vjp(one, q, k, k)
        assert (o.shape, o.dtype, lse.shape) == (q.shape, q.dtype, q.shape[:3])
        assert not o.any()
        assert np.isneginf(lse).all()
        assert not any(x.any() for x in backward((o, lse)))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"segment_ids": np.zeros(FEW, int)}, "key_segment_ids: missing; the 48 keys are not the 16 queries"),
        ({"key_segment_ids": np.zeros(MANY, int)}, "segment_ids: missing"),
        ({"key_positions": np.zeros(FEW, int)}, r"key_positions: expected shape \(48,\) or \(2, 48\), got \(16,\)"),
        (
            {"query_seq_lengths": np.zeros(3, int)},
            r"query_seq_lengths: expected integers of shape \(\) or \(2,\), got int64 \(3,\)",
        ),
        ({"key_value_seq_lengths": np.zeros(2)}, "key_value_seq_lengths: expected integers"),
        ({"key_value_seq_lengths": np.array([2**32 + 1, 3])}, r"key_value_seq_lengths: expected 0 ... 48 tokens, got"),
        ({"query_seq_lengths": -1}, "query_seq_lengths: expected 0 ... 16 tokens, got -1"),
        (
            {"segment_ids": np.zeros(FEW, int), "key_segment_ids": np.full(MANY, 1 - 2**31)},
            "key_segment_ids: .* reserved",
        ),
        ({"scale": np.float32([1, 2])}, r"scale: expected one number, got float32 \(2,\)"),
    ],
)
def test_bad_arguments(keywords, message, draw):
    given = arrays(draw, FEW, MANY)
    with pytest.raises(ValueError, match=message):
        attention(*(given[name] for name in "qkv"), **keywords)


@pytest.mark.parametrize("attend", [attention, ring_attention])
def test_keywords_are_checked_without_tokens(attend):
    q, mesh = jnp.ones((2, 0, 4, 8)), {} if attend is attention else {"mesh": None}
    with pytest.raises(TypeError, match="nonsense"):
        attend(q, q, q, nonsense=1, **mesh)
    with pytest.raises(ValueError, match="alibi_slopes: expected 4"):
        attend(q, q, q, alibi_slopes=np.zeros(77), **mesh)


def test_lengths_inside_shard_map_count_the_tokens_of_all_devices(draw):
    given = arrays(draw, FEW, FEW)
    q, k, v = (jnp.asarray(given[name]) for name in "qkv")
    lengths = {"query_seq_lengths": np.array([11, 16]), "key_value_seq_lengths": np.array([13, 9])}
    mesh, spec = Mesh(np.array(jax.devices()[:4]), ("seq",)), PartitionSpec(None, "seq")
    attend = partial(ring_attention_shard, layout="contiguous", **lengths)
    got = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))(q, k, v)
    np.testing.assert_allclose(got, attention(q, k, v, **lengths), rtol=1e-5, atol=1e-6)
