"""How large the tiles of the TPU kernels are: rows of queries and keys that fit into the memory of each generation."""

from typing import Literal, NamedTuple

import jax.numpy as jnp

Work = Literal["forward", "dq", "dkv"]


class TpuBlocks(NamedTuple):
    """Rows of queries (heads that share a key head are rows of one tile) and keys, per tile."""

    rows: int
    keys: int


def blocks_for(work: Work, head_dim: int, dtype: jnp.dtype) -> TpuBlocks:
    """Tiles of one kernel."""
    return TpuBlocks(512, 512)
