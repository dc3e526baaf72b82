"""How large the tiles of the TPU kernels are, by device, dtype and head_dim.

Found by compiling ahead of time and counting instructions, not by running: no time was measured. Everything here fits
into the 16 MiB of vector memory that a kernel is granted. For bfloat16 and head_dim 128, sizes of 512 and 1024 each
way were compared: a forward step costs 440 to 590 instruction words whatever its tile, and one of 512 x 512 some 1400
(v5e, v5p), 1800 (v4) or 1000 (v6e), so that larger tiles are worth the more of a causal diagonal that they compute in
vain, on a v6e most of all. Float32 goes through the matrix unit six times over, and its programs grow with the tile.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp

Work = Literal["forward", "dq", "dkv"]


class TpuBlocks(NamedTuple):
    """Rows of queries (heads that share a key head are rows of one tile) and keys, per tile."""

    rows: int
    keys: int


class Tuned(NamedTuple):
    """Tiles of each kernel."""

    forward: TpuBlocks
    dq: TpuBlocks
    dkv: TpuBlocks


Table = dict[tuple[str, int], Tuned]  # by dtype and the largest head_dim that it is for

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
    """Tiles of one kernel; a device that is not listed gets MOST's."""
    table = BY_DEVICE.get(device_kind, MOST)
    fitting = min(limit for name, limit in table if name == jnp.dtype(dtype).name and limit >= head_dim)
    return getattr(table[jnp.dtype(dtype).name, fitting], work)
