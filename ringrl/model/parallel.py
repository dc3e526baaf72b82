"""Sharding rules: a table from the axis names of a model's arrays to the axes of the device mesh.

    batch  -> data, fsdp     contexts of a batch
    time   -> seq            steps of each context, and the tokens of these steps
    heads, hidden -> tensor  attention heads and units of the feed-forward layer
    embed  -> fsdp, seq      parameters, gathered layer by layer when they are used

`split` names the axes of a parameter where the parameter is created. Parameters outside the transformer blocks (token
embeddings, action head, norms) are small and replicated. XLA inserts the transfers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringrl.config import BATCH_AXES, SEQUENCE_AXIS

MESH_AXES = (*BATCH_AXES, "tensor", SEQUENCE_AXIS)

SPLIT: Mapping[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "time": (SEQUENCE_AXIS,),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "embed": ("fsdp", SEQUENCE_AXIS),
    "layers": (),
}


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A device mesh, and the layout (see `ringrl.attention`) of contexts along its axis "seq".

    Without a mesh, all arrays are on one device and contexts are in time order.
    """

    mesh: Mesh | None = None
    layout: str = "zigzag"

    @property
    def ring_size(self) -> int:
        """Number of devices that share a context."""
        return 1 if self.mesh is None else self.mesh.shape[SEQUENCE_AXIS]

    def sharding(self, *axes: str | None) -> NamedSharding | None:
        """Return the sharding of an array with these axis names, None without a mesh. Axis None is not split."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(*(SPLIT[axis] if axis else None for axis in axes)))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Return the array with a sharding constraint for XLA."""
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def parameter_shardings(self, parameters: Any) -> Any:
        """Return the shardings of a state of nnx.Param, from the axis names that `split` set."""
        specs = nnx.to_pure_dict(nnx.get_partition_spec(parameters))
        return jax.tree.map(
            lambda names: self.sharding(*names), specs, is_leaf=lambda names: isinstance(names, PartitionSpec)
        )


ONE_DEVICE = Parallel()


def split(*axes: str | None, initialiser: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return an initialiser (LeCun normal by default) that also names the axes of the parameter."""
    return nnx.with_partitioning(initialiser or nnx.initializers.lecun_normal(), axes, eager_sharding=False)
