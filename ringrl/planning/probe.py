"""What this machine's processor does in a second, measured in two seconds: host devices have no data sheet.

A matrix of the feed-forward layer, attention forward and backward, and reading and writing memory: each on all host
devices of this process at once, as in a step, since one alone uses the cores worse (half as well with attention).
Nothing of a training step is run, so that a step's estimate is no fit to it.
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

    count = len(jax.local_devices(backend="cpu"))
    product = _seconds(jnp.matmul, normal(count, ROWS, model.width), normal(count, model.width, hidden))
    q, kv = normal(count, TOKENS, model.heads, head_dim), normal(count, TOKENS, model.kv_heads, head_dim)
    attended = _seconds(gradients, q, kv, kv)
    moved = _seconds(lambda x: x + 1, jnp.zeros((count, NUMBERS)))
    one_product = TOKENS**2 * model.width  # of all heads; a causal half
    work = (2 * ROWS * model.width * hidden, PRODUCTS * one_product, 8 * NUMBERS)
    matrices, pairs, numbers = (
        count * each / taken for each, taken in zip(work, (product, attended, moved), strict=True)
    )
    return matrices, pairs, numbers


def _seconds(function: Callable[..., Any], *arguments: jax.Array) -> float:
    """Of all host devices, each with its share of the arguments' first axis."""
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
