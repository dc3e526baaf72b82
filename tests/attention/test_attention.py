"""Tiled attention against the definition in float64: values, log-sum-exp and each gradient."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringrl.attention
from ringrl.attention import attention
from ringrl.attention.attend import LOCAL
from ringrl.attention.attend import attend as local_attention
from ringrl.attention.mask import Options, Rule, Side, classify

pytestmark = pytest.mark.usefixtures("optimised")

slow = partial(pytest.param, marks=pytest.mark.slow)
BATCH, TOKENS, HEAD_DIM = 2, 53, 8
BLOCK_Q, BLOCK_K = 8, 16  # neither divides the 53 tokens, and they differ
NAMES = ("o", "lse", "dq", "dk", "dv")
COTANGENTS = {"output": (1, 0), "log_sum_exp": (0, 1), "both": (1, 1)}
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}


class Mask(NamedTuple):
    rule: Rule
    positions: np.ndarray
    segment_ids: np.ndarray
    global_prefix: np.ndarray | None = None


def _masks() -> dict[str, Mask]:
    in_order = np.tile(np.arange(TOKENS), (BATCH, 1))
    one = np.zeros_like(in_order)
    packed = np.stack([np.repeat([0, 1, 2, 3], [32, 1, 14, 6]), np.repeat([5, 2, 5], [33, 10, 10])])
    restarting = np.stack([np.concatenate([np.arange(n) for n in (32, 1, 14, 6)]), np.arange(TOKENS)])
    shuffled = np.stack([np.random.default_rng(row).permutation(TOKENS) for row in range(BATCH)])
    zigzag = np.tile(np.concatenate([np.arange(13), np.arange(39, 53), np.arange(13, 39)]), (BATCH, 1))
    starts = np.stack([np.repeat([0, 32, 33, 47], [32, 1, 14, 6]), np.repeat([0, 33, 43], [33, 10, 10])])
    arbitrary = np.random.default_rng(2).integers(-5, TOKENS, (BATCH, TOKENS))
    return {
        "causal": Mask(Rule(), in_order, one),
        "full": Mask(Rule(is_causal=False), in_order, one),
        "window": Mask(Rule(is_causal=False, window=(30, 6)), in_order, one),
        "causal_window": Mask(Rule(window=(25, 0)), in_order, one),
        "packed": Mask(Rule(), in_order, packed),
        "packed_full": Mask(Rule(is_causal=False), in_order, packed),
        "shuffled_positions": Mask(Rule(), shuffled, one),
        "zigzag_positions": Mask(Rule(), zigzag, one),
        "repeated_negative_positions": Mask(Rule(), in_order // 3 - 20, one),
        "everything": Mask(Rule(window=(25, 0)), restarting, packed),
        "window_and_prefix": Mask(Rule(window=(4, 0)), in_order, one, starts),
        "everything_and_prefix": Mask(Rule(False, (4, 1)), shuffled, packed, arbitrary),
        "prefix_without_window": Mask(Rule(window=(-1, 0)), in_order, packed, starts),
    }


MASKS = _masks()
EXTRA = (
    "causal_window",
    "everything",
    "everything_and_prefix",
    "prefix_without_window",
)  # tried with grouped queries only


@partial(jax.jit, static_argnums=7, compiler_options={"xla_backend_optimization_level": 0})  # compiles twice as fast
def attend(q, k, v, do, dlse, queries, keys, options):
    """Return the values of NAMES."""
    queries, keys = Side(*queries), Side(*keys)
    values, backward = jax.vjp(lambda *qkv: local_attention(*qkv, queries, keys, options, LOCAL), q, k, v)
    return *values, *backward((do, dlse))


def sides_of(mask: str) -> tuple[Rule, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Return the rule, and the integers of queries and keys."""
    rule, positions, segment_ids, prefix = MASKS[mask]
    keys = positions, segment_ids
    return rule, keys if prefix is None else (*keys, prefix), keys


