"""Hidden keys, queries without visible keys, sums over parts of the keys, and invalid arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ringrl.attention import attention, decode_attention, ring_attention, ring_attention_shard
from ringrl.attention.attend import LOCAL
from ringrl.attention.attend import attend as local_attention
from ringrl.attention.contract import Cotangents, Inputs, by_head
from ringrl.attention.kernels import xla
from ringrl.attention.mask import Options, Rule, Side

NAMES = ("q", "k", "v")
slow = partial(pytest.param, marks=pytest.mark.slow)


def side(positions: np.ndarray, segment_ids: np.ndarray) -> Side:
    return Side(jnp.asarray(positions, jnp.int32), jnp.asarray(segment_ids, jnp.int32))


@partial(jax.jit, static_argnums=7, compiler_options={"xla_backend_optimization_level": 0})
def local(q, k, v, do, dlse, queries, keys, options):
    """Return (o, lse), (dq, dk, dv) of queries and keys with different positions."""
    values, backward = jax.vjp(lambda *qkv: local_attention(*qkv, queries, keys, options, LOCAL), q, k, v)
    return values, backward((do, dlse))


def gradients(arrays: dict[str, np.ndarray], **options) -> tuple[jax.Array, ...]:
    """Return o, lse, dq, dk, dv of the public function."""

    @jax.jit
    def run(q, k, v, do, dlse):
        values, backward = jax.vjp(lambda *qkv: attention(*qkv, return_residual=True, **options), q, k, v)
        return *values, *backward((do, dlse))

    return run(*(arrays[name] for name in ("q", "k", "v", "do", "dlse")))


@pytest.mark.parametrize(
    ("why", "cap"),
    [
        ("segment", 2.0),
        ("causal", None),
        ("window", None),
        slow("segment", None),
        slow("causal", 2.0),
        slow("window", 2.0),
    ],
)
def test_queries_without_visible_keys(why, cap, draw, oracle):
    """Queries and keys have different positions, as on a device of a ring; some queries see no key."""
    arrays = draw(2, 20, 4, 2, 8)
    arrays |= {name: arrays[name][:, :13] for name in ("k", "v")}
    order, zero = np.tile(np.arange(20), (2, 1)), np.zeros((2, 20), int)
    queries, keys = (order, zero), (order[:, :13], zero[:, :13])
    rule = Rule()
    if why == "segment":
        queries = (order, order // 5)  # the keys are of segments 0 and 2
        keys = (np.zeros((2, 13), int), np.tile(np.repeat([0, 2], [6, 7]), (2, 1)))
    elif why == "causal":
        keys = (order[:, :13] + np.array([[7], [30]]), zero[:, :13])  # in the second row no query sees any
    else:
        rule = Rule(is_causal=False, window=(2, 1))
    options = Options(rule, 0.5, cap, 8, 8)
    expected = oracle(arrays, queries, keys, rule, scale=0.5, logits_soft_cap=cap)
    blind = np.isneginf(expected["lse"])
    assert blind.any()
    assert not blind.all()
    arrays["dlse"][blind] = np.nan  # the cotangent of a constant must not spread
    qkv = [arrays[name] for name in NAMES]
    (o, lse), found = local(*qkv, arrays["do"], arrays["dlse"], side(*queries), side(*keys), options)
    np.testing.assert_array_equal(np.isneginf(lse), blind)
    np.testing.assert_array_equal(np.asarray(o)[blind], 0)
    assert np.isfinite(o).all()
    for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
        assert np.isfinite(gradient).all(), name
        if name == "dq":
            np.testing.assert_array_equal(np.asarray(gradient)[blind], 0)
    sighted = arrays | {"dlse": np.where(blind, 0, arrays["dlse"])}
    _, found = local(*qkv, sighted["do"], sighted["dlse"], side(*queries), side(*keys), options)
    expected = oracle(sighted, queries, keys, rule, scale=0.5, logits_soft_cap=cap)
    for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("is_causal", [True, slow(False)])
def test_other_segments_have_no_effect(is_causal, draw):
    """Values, log-sum-exp and gradients of a segment are bit-identical with other segments in the same tile."""
    arrays = draw(2, 40, 4, 2, 8)
    segments = np.repeat([0, 1, 0, 2], [9, 8, 14, 9])
    mine, other = segments == 0, segments == 1
    before = gradients(arrays, segment_ids=segments, is_causal=is_causal)
    changed = {name: arrays[name].copy() for name in arrays}
    changed["k"][:, other] *= -1e18
    changed["v"][:, other] += 1e18
    changed["q"][:, other] += 1
    after = gradients(changed, segment_ids=segments, is_causal=is_causal)
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[:, mine], np.asarray(y)[:, mine], err_msg=name)
        assert (np.asarray(x)[:, other] != np.asarray(y)[:, other]).any(), name


def test_hidden_tiles_are_not_read(draw):
    """NaN in a skipped tile does not spread."""
    arrays = draw(1, 64, 2, 2, 8)
    options = Options(Rule(), 0.3, None, 16, 16)
    order = side(np.arange(64)[None], np.zeros((1, 64)))
    poisoned = {name: arrays[name].copy() for name in NAMES}
    for name in ("k", "v"):
        poisoned[name][:, 32:] = np.nan
    run = jax.jit(lambda q, k, v: local_attention(q, k, v, order, order, options, LOCAL))
    for clean, dirty in zip(run(*(arrays[n] for n in NAMES)), run(*(poisoned[n] for n in NAMES)), strict=True):
        np.testing.assert_array_equal(clean[:, :32], dirty[:, :32])
        assert np.isnan(dirty[:, 32:]).all()


def test_tiles_between_prefix_and_window_are_not_read(draw):
    """NaN in a tile that the window hides does not spread; NaN in a tile of the prefix does."""
    arrays = draw(1, 64, 2, 2, 8)
    options = Options(Rule(True, (4, 0)), 0.3, None, 16, 16)
    keys = side(np.arange(64)[None], np.zeros((1, 64)))
    queries = keys._replace(prefix=jnp.full((1, 64), 16, jnp.int32))
    poisoned = {name: arrays[name].copy() for name in ("k", "v")}
    for name in ("k", "v"):
        poisoned[name][:, 16:32] = np.nan
    run = jax.jit(lambda q, k, v: local_attention(q, k, v, queries, keys, options, LOCAL))
    q, k, v = (arrays[name] for name in NAMES)
    for clean, dirty in zip(run(q, k, v), run(q, poisoned["k"], poisoned["v"]), strict=True):
        for unaffected in (slice(16), slice(48, 64)):
            np.testing.assert_array_equal(clean[:, unaffected], dirty[:, unaffected])
        assert np.isnan(dirty[:, 16:36]).all(), "the window shows the poisoned keys"
    early = [x.copy() for x in (k, v)]
    for x in early:
        x[:, :16] = np.nan
    assert np.isnan(run(q, *early)[0]).all()


def test_large_logits_do_not_overflow(draw):
    arrays = draw(1, 24, 2, 2, 8)
    arrays |= {name: arrays[name] * 3e4 for name in ("q", "k")}
    o, lse, *found = gradients(arrays)
    for name, x in zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *found), strict=True):
        assert np.isfinite(x).all(), name
    # Weights are at most 1, although the log-sum-exp has an error of hundreds here.
    assert np.abs(found[2]).max() <= np.abs(arrays["do"]).sum(1).max()


def test_gradients_of_parts_of_the_keys_add_up(draw, oracle, quick):
    """Forward parts merge by log-sum-exp; backward parts share the global log-sum-exp and delta."""
    arrays = draw(1, 36, 4, 2, 8)
    q, k, v, do, dlse = (arrays[name] for name in ("q", "k", "v", "do", "dlse"))
    rule, options = Rule(), Options(Rule(), 0.4, 3.0, 8, 8)
    whole = (np.arange(36)[None], np.zeros((1, 36), int))
    expected = oracle(arrays, whole, whole, rule, scale=0.4, logits_soft_cap=3.0)
    queries = side(*whole)
    q, k, v, do, dlse = (by_head(jnp.asarray(x), 2) for x in (q, k, v, do, dlse))
    expected = {name: np.asarray(by_head(jnp.asarray(x, jnp.float32), 2)) for name, x in expected.items()}
    kv = jnp.stack([k, v], axis=1)
    parts = [
        Inputs(q, kv[:, :, a:b], queries, side(*(x[:, a:b] for x in whole))) for a, b in ((0, 5), (5, 36))
    ]  # only the first part contains visible keys of the first five queries
    forward, backward = (quick(f, static_argnums=1) for f in (xla.forward, xla.backward))
    outputs = [[np.asarray(x) for x in forward(part, options)] for part in parts]
    lse = np.logaddexp.reduce([part_lse for _, part_lse in outputs])
    o = sum(part_o * np.exp(part_lse - lse)[..., None] for part_o, part_lse in outputs)
    np.testing.assert_allclose(o, expected["o"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, expected["lse"], rtol=1e-5, atol=1e-5)
    seen = None
    for part in parts:
        seen = forward(part, options, seen)
    np.testing.assert_allclose(seen.o, expected["o"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen.lse, expected["lse"], rtol=1e-5, atol=1e-5)
    known = Cotangents(do, jnp.asarray(lse), jnp.asarray((o * do).sum(-1) - dlse))
    found = [backward(part, options, known) for part in parts]
    np.testing.assert_allclose(sum(np.asarray(dq) for dq, _ in found), expected["dq"], rtol=1e-5, atol=1e-5)
    dq = found[0].dq
    for part in parts[1:]:
        dq = backward(part, options, known, dq).dq
    np.testing.assert_allclose(dq, expected["dq"], rtol=1e-5, atol=1e-5)
    dkv = np.concatenate([dkv for _, dkv in found], axis=2)
    for i, name in enumerate(("dk", "dv")):
        np.testing.assert_allclose(dkv[:, i], expected[name], rtol=1e-5, atol=1e-5)


BAD_SETTINGS = [
    ("is_causal", {"is_causal": "no"}),
    ("is_causal", {"is_causal": jnp.array(True)}),
    ("local_window_size", {"local_window_size": jnp.array([1, 2])}),
    ("scale", {"scale": "large"}),
    ("scale", {"scale": 1j}),
    ("scale", {"scale": jnp.array(1j)}),
    ("scale", {"scale": float("nan")}),
    ("scale", {"scale": True}),
    ("logits_soft_cap", {"logits_soft_cap": "2"}),
    ("logits_soft_cap", {"logits_soft_cap": jnp.array(2j)}),
    ("logits_soft_cap", {"logits_soft_cap": jnp.array(-2.0)}),
]


@pytest.mark.parametrize("run", [ring_attention, decode_attention])
def test_invalid_settings_are_named(run, draw):
    """Inside shard_map, JAX would hide their values or name something else."""
    q, k, v = (jnp.asarray(draw(2, 6, 4, 2, 8)[name]) for name in NAMES)
    mesh = {"mesh": Mesh(np.array(jax.devices()[:1]), ("seq",))} if run is ring_attention else {"length": 6}
    for name, setting in BAD_SETTINGS:
        if run is ring_attention or name != "is_causal":
            with pytest.raises(ValueError, match=f"^{name}: "):
                run(q, k, v, **mesh, **setting)


def test_invalid_arguments_are_named(draw):
    arrays = draw(2, 6, 4, 2, 8)
    q, k, v = (jnp.asarray(arrays[name]) for name in NAMES)
    wrong = [
        ("q", {"q": q[0]}),
        ("q", {"q": q.astype(jnp.int32)}),
        ("q", {"q": q[..., :0]}),
        ("mask", {"mask": None}),
        ("bias", {"bias": jnp.zeros(())}),
        ("k", {"k": k.astype(jnp.bfloat16)}),
        ("k", {"k": k[:1], "v": v[:1]}),
        ("k", {"k": k[..., :4], "v": v[..., :4]}),
        ("k", {"q": q[:, :, :3]}),
        ("v", {"v": v[:, :4]}),
        ("v", {"v": v[..., 0]}),
        ("positions", {"positions": jnp.zeros(6)}),
        ("positions", {"positions": jnp.zeros(5, int)}),
        ("positions", {"positions": jnp.zeros((3, 6), int)}),
        ("segment_ids", {"segment_ids": jnp.zeros((2, 6, 1), int)}),
        ("segment_ids", {"segment_ids": np.zeros(6, bool)}),
        ("segment_ids", {"segment_ids": np.array([1, 1, 1, 2**32 + 1, 2, 2])}),
        ("positions", {"positions": np.arange(6) - 2**31 - 1}),
        ("local_window_size", {"local_window_size": -1}),
        ("local_window_size", {"local_window_size": (2, -1)}),
        ("local_window_size", {"local_window_size": (1, 2, 3)}),
        ("local_window_size", {"local_window_size": 1.5}),
        ("local_window_size", {"local_window_size": (-1, 0)}),
        ("local_window_size", {"local_window_size": (-2, 0), "global_prefix": jnp.zeros(6, int)}),
        ("local_window_size", {"local_window_size": (0, -1), "global_prefix": jnp.zeros(6, int)}),
        ("local_window_size", {"local_window_size": -1, "global_prefix": jnp.zeros(6, int)}),
        ("global_prefix", {"global_prefix": jnp.zeros(6, int)}),
        ("global_prefix", {"local_window_size": 2, "global_prefix": jnp.zeros(6)}),
        ("global_prefix", {"local_window_size": 2, "global_prefix": jnp.zeros(5, int)}),
        ("global_prefix", {"local_window_size": 2, "global_prefix": jnp.zeros((3, 6), int)}),
        ("global_prefix", {"local_window_size": 2, "global_prefix": np.array([0, 0, 0, 2**31, 0, 0])}),
        ("logits_soft_cap", {"logits_soft_cap": 0.0}),
        ("logits_soft_cap", {"logits_soft_cap": float("nan")}),
        ("logits_soft_cap", {"logits_soft_cap": float("inf")}),
        ("implementation", {"implementation": "cuda"}),
        ("q", {"q": [[1.0]]}),
        ("k", {"k": None}),
        ("segment_ids", {"segment_ids": "abc"}),
        ("segment_ids", {"segment_ids": [[0], [1, 2]]}),
        ("positions", {"positions": [None] * 6}),
        ("sinks", {"sinks": "abcd"}),
        ("query_seq_lengths", {"query_seq_lengths": [[1], [1, 2]]}),
        *BAD_SETTINGS,
    ]
    for name, changes in wrong:
        with pytest.raises(ValueError, match=f"^{name}: "):
            attention(**({"q": q, "k": k, "v": v} | changes))
    with pytest.raises(ValueError, match=r"^q: expected axes \(batch, .* got q \(6, 4, 8\), k \(2, 6, 2, 8\), v "):
        attention(q[0], k, v)


def test_a_shard_needs_a_surrounding_shard_map(draw):
    q, k, v = (draw(2, 6, 4, 2, 8)[name] for name in NAMES)
    with pytest.raises(ValueError, match=r"^axis_name: 'seq' is not an axis of a surrounding jax.shard_map"):
        ring_attention_shard(q, k, v)


def test_implementation_by_name(draw):
    arrays = draw(1, 6, 2, 2, 8)
    q, k, v = (arrays[name] for name in NAMES)
    named, best = (jax.jit(partial(attention, implementation=name))(q, k, v) for name in ("xla", None))
    np.testing.assert_array_equal(named, best)
