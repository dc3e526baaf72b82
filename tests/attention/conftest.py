from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringrl.attention.mask import Rule, Side
from tests.attention.reference import reference_attention

Arrays = dict[str, np.ndarray]
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast


@partial(jax.jit, static_argnums=4, compiler_options=QUICK)
def _definition(qkv, cotangents, queries, keys, options):
    rule, scale, logits_soft_cap = options

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return reference_attention(q, k, v, queries, keys, rule=rule, scale=scale, logits_soft_cap=logits_soft_cap)

    values, backward = jax.vjp(attend, *qkv)
    return *values, *backward(cotangents)


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

    JAX differentiates through the S x S logits; only the mask is shared with the tested code.
    """
    with jax.enable_x64(True):
        q, k, v, do, dlse = (jnp.asarray(arrays[name], jnp.float64) for name in ("q", "k", "v", "do", "dlse"))
        sides = [Side(*(jnp.asarray(x, jnp.int32) for x in side)) for side in (queries, keys)]
        options = (rule, q.shape[-1] ** -0.5 if scale is None else scale, logits_soft_cap)
        values = [np.asarray(x) for x in _definition((q, k, v), (do, dlse), *sides, options)]
    assert all(x.dtype == np.float64 for x in values)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), values, strict=True))


@pytest.fixture(scope="session")
def draw() -> Callable[..., Arrays]:
    return random_arrays


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Arrays]:
    return definition
