"""Tile sizes of the kernels."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ringrl.attention.mask import Options


class XlaBlocks(NamedTuple):
    """Tile sizes of the XLA kernel, and the number of key heads (over the batch) that are computed at once."""

    queries: int
    keys: int
    heads: int


def xla_blocks(heads: int, queries: int, keys: int) -> XlaBlocks:
    """Return tile sizes for key heads (over the whole batch) and lengths on the platform of this process.

    Several host devices share the cores of a CPU: small tiles and one head at a time stay in the cache. A single device
    spreads larger products over all cores. Tiles on a CPU divide the sequence evenly, short ones into at least four:
    padding and hidden halves of tiles would cost more than products.
    """
    if jax.default_backend() != "cpu":
        return XlaBlocks(512, 512, heads)
    if jax.local_device_count() > 1:
        return XlaBlocks(_even(queries, 256), _even(keys, 128), 1)
    together = next(n for n in (4, 3, 2, 1) if heads % n == 0)
    most = XlaBlocks(512, 512, together) if together > 1 else XlaBlocks(256, 512, 1)
    of_queries, of_keys = (
        _even(length, min(limit, max(128, -(-length // 4)))) for length, limit in ((queries, most[0]), (keys, most[1]))
    )
    return XlaBlocks(of_queries, of_keys, together)


def _even(length: int, most: int) -> int:
    """Return the size of the fewest equal tiles of at most about `most` that hold `length`.

    Sizes are multiples of 8, large ones of 64, whose rows fill the vectors of any CPU.
    """
    size = -(-length // -(-length // most))
    unit = 8 if size < 248 else 64
    return -(-size // unit) * unit


SHARED_MEMORY = 220 * 1024  # bytes for tiles on Hopper, of the 227 KiB per program
MOST_STAGES = 4


class HopperBlocks(NamedTuple):
    """Tiles of one Hopper kernel. They fit registers without spills and were not measured on a GPU.

    Each of two consumer warpgroups owns `own` rows; both read the same `visited` rows.
    """

    own: int
    visited: int
    stages: int  # tiles of the visited side in shared memory: one in use, the others arriving


def hopper_blocks(kernel: Literal["forward", "dq", "dkv"], head_dim: int, options: Options) -> HopperBlocks:
    """Return the tiles of a Hopper kernel. The kernel of dk and dv ("dkv") owns keys; the others own queries.

    All stages that fit are used: 2 bytes per number, owned arrays of two consumers, two visited arrays per stage.
    """
    owned_arrays, visited = 1 if kernel == "forward" else 2, 128 if kernel == "forward" or head_dim <= 64 else 64
    own, visited = options.block_q or 64, options.block_k or visited
    if kernel == "dkv":
        own, visited = options.block_k or 64, options.block_q or 64
    left = SHARED_MEMORY - 2 * owned_arrays * own * head_dim * 2
    return HopperBlocks(own, visited, min(MOST_STAGES, left // (2 * visited * head_dim * 2)))


class TpuBlocks(NamedTuple):
    """Rows of queries (of all heads in a tile that share a key head) and keys per tile, of all TPU kernels."""

    rows: int
    keys: int


# By dtype and largest head_dim. Chosen by compiling ahead of time and counting instructions; no time was measured. All
# sizes fit into a kernel's 16 MiB of vector memory. A forward step costs 440 to 590 instruction words for any tile, and
# a bfloat16 tile of 512 x 512 about 1400 (v5e, v5p), 1800 (v4) or 1000 (v6e). Larger tiles are therefore worth the
# extra work on the causal diagonal, most of all on v6e. Float32 takes six passes, and its programs grow with the tile.
TPU_BLOCKS = {
    ("bfloat16", 128): TpuBlocks(1024, 512),
    ("bfloat16", 256): TpuBlocks(512, 512),
    ("float32", 128): TpuBlocks(512, 512),
    ("float32", 256): TpuBlocks(256, 256),
}
V6E_BLOCKS = TPU_BLOCKS | {("bfloat16", 128): TpuBlocks(1024, 1024)}


def tpu_blocks(head_dim: int, dtype: jnp.dtype, device_kind: str) -> TpuBlocks:
    """Return the tile sizes of the TPU kernels for a device."""
    table = V6E_BLOCKS if device_kind == "TPU v6 lite" else TPU_BLOCKS
    fitting = min(limit for name, limit in table if name == jnp.dtype(dtype).name and limit >= head_dim)
    return table[jnp.dtype(dtype).name, fitting]
