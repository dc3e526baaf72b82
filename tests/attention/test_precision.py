"""Float32 inputs are multiplied in float32 on every platform, unlike JAX's default."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from ringrl.attention import attention, decode_attention
from ringrl.attention.mask import Rule, Side
from tests.attention.reference import reference_attention


def definition(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    side = Side(*(jnp.zeros(q.shape[:2], jnp.int32) for _ in range(2)))
    return reference_attention(q, k, v, side, side, rule=Rule(is_causal=True), scale=1.0)[0]


FUNCTIONS = {
    "attention": partial(attention, is_causal=True, implementation="xla"),
    "definition": definition,
    "decode": partial(decode_attention, length=16),
}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("dtype", "expected"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_precision_of_products(name, dtype, expected, platform):
    q, k, v = (jnp.zeros((1, 16, heads, 8), dtype) for heads in (2, 1, 1))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return FUNCTIONS[name](q, k, v).astype(jnp.float32).sum()

    differentiated = loss if name == "decode" else jax.grad(loss, (0, 1, 2))
    program = jax.jit(differentiated).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo\.dot_general.*", program)
    assert len(products) >= (2 if name == "decode" else 5)
    assert all(f"precision = [{expected}, {expected}]" in product for product in products)
