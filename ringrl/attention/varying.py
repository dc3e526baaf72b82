"""Types inside shard_map, where the type of an array states over which mesh axes its values differ."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def varying_like(reference: jax.Array, tree: Tree) -> Tree:
    """Return the arrays, typed as varying over the mesh axes of `reference`.

    A zero of the reference's type is added, which works in every version of JAX; the compiler removes it. Outside
    shard_map nothing is added.
    """
    if getattr(jax.typeof(reference), "vma", None) == frozenset():
        return tree
    zero = jnp.where(reference.ravel()[0] == 0, 0, 0)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)
