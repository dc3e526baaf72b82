from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringrl.attention.mask import Rule, Side, visible

Arrays = dict[str, np.ndarray]
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast


@pytest.fixture(scope="session")
def quick() -> Callable[..., Callable]:
    """Return a jax.jit that compiles twice as fast."""
    return partial(jax.jit, compiler_options=QUICK)


def random_arrays(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0) -> Arrays:
    """Return random q, k, v and cotangents do, dlse; float32."""
    random = np.random.default_rng(seed)
    shapes = dict.fromkeys(("q", "do"), (batch, tokens, heads, head_dim))
    shapes |= dict.fromkeys(("k", "v"), (batch, tokens, kv_heads, head_dim)) | {"dlse": (batch, tokens, heads)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def definition(
    arrays: Arrays,
    queries: tuple[np.ndarray, np.ndarray],
    keys: tuple[np.ndarray, np.ndarray],
    rule: Rule,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> Arrays:
    """Return o, lse, dq, dk, dv of the definition, float64; `queries` and `keys` are (positions, segment_ids) (B, S).

    Only the mask is shared with the tested code. test_mask.py compares the gradients with those of JAX.
    """
    q, k, v, do, dlse = (np.asarray(arrays[name], np.float64) for name in ("q", "k", "v", "do", "dlse"))
    groups, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    of_heads = [np.repeat(x, groups, axis=2) for x in (k, v)]
    products = np.einsum("bqhd,bkhd->bhqk", q, of_heads[0]) * scale
    s, slope = products, scale
    if logits_soft_cap is not None:
        t = np.tanh(products / logits_soft_cap)
        s, slope = logits_soft_cap * t, scale * (1 - t**2)
    sides = (Side(*(jnp.asarray(x, jnp.int32) for x in side)) for side in (queries, keys))
    s = np.where(np.asarray(visible(rule, *sides))[:, None], s, -np.inf)
    maximum = np.nan_to_num(s.max(-1, keepdims=True), neginf=0)
    weights = np.exp(s - maximum)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.swapaxes((maximum + np.log(total))[..., 0], 1, 2)  # -inf for queries that see nothing
    p = weights / np.where(total == 0, 1, total)
    dp = np.einsum("bqhd,bkhd->bhqk", do, of_heads[1])
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + np.swapaxes(dlse, 1, 2)[..., None]) * slope
    dk, dv = np.einsum("bhqk,bqhd->bkhd", ds, q), np.einsum("bhqk,bqhd->bkhd", p, do)
    dk, dv = (x.reshape(*k.shape[:3], groups, -1).sum(3) for x in (dk, dv))
    o, dq = (np.einsum("bhqk,bkhd->bqhd", x, y) for x, y in ((p, of_heads[1]), (ds, of_heads[0])))
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@pytest.fixture(scope="session")
def draw() -> Callable[..., Arrays]:
    return random_arrays


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Arrays]:
    return definition
