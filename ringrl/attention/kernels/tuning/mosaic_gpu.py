"""How large the tiles of the Hopper kernels are: chosen to fit registers without spills, not yet measured on a GPU."""

from typing import NamedTuple

from ringrl.attention.options import Options

SHARED_MEMORY = 220 * 1024  # bytes for tiles; a multiprocessor lends a program 227 KiB
MOST_STAGES = 4


class HopperBlocks(NamedTuple):
    """Tiles of one kernel. Each of its two consumer warpgroups owns `own` rows; both read the same `visited` rows."""

    own: int
    visited: int
    stages: int  # tiles of the visited side in shared memory: one in use, the others on their way


def forward_blocks(head_dim: int, options: Options) -> HopperBlocks:
    """Queries are owned, keys and values visited."""
    return _blocks(head_dim, 1, options.block_q or 64, options.block_k or 128)


def query_gradient_blocks(head_dim: int, options: Options) -> HopperBlocks:
    """Queries and gradients of the output are owned, keys and values visited."""
    return _blocks(head_dim, 2, options.block_q or 64, options.block_k or (64 if head_dim > 64 else 128))


def key_gradient_blocks(head_dim: int, options: Options) -> HopperBlocks:
    """Keys and values are owned, queries and gradients of the output visited."""
    return _blocks(head_dim, 2, options.block_k or 64, options.block_q or 64)


def _blocks(head_dim: int, owned_arrays: int, own: int, visited: int) -> HopperBlocks:
    """As many stages as fit: arrays of 2 bytes a number, two consumers' owned ones, two visited ones in each stage."""
    left = SHARED_MEMORY - 2 * owned_arrays * own * head_dim * 2
    return HopperBlocks(own, visited, min(MOST_STAGES, left // (2 * visited * head_dim * 2)))
