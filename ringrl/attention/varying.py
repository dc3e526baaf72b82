"""Types inside shard_map: a fresh constant must be told over which mesh axes it will come to differ."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def varying_like(reference: jax.Array, tree: Tree) -> Tree:
    """The same arrays, typed as differing between devices wherever `reference` does.

    By adding a zero that is of the reference's type: the one way that reads alike in every version of JAX. The
    compiler removes it. Outside shard_map nothing is added.
    """
    if getattr(jax.typeof(reference), "vma", None) == frozenset():
        return tree
    zero = jnp.where(reference.ravel()[0] == 0, 0, 0)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)
