"""Scratch memory per device against the size of the ring."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringrl.attention import ring_attention

pytestmark = pytest.mark.usefixtures("eight_devices", "optimised")

LOCAL_TOKENS = 512
QUICK = {"xla_backend_optimization_level": 0}  # of LLVM, which comes after the buffers are assigned


@cache
def scratch_bytes(ring: int, strategy: str, window: int | None = None) -> int:
    """Return the scratch memory of forward and backward pass per device, from the compiler.

    With a window, queries also see a global prefix.
    """
    mesh = Mesh(np.array(jax.devices()[:ring]), ("seq",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "seq"))
    q = jax.ShapeDtypeStruct((1, ring * LOCAL_TOKENS, 2, 64), jnp.float32, sharding=sharding)
    ends = None if window is None else jax.ShapeDtypeStruct(q.shape[:2], jnp.int32, sharding=sharding)
    attend = partial(ring_attention, mesh=mesh, strategy=strategy, local_window_size=window)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array | None) -> jax.Array:
        return attend(q, k, v, global_prefix=ends).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), compiler_options=QUICK).lower(q, q, q, ends).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("window", [None, pytest.param(20, marks=pytest.mark.slow)])
def test_scratch_memory_is_constant_in_the_ring_size(window):
    two, eight = (scratch_bytes(ring, "ring", window) for ring in (2, 8))
    assert two > 2 * LOCAL_TOKENS * 2 * 64 * 4, "at least keys and values of one block"
    assert abs(eight - two) <= 0.05 * two


def test_scratch_memory_of_all_gather_is_larger():
    """The measurement detects the memory of all keys."""
    assert scratch_bytes(8, "all_gather") > 2 * scratch_bytes(8, "ring")
