"""The TPU kernels, interpreted on a CPU, against the definition in float64."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from ringrl.attention.contract import Cotangents, Inputs, Partial, by_head
from ringrl.attention.kernels import mosaic_tpu
from ringrl.attention.kernels.mosaic_tpu_tiles import TilePair, pack_pairs, tiling_of, unsupported
from ringrl.attention.mask import Options, Rule, Side

NAMES = ("o", "lse", "dq", "dk", "dv")
GIVEN = ("q", "k", "v", "do", "dlse")
SCALE = 0.3
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
Where = tuple[np.ndarray, ...]  # positions, segment ids and (of some queries) global prefixes, (B, S)


def in_kernel_shapes(arrays: dict, kv_heads: int) -> dict:
    """Arrays or results by name."""
    return {name: np.asarray(by_head(jnp.asarray(x), kv_heads)) for name, x in arrays.items()}


def side(where: Where) -> Side:
    return Side(*(jnp.asarray(x, jnp.int32) for x in where))


def values_and_gradients(arrays, queries, keys, options, start=None, interpret=True) -> dict:
    """Return all five values of both kernels, combined as in attend.py."""
    q, k, v, do, dlse = (jnp.asarray(arrays[name]) for name in GIVEN)
    inputs = Inputs(q, jnp.stack([k, v], axis=1), queries, keys)
    o, lse = mosaic_tpu.forward(inputs, options, start, interpret=interpret)
    delta = (o * do.astype(jnp.float32)).sum(-1) - jnp.where(jnp.isneginf(lse), 0.0, dlse)
    dq, dkv = mosaic_tpu.backward(inputs, options, Cotangents(do, lse, delta), interpret=interpret)
    return dict(zip(NAMES, (o, lse, dq, dkv[:, 0], dkv[:, 1]), strict=True))


run = jax.jit(values_and_gradients, static_argnames=("options", "interpret"), compiler_options=QUICK)


def errors(got: dict, expected: dict) -> dict[str, float]:
    """Return the largest error of each value relative to its largest entry; infinities must match."""
    found = {}
    for name, x in expected.items():
        y, finite = np.asarray(got[name], np.float64), np.isfinite(x)
        np.testing.assert_array_equal(y[~finite], x[~finite], err_msg=name)
        found[name] = float(np.abs(y[finite] - x[finite]).max() / np.abs(x[finite]).max())
    return found


def setting(draw: Callable, heads: tuple[int, int], queries: int, keys: int, head_dim: int = 16) -> dict:
    """Return random arrays (B, S, H, D) of 2 contexts with different numbers of queries and keys."""
    arrays = draw(2, max(queries, keys), *heads, head_dim)
    return {name: x[:, : keys if name in ("k", "v") else queries] for name, x in arrays.items()}


def order(length: int, start: int = 0) -> np.ndarray:
    return np.tile(np.arange(start, start + length), (2, 1))


QUERIES, KEYS = 300, 200
ZERO = np.zeros((2, 300), int)
RANDOM = np.random.default_rng(0).permutation(300)
PACKED = np.stack([np.repeat([0, 1, 2], [90, 130, 80]), np.repeat([5, 2, 5], [150, 100, 50])])
STARTS = np.stack([np.repeat([0, 90, 220], [90, 130, 80]), np.repeat([0, 150, 250], [150, 100, 50])])
MASKS = {
    "full": (Rule(False), (order(300), ZERO), (order(200), ZERO[:, :200])),
    "causal": (Rule(), (order(300), ZERO), (order(200, 40), ZERO[:, :200])),
    "causal_behind": (Rule(), (order(300, 150), ZERO), (order(200), ZERO[:, :200])),
    "window": (Rule(True, (90, 0)), (order(300), ZERO), (order(200), ZERO[:, :200])),
    "window_both_ways": (Rule(False, (60, 33)), (order(300), ZERO), (order(200, 150), ZERO[:, :200])),
    "segments": (Rule(), (order(300), PACKED), (order(200), PACKED[:, :200])),
    "shuffled": (Rule(False, (120, 40)), (np.stack([RANDOM] * 2), PACKED), (order(200), PACKED[:, 50:250])),
    "prefix": (Rule(True, (20, 0)), (order(300), ZERO, STARTS), (order(200), ZERO[:, :200])),
    "prefix_only": (Rule(False, (-1, 0)), (np.stack([RANDOM] * 2), PACKED, STARTS), (order(200), PACKED[:, :200])),
}
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}
CASES = [
    (mask, tuple(HEADS)[(i + j) % 3], (None, 1.5)[(i // 2 + j) % 2], ("float32", "bfloat16")[(i + j) % 2])
    for i, mask in enumerate(MASKS)
    for j in range(2)
    if j == 0 or mask in ("causal", "segments", "shuffled", "prefix")
]
QUICK_CASES = [("causal", "MQA"), ("shuffled", "MHA"), ("prefix", "GQA")]


# A window on both sides: the next test.
@pytest.mark.parametrize(
    ("mask", "heads", "cap", "dtype"),
    [case if case[:2] in QUICK_CASES else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_values_and_gradients_equal_the_definition(mask, heads, cap, dtype, draw, oracle):
    """Three tiles of queries (the last one short), two of keys, and a cotangent of the log-sum-exp."""
    rule, queries, keys = MASKS[mask]
    kv_heads = HEADS[heads][1]
    arrays = setting(draw, HEADS[heads], QUERIES, KEYS)
    arrays = {n: x if n == "dlse" else np.asarray(jnp.asarray(x, dtype)) for n, x in arrays.items()}
    expected = oracle(arrays, queries, keys, rule, scale=SCALE, logits_soft_cap=cap)
    expected = in_kernel_shapes(expected, kv_heads)
    got = run(in_kernel_shapes(arrays, kv_heads), side(queries), side(keys), Options(rule, SCALE, cap, 128, 128))
    found = errors(got, expected)
    assert max(found.values()) <= (2e-5 if dtype == "float32" else 1e-2), found
    blind = np.isneginf(expected["lse"])
    assert (np.asarray(got["o"])[blind] == 0).all()
    assert (np.asarray(got["dq"])[blind] == 0).all()


def test_many_heads_share_a_key_head(draw, oracle):
    """More heads than fit into one tile: gradients of keys are summed over tiles of heads."""
    rule, queries, keys = MASKS["window_both_ways"]
    options = Options(rule, SCALE, None, 256, 128)
    arrays = setting(draw, (16, 1), QUERIES, KEYS, 8)
    given = in_kernel_shapes(arrays, 1)
    kv = np.stack([given["k"], given["v"]], axis=1)
    tiling = tiling_of(Inputs(jnp.asarray(given["q"]), jnp.asarray(kv), side(queries), side(keys)), options)
    assert tiling.shares > 1
    assert tiling.groups > 1
    expected = in_kernel_shapes(oracle(arrays, queries, keys, rule, scale=SCALE), 1)
    found = errors(run(given, side(queries), side(keys), options), expected)
    assert max(found.values()) <= 2e-5, found


def test_forward_continues_from_start(draw, oracle):
    """Two halves of the keys in turn equal all keys; some queries see one half or neither."""
    rule, queries, keys = MASKS["segments"]
    queries = queries[0], np.where(queries[0] > 290, 77, queries[1])
    options = Options(rule, SCALE, None, 128, 128)
    arrays = setting(draw, (4, 2), QUERIES, KEYS)
    expected = in_kernel_shapes(oracle(arrays, queries, keys, rule, scale=SCALE), 2)
    arrays = in_kernel_shapes(arrays, 2)
    total: Partial | None = None
    for part in (slice(0, 70), slice(70, 200)):
        half = arrays | {name: arrays[name][:, part] for name in "kv"}
        got = run(half, side(queries), side(tuple(x[:, part] for x in keys)), options, total)
        total = Partial(got["o"], got["lse"])
    found = errors(total._asdict(), {name: expected[name] for name in ("o", "lse")})
    assert max(found.values()) <= 2e-5, found


def test_hidden_tiles_are_not_read(draw):
    """NaN in hidden tiles does not spread: as keys in forward and dq, as queries in dk and dv."""
    options = Options(Rule(), SCALE, None, 128, 128)
    where = side((order(384), np.zeros((2, 384), int)))
    arrays = in_kernel_shapes(setting(draw, (4, 2), 384, 384), 2)
    late = {name: x.copy() for name, x in arrays.items()}
    for name in ("k", "v"):
        late[name][:, 256:] = np.nan
    early = {name: x.copy() for name, x in arrays.items()}
    for name in ("q", "do"):
        early[name].reshape(4, 2, 384, -1)[:, :, :128] = np.nan
    clean, late_keys, early_queries = (run(x, where, where, options) for x in (arrays, late, early))
    for name in ("o", "lse", "dq"):
        late, expected = (np.asarray(x[name]).reshape(4, 2, 384, -1) for x in (late_keys, clean))
        np.testing.assert_array_equal(late[:, :, :256], expected[:, :, :256], err_msg=name)
        assert np.isnan(late[:, :, 256:]).all(), name
    for name in ("dk", "dv"):
        np.testing.assert_array_equal(early_queries[name][:, 128:], clean[name][:, 128:], err_msg=name)


def test_list_of_pairs():
    """Exactly the visible pairs in order of outer tiles, and one empty entry for a tile without visible tiles."""
    random = np.random.default_rng(0)
    some = random.random((3, 9, 7)) < np.array([0.8, 0.3, 0.0])[:, None, None]
    every = some & (random.random(some.shape) < 0.5)
    codes, steps = pack_pairs(jnp.asarray(some), jnp.asarray(every))
    for context, codes_of_context in enumerate(np.asarray(codes).reshape(3, -1)):
        entries = [TilePair(*(int(x) for x in TilePair.unpack(code))) for code in codes_of_context]
        expected = []
        for outer in range(9):
            inner = np.flatnonzero(some[context, outer])
            for i in inner if len(inner) else [0]:
                is_some, is_full = some[context, outer, i], every[context, outer, i]
                at_the_ends = (i == inner[0], i == inner[-1]) if len(inner) else (True, True)
                expected.append(TilePair(outer, i, *at_the_ends, is_some and not is_full, is_full))
        assert entries[: len(expected)] == expected
        assert len(expected) <= steps
        idle = TilePair(*expected[-1][:2], 0, 0, 0, 0)
        assert entries[len(expected) :] == [idle] * (63 - len(expected))
    assert steps == max(63 - (~some[context]).sum() + (~some[context].any(1)).sum() for context in range(3))


def test_no_races(draw):
    """JAX's simulation of TPU memories and copies finds no race."""
    rule, queries, keys = MASKS["window_both_ways"]
    queries, keys = (tuple(x[:1, :129] for x in where) for where in (queries, keys))
    arrays = {name: x[:2] for name, x in in_kernel_shapes(setting(draw, (4, 2), 129, 129, 8), 2).items()}
    options = Options(Rule(rule.is_causal, (200, 100)), SCALE, None, 128, 128)
    simulated = pltpu.InterpretParams(detect_races=True)
    got = run(arrays, side(queries), side(keys), options, interpret=simulated)
    jax.block_until_ready(got)
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    expected = run(arrays, side(queries), side(keys), options)
    found = errors(got, {name: np.asarray(x) for name, x in expected.items()})
    assert max(found.values()) <= 1e-6, found


