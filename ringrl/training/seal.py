"""What tells that a checkpoint still holds what was saved; the file format itself does not notice a changed value."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from ringrl.data.digest import json_digest

SEAL = "seal"


def array_seals(tree: Any) -> list[int]:
    """A number per array of a tree, in the order of its leaves, that differs if one value of the array does.

    It is the sum of the array's words of bits, modulo 2^32: the same however the array lies on devices, and computed
    where it lies.
    """
    return [int(seal) for seal in jax.device_get(_sums(jax.tree.leaves(tree)))]


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[UInt32[jax.Array, ""]]:
    return [_words(array).astype(jnp.uint32).sum(dtype=jnp.uint32) for array in arrays]


def _words(array: jax.Array) -> jax.Array:
    bits = min(8 * array.dtype.itemsize, 32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}"))


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values (as JSON has them) with a digest of them all."""
    return dict(values) | {SEAL: json_digest(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was sealed; what never was is given back as it is. ValueError if it is something else by now."""
    rest = {name: value for name, value in values.items() if name != SEAL}
    if values.get(SEAL, json_digest(rest)) != json_digest(rest):
        raise ValueError("it is not what was saved: its seal is broken")
    return rest
