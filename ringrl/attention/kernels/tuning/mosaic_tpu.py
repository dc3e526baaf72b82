"""Tile sizes of the TPU kernels by device, dtype and head_dim.

Chosen by compiling ahead of time and counting instructions; no time was measured. All sizes fit into a kernel's 16 MiB
of vector memory. For bfloat16 and head_dim 128, sizes of 512 and 1024 were compared. A forward step costs 440 to 590
instruction words for any tile, and a tile of 512 x 512 about 1400 (v5e, v5p), 1800 (v4) or 1000 (v6e). Larger tiles are
therefore worth the extra work on the causal diagonal, most of all on v6e. Float32 takes six passes of the matrix unit,
and its programs grow with the tile.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp

Work = Literal["forward", "dq", "dkv"]


class TpuBlocks(NamedTuple):
    """Rows of queries (of all heads in a tile that share a key head) and keys per tile."""

    rows: int
    keys: int


class Tuned(NamedTuple):
    """Tile sizes of each kernel."""

    forward: TpuBlocks
    dq: TpuBlocks
    dkv: TpuBlocks


Table = dict[tuple[str, int], Tuned]  # by dtype and largest head_dim

MOST: Table = {
    ("bfloat16", 128): Tuned(TpuBlocks(1024, 512), TpuBlocks(1024, 512), TpuBlocks(1024, 512)),
    ("bfloat16", 256): Tuned(TpuBlocks(512, 512), TpuBlocks(512, 512), TpuBlocks(512, 512)),
    ("float32", 128): Tuned(TpuBlocks(512, 512), TpuBlocks(512, 512), TpuBlocks(512, 512)),
    ("float32", 256): Tuned(TpuBlocks(256, 256), TpuBlocks(256, 256), TpuBlocks(256, 256)),
}
BY_DEVICE: dict[str, Table] = {
    "TPU v4": MOST,
    "TPU v5": MOST,
    "TPU v5p": MOST,
    "TPU v5 lite": MOST,
    "TPU v6 lite": MOST
    | {("bfloat16", 128): Tuned(TpuBlocks(1024, 1024), TpuBlocks(1024, 1024), TpuBlocks(1024, 1024))},
}


def blocks_for(work: Work, head_dim: int, dtype: jnp.dtype, device_kind: str) -> TpuBlocks:
    """Return the tile sizes of one kernel; a device that is not listed gets those of MOST."""
    table = BY_DEVICE.get(device_kind, MOST)
    fitting = min(limit for name, limit in table if name == jnp.dtype(dtype).name and limit >= head_dim)
    return getattr(table[jnp.dtype(dtype).name, fitting], work)
