"""What this machine's processor does in a second, measured in two seconds: host devices have no data sheet.

Two matrices of the feed-forward layer, attention forward and backward, and reading and writing memory, each alone on
one host device, which takes all cores. Nothing of a training step is run, so that a step's estimate is no fit to it.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ringrl.attention import attention
from ringrl.config import ModelConfig
from ringrl.planning.machines import Attained, Machine

ROWS, TOKENS, NUMBERS = 2048, 2048, 2**24
PRODUCTS = 7  # of attention: two forward, five backward
ROUNDS = 3


def measured(machine: Machine, model: ModelConfig) -> Machine:
    """Host devices with the rates that this machine reaches now, and its memory, shared among them."""
    matrices, attended, moved = (rate / machine.devices for rate in _rates(model))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / machine.devices
    # A hop reads on one side and writes on the other.
    device = dataclasses.replace(machine.device, flops=matrices, memory=memory, bandwidth=moved, link=moved / 2)
    return dataclasses.replace(machine, device=device, measured=Attained(1.0, attended / matrices, 1.0, 1.0))


def _rates(model: ModelConfig) -> tuple[float, float, float]:
    """Operations per second of a matrix product and of attention, and bytes per second, of all cores."""
    dtype, hidden = jnp.dtype(model.dtype), model.feed_forward * model.width
    head_dim = model.width // model.heads

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape).astype(dtype)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.grad(lambda *x: attention(*x, is_causal=True).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        product = _seconds(jnp.matmul, normal(ROWS, model.width), normal(model.width, hidden))
        q, kv = normal(1, TOKENS, model.heads, head_dim), normal(1, TOKENS, model.kv_heads, head_dim)
        attended = _seconds(gradients, q, kv, kv)
        moved = _seconds(lambda x: x + 1, jnp.zeros(NUMBERS))
    one_product = TOKENS**2 * model.width  # of all heads; a causal half
    return 2 * ROWS * model.width * hidden / product, PRODUCTS * one_product / attended, 8 * NUMBERS / moved


def _seconds(function: Callable[..., Any], *arguments: jax.Array) -> float:
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
