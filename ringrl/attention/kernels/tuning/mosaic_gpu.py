"""Tile sizes of the Hopper kernels: chosen to fit registers without spills, not yet measured on a GPU."""

from typing import NamedTuple

from ringrl.attention.options import Options

SHARED_MEMORY = 220 * 1024  # bytes for tiles, of the 227 KiB per program
MOST_STAGES = 4


class HopperBlocks(NamedTuple):
    """Tiles of one kernel. Each of two consumer warpgroups owns `own` rows; both read the same `visited` rows."""

    own: int
    visited: int
    stages: int  # tiles of the visited side in shared memory: one in use, the others arriving


def forward_blocks(head_dim: int, options: Options) -> HopperBlocks:
    """Return the tiles of the forward kernel, which owns queries and visits keys and values."""
    return _blocks(head_dim, 1, options.block_q or 64, options.block_k or 128)


def query_gradient_blocks(head_dim: int, options: Options) -> HopperBlocks:
    """Return the tiles of the dq kernel, which owns queries and output gradients and visits keys and values."""
    return _blocks(head_dim, 2, options.block_q or 64, options.block_k or (64 if head_dim > 64 else 128))


def key_gradient_blocks(head_dim: int, options: Options) -> HopperBlocks:
    """Return the tiles of the dk, dv kernel, which owns keys and values and visits queries and output gradients."""
    return _blocks(head_dim, 2, options.block_k or 64, options.block_q or 64)


def _blocks(head_dim: int, owned_arrays: int, own: int, visited: int) -> HopperBlocks:
    """Use all stages that fit: 2 bytes per number, owned arrays of two consumers, two visited arrays per stage."""
    left = SHARED_MEMORY - 2 * owned_arrays * own * head_dim * 2
    return HopperBlocks(own, visited, min(MOST_STAGES, left // (2 * visited * head_dim * 2)))
