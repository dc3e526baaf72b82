"""Blockwise computation along the sequence (Blockwise Parallel Transformer, 2305.19370)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ringrl.model.parallel import Parallel


def in_blocks(
    function: Callable[[jax.Array], jax.Array],
    x: Float[Array, "batch tokens features"],
    block: int,
    parallel: Parallel,
) -> Float[Array, "batch tokens _"]:
    """Apply a token-wise function to one block of tokens after the other.

    Intermediate arrays (for a feed-forward layer, four times the width) exist for one block only. The backward pass
    recomputes them block by block. Each device processes its own tokens.

    Args:
      function: maps (B, n, c, features) to (B, n, c, anything), each token by itself.
      x: sequence, sharded by "batch" and "time".
      block: largest number of tokens per device in a block.
      parallel: mesh.
    """
    batch, tokens, features = x.shape
    devices = parallel.ring_size
    local = tokens // devices
    number = -(-local // block)
    if number == 1:
        return function(x)
    size = -(-local // number)
    x = jnp.pad(x.reshape(batch, devices, local, features), ((0, 0), (0, 0), (0, number * size - local), (0, 0)))
    blocks = jnp.moveaxis(x.reshape(batch, devices, number, size, features), 2, 0)
    blocks = parallel.constrain(blocks, None, "batch", "time", None, None)
    done = jax.lax.map(jax.checkpoint(function), blocks)
    done = jnp.moveaxis(done, 0, 2).reshape(batch, devices, number * size, -1)[:, :, :local]
    return parallel.constrain(done.reshape(batch, tokens, -1), "batch", "time", None)
