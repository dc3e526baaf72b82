"""How large the tiles of the XLA kernel are, and how many heads are computed at once (docs/attention.md)."""

from typing import NamedTuple

import jax


class Blocks(NamedTuple):
    """Queries and keys per tile, and key heads (of all contexts) per step."""

    queries: int
    keys: int
    heads: int


def blocks_for(heads: int) -> Blocks:
    """For so many key heads, those of all contexts of the batch counted, on the platform of this process.

    Several host devices share the cores of a CPU between them: there small tiles, one head at a time, stay in the
    cache. One device has the cores to itself, and only larger products are spread over them.
    """
    if jax.default_backend() != "cpu":
        return Blocks(512, 512, heads)
    if jax.local_device_count() > 1:
        return Blocks(256, 256, 1)
    together = next(n for n in (4, 3, 2, 1) if heads % n == 0)
    return Blocks(512, 512, together) if together > 1 else Blocks(256, 512, 1)
