"""Tile sizes of the XLA kernel, and the number of heads that are computed at once."""

from typing import NamedTuple

import jax


class Blocks(NamedTuple):
    """Queries and keys per tile, and key heads (of all contexts) per step."""

    queries: int
    keys: int
    heads: int


def blocks_for(heads: int) -> Blocks:
    """Return tile sizes for a number of key heads (over the whole batch) on the platform of this process.

    Several host devices share the cores of a CPU: small tiles and one head at a time stay in the cache. A single device
    uses all cores, and only larger products are spread over them.
    """
    if jax.default_backend() != "cpu":
        return Blocks(512, 512, heads)
    if jax.local_device_count() > 1:
        return Blocks(256, 128, 1)
    together = next(n for n in (4, 3, 2, 1) if heads % n == 0)
    return Blocks(512, 512, together) if together > 1 else Blocks(256, 512, 1)