def assert_close(got: jax.Array, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Compare within `tolerance` of the largest entry; -inf and all-zero arrays must match exactly."""
    got = np.asarray(got, np.float64)
    assert got.shape == expected.shape, what
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected), err_msg=what)
    seen = ~np.isneginf(expected)
    error = np.abs(np.subtract(got, expected, where=seen, out=np.zeros_like(got))).max()
    assert error <= tolerance * np.abs(expected[seen]).max(), f"{what}: error {error}"


# Every mask with and without a cap, and with two of the numbers of heads: they act apart.
CASES = [
    (mask, heads, (None, 1.5)[(i + j) % 2])
    for i, mask in enumerate(MASKS)
    for j, heads in enumerate(("GQA", "GQA") if mask in EXTRA else HEADS)
    if mask in EXTRA or j in ((0, 1), (1, 2), (0, 1))[i % 3]
]


@pytest.mark.parametrize(
    ("mask", "heads", "cap"), [slow(*case) if i % 2 and case[1] != "MQA" else case for i, case in enumerate(CASES)]
)
def test_values_and_gradients_equal_the_definition(mask, heads, cap, draw, oracle):
    rule, queries, keys = sides_of(mask)
    arrays = draw(BATCH, TOKENS, *HEADS[heads], HEAD_DIM, seed=len(mask))
    options = Options(rule, 0.4, cap, BLOCK_Q, BLOCK_K)
    for cotangent, (of_output, of_lse) in COTANGENTS.items():
        now = arrays | {"do": arrays["do"] * of_output, "dlse": arrays["dlse"] * of_lse}
        got = attend(*(now[name] for name in ("q", "k", "v", "do", "dlse")), queries, keys, options)
        expected = oracle(now, queries, keys, rule, scale=0.4, logits_soft_cap=cap)
        for name, value in zip(NAMES, got, strict=True):
            assert value.dtype == jnp.float32
            assert_close(value, expected[name], 1e-5, f"{name} with the cotangent of {cotangent}")


def test_masks_cover_all_kinds_of_tiles():
    met = {}
    for name in MASKS:
        rule, *sides = sides_of(name)
        queries, keys = (
            [Side(*(jnp.asarray(x[:, i : i + block]) for x in side)) for i in range(0, TOKENS, block)]
            for side, block in zip(sides, (BLOCK_Q, BLOCK_K), strict=True)
        )
        kinds = [classify(rule, q, k) for q, k in itertools.product(queries, keys)]
        met[name] = {"skip" if not kind.any_visible else "full" if kind.all_visible else "partial" for kind in kinds}
    for name in (
        "causal", "window", "causal_window", "packed", "zigzag_positions", "repeated_negative_positions",
        "window_and_prefix",
    ):  # fmt: skip
        assert met[name] == {"skip", "full", "partial"}, name
    assert met["full"] == {"full"}
    assert "partial" in met["shuffled_positions"]
    assert met["everything"] >= {"skip", "partial"}


@pytest.mark.parametrize("tokens", [1, slow(7), slow(8), 9, 1030])
def test_lengths_around_the_tile_size(tokens, draw, oracle, quick):
    arrays = draw(1, tokens, 2, 1, 4)
    q, k, v, do, dlse = (arrays[name] for name in ("q", "k", "v", "do", "dlse"))

    @quick
    def run(q, k, v, do, dlse):
        values, backward = jax.vjp(lambda *qkv: attention(*qkv, return_residual=True), q, k, v)
        return *values, *backward((do, dlse))

    side = np.arange(tokens)[None], np.zeros((1, tokens), int)
    expected = oracle(arrays, side, side, Rule())
    for name, value in zip(NAMES, run(q, k, v, do, dlse), strict=True):
        assert_close(value, expected[name], 1e-5, name)


STATIC = ("is_causal", "local_window_size", "logits_soft_cap", "scale", "return_residual")


def test_defaults(draw, oracle, quick):
    """Causal, positions 0 ... S-1, one segment, 1/sqrt(D), no window, no cap; an int is a window on both sides."""
    arrays = draw(2, 21, 2, 2, 16)
    q, k, v = (arrays[name] for name in "qkv")
    order, one = np.tile(np.arange(21), (2, 1)), np.zeros((2, 21), int)
    side = order, one
    attention = quick(ringrl.attention.attention, static_argnames=STATIC)
    assert_close(attention(q, k, v), oracle(arrays, side, side, Rule())["o"], 1e-5, "causal")
    window = attention(q, k, v, is_causal=False, local_window_size=3)
    assert_close(window, oracle(arrays, side, side, Rule(False, (3, 3)))["o"], 1e-5, "window")
    two_sided = attention(q, k, v, is_causal=False, local_window_size=(5, 2), logits_soft_cap=2.0, scale=0.7)
    expected = oracle(arrays, side, side, Rule(False, (5, 2)), logits_soft_cap=2.0, scale=0.7)
    assert_close(two_sided, expected["o"], 1e-5, "options")
    starts = np.repeat([0, 10], [10, 11])
    prefixed = attention(q, k, v, local_window_size=2, global_prefix=starts)
    expected = oracle(arrays, (*side, np.tile(starts, (2, 1))), side, Rule(True, (2, 2)))
    assert_close(prefixed, expected["o"], 1e-5, "global prefix")
    segments = np.repeat([0, 3], [10, 11])
    packed = attention(q, k, v, segment_ids=segments, positions=order[0][::-1])
    side = order[:, ::-1], np.tile(segments, (2, 1))
    expected = oracle(arrays, side, side, Rule())
    assert_close(packed, expected["o"], 1e-5, "one row of positions and segments for the batch")


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16")])
def test_half_precision(dtype, draw, oracle):
    rule, *side, _ = MASKS["packed"]
    arrays = {k: np.asarray(jnp.asarray(x, dtype), np.float32) for k, x in draw(BATCH, TOKENS, 4, 2, HEAD_DIM).items()}
    expected = oracle(arrays, side, side, rule)
    given = [jnp.asarray(arrays[name], dtype) for name in ("q", "k", "v", "do")]
    got = attend(*given, arrays["dlse"], side, side, Options(rule, HEAD_DIM**-0.5, None, BLOCK_Q, BLOCK_K))
    for name, value in zip(NAMES, got, strict=True):
        assert value.dtype == (jnp.float32 if name == "lse" else jnp.dtype(dtype))
        tolerance = 1e-5 if name == "lse" else 3 * float(jnp.finfo(dtype).eps)
        assert_close(value, expected[name], tolerance, name)


def test_64_bit_mode(draw, oracle):
    arrays = draw(1, 19, 2, 1, 8)
    side = np.arange(19)[None], np.zeros((1, 19), int)
    expected = oracle(arrays, side, side, Rule())
    with jax.enable_x64(True):
        q, k, v, do, dlse = (jnp.asarray(arrays[name]) for name in ("q", "k", "v", "do", "dlse"))
        positions = jnp.arange(19)
        assert positions.dtype == jnp.int64

        @jax.jit
        def run(q, k, v, do, dlse):
            values, backward = jax.vjp(lambda *qkv: attention(*qkv, positions=positions, return_residual=True), q, k, v)
            return *values, *backward((do, dlse))

        for name, value in zip(NAMES, run(q, k, v, do, dlse), strict=True):
            assert value.dtype == jnp.float32
            assert_close(value, expected[name], 1e-5, name)
