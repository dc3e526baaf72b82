"""The TPU kernels, interpreted on a CPU: every value against the definition in float64, and what must not be read."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from ringrl.attention.kernels import mosaic_tpu
from ringrl.attention.mask import Rule, Side
from ringrl.attention.merge import Partial
from ringrl.attention.options import Options

NAMES = ("o", "lse", "dq", "dk", "dv")
SCALE = 0.3
Where = tuple[np.ndarray, np.ndarray]  # positions and segment ids, (B, S)
forward = partial(mosaic_tpu.forward, interpret=True)
backward = partial(mosaic_tpu.backward, interpret=True)


def by_head(x: np.ndarray, kv_heads: int) -> np.ndarray:
    """(B, S, H[, D]) -> (B, Hkv, G, S[, D]), the shape of kernels."""
    return np.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:]), 1, 3)


def side(where: Where) -> Side:
    return Side(*(jnp.asarray(x, jnp.int32) for x in where))


def in_kernel_shapes(arrays: dict, kv_heads: int) -> dict:
    """Arrays or results by name."""
    of_keys = ("k", "v", "dk", "dv")
    return {n: np.swapaxes(x, 1, 2) if n in of_keys else by_head(x, kv_heads) for n, x in arrays.items()}


@partial(jax.jit, static_argnames=("options", "interpret"))
def run(arrays: dict, queries: Side, keys: Side, options: Options, start: Partial | None = None, interpret=True):
    """All five values of both kernels, joined as attend.py joins them."""
    q, k, v, do, dlse = (arrays[name] for name in ("q", "k", "v", "do", "dlse"))
    o, lse = mosaic_tpu.forward(q, k, v, queries, keys, options, start, interpret=interpret)
    delta = (o * do.astype(jnp.float32)).sum(-1) - jnp.where(jnp.isneginf(lse), 0.0, dlse)
    gradients = mosaic_tpu.backward(q, k, v, queries, keys, options, lse, delta, do, interpret=interpret)
    return dict(zip(NAMES, (o, lse, *gradients), strict=True))


def errors(got: dict, expected: dict) -> dict[str, float]:
    """The largest error of each value in parts of its largest entry; infinities must be where they are expected."""
    found = {}
    for name, x in expected.items():
        y, finite = np.asarray(got[name], np.float64), np.isfinite(x)
        np.testing.assert_array_equal(np.isfinite(y), finite, err_msg=name)
        np.testing.assert_array_equal(y[~finite], x[~finite], err_msg=name)
        found[name] = float(np.abs(y - x)[finite].max() / np.abs(x[finite]).max())
    return found


def setting(draw: Callable, heads: tuple[int, int], queries: int, keys: int, head_dim: int = 32) -> dict:
    """Random arrays of 2 contexts with keys of another number than queries, (B, S, H, D)."""
    arrays = draw(2, max(queries, keys), *heads, head_dim)
    return {name: x[:, : keys if name in ("k", "v") else queries] for name, x in arrays.items()}


def order(length: int, start: int = 0) -> np.ndarray:
    return np.tile(np.arange(start, start + length), (2, 1))


QUERIES, KEYS = 300, 200
ZERO = np.zeros((2, 300), int)
RANDOM = np.random.default_rng(0).permutation(300)
PACKED = np.stack([np.repeat([0, 1, 2], [90, 130, 80]), np.repeat([5, 2, 5], [150, 100, 50])])
MASKS = {
    "full": (Rule(False), (order(300), ZERO), (order(200), ZERO[:, :200])),
    "causal": (Rule(), (order(300), ZERO), (order(200, 40), ZERO[:, :200])),
    "causal_behind": (Rule(), (order(300, 150), ZERO), (order(200), ZERO[:, :200])),
    "window": (Rule(True, (90, 0)), (order(300), ZERO), (order(200), ZERO[:, :200])),
    "window_both_ways": (Rule(False, (60, 33)), (order(300), ZERO), (order(200, 150), ZERO[:, :200])),
    "segments": (Rule(), (order(300), PACKED), (order(200), PACKED[:, :200])),
    "shuffled": (Rule(False, (120, 40)), (np.stack([RANDOM] * 2), PACKED), (order(200), PACKED[:, 50:250])),
}
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}
CASES = [
    (mask, tuple(HEADS)[(i + j) % 3], (None, 1.5)[j], ("float32", "bfloat16")[(i + j) % 2])
    for i, mask in enumerate(MASKS)
    for j in range(2)
]


@pytest.mark.parametrize(("mask", "heads", "cap", "dtype"), CASES)
def test_values_and_gradients_equal_the_definition(mask, heads, cap, dtype, draw, oracle):
    rule, queries, keys = MASKS[mask]
    arrays = setting(draw, HEADS[heads], QUERIES, KEYS)
    given = {n: x if n == "dlse" else np.asarray(jnp.asarray(x, dtype), np.float32) for n, x in arrays.items()}
    expected = in_kernel_shapes(oracle(given, queries, keys, rule, scale=SCALE, logits_soft_cap=cap), HEADS[heads][1])
    arrays = in_kernel_shapes(arrays, HEADS[heads][1])
    arrays = {n: x if n == "dlse" else jnp.asarray(x, dtype) for n, x in arrays.items()}
    options = Options(rule, SCALE, cap, 128, 128)
    found = errors(run(arrays, side(queries), side(keys), options), expected)
    print(mask, heads, cap, dtype, found)
    assert max(found.values()) <= (2e-5 if dtype == "float32" else 1e-2), found
