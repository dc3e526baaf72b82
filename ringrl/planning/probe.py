"""Measurement of this machine's rates for host devices, which have no data sheet (about two seconds).

Three operations run on all host devices at once, as in a step: a matrix product of the feed-forward layer, attention
forward and backward, and a copy in memory. A single device would use the cores worse. No training step is run, so the
estimate of a step is not fitted to a step.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringrl.attention import attention
from ringrl.config import ModelConfig
from ringrl.planning.machines import Attained, Machine

ROWS, TOKENS, NUMBERS = 2048, 2048, 2**22
PRODUCTS = 7  # matrix products of attention: two forward, five backward
ROUNDS = 3


def measured(machine: Machine, model: ModelConfig) -> Machine:
    """Return the machine with this host's measured rates and memory, divided by the number of host devices."""
    matrices, attended, moved = (rate / machine.devices for rate in _rates(model))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / machine.devices
    # A hop reads and writes.
    device = dataclasses.replace(machine.device, flops=matrices, memory=memory, bandwidth=moved, link=moved / 2)
    return dataclasses.replace(machine, device=device, measured=Attained(1.0, attended / matrices, 1.0, 1.0))


def _rates(model: ModelConfig) -> tuple[float, float, float]:
    """Return operations per second of a matrix product and of attention, and bytes per second, over all cores."""
    dtype, hidden = jnp.dtype(model.dtype), model.feed_forward * model.width
    head_dim = model.width // model.heads

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape).astype(dtype)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.grad(lambda *x: attention(*x, is_causal=True).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    count = len(jax.local_devices(backend="cpu"))
    product = _seconds(jnp.matmul, normal(count, ROWS, model.width), normal(count, model.width, hidden))
    q, kv = normal(count, TOKENS, model.heads, head_dim), normal(count, TOKENS, model.kv_heads, head_dim)
    attended = _seconds(gradients, q, kv, kv)
    moved = _seconds(lambda x: x + 1, jnp.zeros((count, NUMBERS)))
    one_product = TOKENS**2 * model.width  # over all heads, half of it due to the causal mask
    work = (2 * ROWS * model.width * hidden, PRODUCTS * one_product, 8 * NUMBERS)
    matrices, pairs, numbers = (
        count * each / taken for each, taken in zip(work, (product, attended, moved), strict=True)
    )
    return matrices, pairs, numbers


def _seconds(function: Callable[..., Any], *arguments: jax.Array) -> float:
    """Return the median seconds of a function over all host devices, sharded along the arguments' first axis."""
    mesh, axis = Mesh(np.array(jax.local_devices(backend="cpu")), ("device",)), PartitionSpec("device")
    arguments = tuple(jax.device_put(x, NamedSharding(mesh, axis)) for x in arguments)
    shared = jax.shard_map(function, mesh=mesh, in_specs=axis, out_specs=axis, check_vma=False)
    compiled = jax.jit(shared).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
