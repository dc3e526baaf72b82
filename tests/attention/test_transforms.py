"""Attention under jit, grad, vmap and remat, and its memory."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ringrl.attention import attention

SAVED = jax.checkpoint_policies.save_only_these_names("ring_attention")


def loss(q, k, v, segment_ids=None):
    o, lse = attention(q, k, v, segment_ids=segment_ids, return_residual=True)
    return (jnp.sin(o) * jnp.arange(o.shape[1])[:, None, None]).sum() + jnp.cos(lse).sum()


@pytest.fixture(scope="module")
def qkv(draw) -> tuple[np.ndarray, ...]:
    arrays = draw(3, 17, 4, 2, 8)
    return arrays["q"], arrays["k"], arrays["v"]


@pytest.fixture(scope="module")
def expected(qkv, quick) -> tuple[jax.Array, ...]:
    """Return loss and gradients."""
    value, gradients = quick(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*qkv)
    return value, *gradients


def assert_same(got: tuple, expected: tuple) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_jit(qkv, expected):
    """Attention runs without jit."""
    assert_same((loss(*qkv),), expected[:1])


def test_vmap_of_grad(qkv, expected, quick):
    """One sequence per call, mapped over a batch, also with different segments."""
    single = jax.value_and_grad(lambda *x: loss(*(y[None] for y in x)), argnums=(0, 1, 2))
    values, gradients = quick(jax.vmap(single))(*qkv)
    assert_same((values.sum(), *gradients), expected)
    segments = np.stack([np.arange(17) // n for n in (3, 6, 20)])
    mapped = quick(jax.vmap(lambda q, k, v, s: attention(q[None], k[None], v[None], segment_ids=s)[0]))(*qkv, segments)
    assert_same((mapped,), (quick(attention)(*qkv, segment_ids=segments),))


@pytest.mark.slow
def test_grad_of_vmap_over_queries_only(qkv, quick):
    q, k, v = qkv
    many = np.stack([q, q[:, ::-1], -q])
    mapped = quick(jax.grad(lambda k: jax.vmap(lambda q: loss(q, k, v))(many).sum()))(k)
    single = quick(jax.grad(loss, argnums=1))
    one_by_one = sum(single(x, k, v) for x in many)
    assert_same((mapped,), (one_by_one,))


@pytest.mark.parametrize("policy", [None, SAVED], ids=["save_nothing", "save_attention"])
def test_remat(policy, qkv, expected, quick):
    value, gradients = quick(jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2)))(*qkv)
    assert_same((value, *gradients), expected)


def matrix_products(function, *arguments) -> int:
    """Count the matrix products of a function's program, including loops and branches."""

    def count(jaxpr) -> int:
        inside = jax.extend.core.jaxprs_in_params
        inner = (getattr(part, "jaxpr", part) for e in jaxpr.eqns for part in inside(e.params))
        return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) + sum(map(count, inner))

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_remat_that_saves_the_name_computes_attention_once(qkv):
    plain, saved, nothing = (
        matrix_products(jax.grad(f), *qkv) for f in (loss, jax.checkpoint(loss, policy=SAVED), jax.checkpoint(loss))
    )
    assert saved == plain
    assert nothing > plain


@pytest.mark.parametrize(
    ("integers", "options"),
    [
        pytest.param("segment_ids", {}, marks=pytest.mark.slow),
        ("segment_ids", {"is_causal": False, "local_window_size": 300, "logits_soft_cap": 5.0}),
        ("global_prefix", {"local_window_size": 20}),
    ],
)
def test_scratch_memory_is_linear_in_the_length(integers, options, quick):
    def scratch(tokens: int) -> int:
        q = jax.ShapeDtypeStruct((1, tokens, 4, 16), jnp.float32)
        k = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

        def run(q, k, v, ids):
            attend = partial(attention, **{integers: ids}, **options)
            return jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))(q, k, v)

        return quick(run).lower(q, k, k, ids).compile().memory_analysis().temp_size_in_bytes

    short, long = scratch(8192), scratch(16384)
    assert long < 2.1 * short
    assert long < 4 * 16384 * 16384 / 10, "a tenth of one head's logits"