@pytest.mark.slow
@pytest.mark.parametrize("mapped", ["shard_map", "vmap"])
def test_transformed(mapped, draw):
    """vmap, jit and shard_map give the same values up to rounding."""
    rule, queries, keys = MASKS["causal"]
    arrays = in_kernel_shapes(setting(draw, (2, 1), QUERIES, KEYS, 8), 1)
    options = Options(rule, SCALE, None, 128, 128)
    given = arrays, side(queries), side(keys)
    expected = run(*given, options)
    function = partial(values_and_gradients, options=options)
    if mapped == "vmap":
        one = jax.vmap(function)
        got = jax.jit(one, compiler_options=QUICK)(*jax.tree.map(lambda x: x[:, None], given))
        got = {name: x[:, 0] for name, x in got.items()}
    else:  # what varies is checked where it is compiled (test_mosaic_tpu_compile.py): interpreters of JAX do not pass
        mesh, spec = Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data")
        shard = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        got = jax.jit(shard, compiler_options=QUICK)(*given)
    found = errors(got, {name: np.asarray(x) for name, x in expected.items()})
    assert max(found.values()) <= 1e-6, found


def test_unsupported_arguments_are_named():
    options = Options(Rule(), SCALE)
    assert unsupported(jnp.bfloat16, 256, options) is None
    for dtype, head_dim, message in (
        (jnp.float16, 128, "q: float16"),
        (jnp.float32, 512, "q: head_dim 512"),
        (jnp.float32, 20, "q: head_dim 20"),
    ):
        assert message in unsupported(dtype, head_dim, options)


def test_too_many_tiles_are_named():
    where = Side(*[jax.ShapeDtypeStruct((1, 2**20), jnp.int32)] * 2)
    inputs = Inputs(*(jax.ShapeDtypeStruct((1, *n, 2**20, 128), jnp.float32) for n in ((), (2,))), where, where)
    with pytest.raises(ValueError, match="exceed the"):
        jax.eval_shape(lambda inputs: mosaic_tpu.forward(inputs, Options(Rule(), SCALE, None, 128, 128)), inputs)
