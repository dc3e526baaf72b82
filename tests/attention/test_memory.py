"""Memory per device does not depend on how many devices the ring has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringrl.attention import ring_attention

pytestmark = pytest.mark.usefixtures("eight_devices", "optimised")

LOCAL_TOKENS = 512


def scratch_bytes(ring: int, strategy: str) -> int:
    """Scratch of forward and backward pass per device, as the compiler counts it."""
    mesh = Mesh(np.array(jax.devices()[:ring]), ("seq",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "seq"))
    q = jax.ShapeDtypeStruct((1, ring * LOCAL_TOKENS, 2, 64), jnp.float32, sharding=sharding)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return ring_attention(q, k, v, mesh=mesh, strategy=strategy).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, q, q).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_scratch_memory_is_flat_in_the_size_of_the_ring():
    two, eight = (scratch_bytes(ring, "ring") for ring in (2, 8))
    assert two > 2 * LOCAL_TOKENS * 2 * 64 * 4, "at least keys and values of one block"
    assert abs(eight - two) <= 0.05 * two


def test_an_all_gather_is_not():
    """The same measurement does see memory that grows."""
    assert scratch_bytes(8, "all_gather") > 2 * scratch_bytes(2, "all_gather")
