"""How large the tiles of the Hopper kernels are (docs/attention.md)."""

from typing import NamedTuple


class HopperBlocks(NamedTuple):
    """Tiles of one kernel. Each of its two consumer warpgroups owns `own` rows; both read the same `visited` rows."""

    own: int
    visited: int
    stages: int  # tiles of the visited side in shared memory: one in use, the others on their way


def forward_blocks(head_dim: int) -> HopperBlocks:
    """Queries are owned, keys visited."""
    return HopperBlocks(64, 128, 2 if head_dim > 64 else 4)


def query_gradient_blocks(head_dim: int) -> HopperBlocks:
    """Queries are owned, keys visited."""
    return HopperBlocks(64, 64 if head_dim > 64 else 128, 3)


def key_gradient_blocks(head_dim: int) -> HopperBlocks:
    """Keys are owned, queries visited."""
    return HopperBlocks(64, 64, 3 if head_dim > 64 else 4)
