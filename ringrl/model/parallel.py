"""How a model's arrays are split over the devices of a mesh: one table, from the names of their axes to mesh axes.

    batch  -> data, fsdp     every device has contexts of its own
    time   -> seq            and of each context a stretch of its steps (of its tokens: the same stretch)
    heads, hidden -> tensor  each device computes some heads, and some units of the feed-forward layer
    embed  -> fsdp, seq      parameters lie in pieces and are gathered layer by layer, when they are used

Parameters carry the names of their axes from where they are made (`split`). Those outside the transformer's blocks
(embeddings of tokens, action head, norms) are small and lie on every device. XLA finds the transfers that follow.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringrl.config import BATCH_AXES, SEQUENCE_AXIS

MESH_AXES = (*BATCH_AXES, "tensor", SEQUENCE_AXIS)

SPLIT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "batch": BATCH_AXES,
        "time": (SEQUENCE_AXIS,),
        "heads": ("tensor",),
        "hidden": ("tensor",),
        "embed": ("fsdp", SEQUENCE_AXIS),
        "layers": (),
    }
)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A mesh, and the order (`ringrl.attention`'s layouts) in which contexts lie on its axis "seq".

    Without a mesh everything is on one device, in time order.
    """

    mesh: Mesh | None = None
    layout: str = "zigzag"

    @property
    def ring_size(self) -> int:
        """Devices among which a context is divided."""
        return 1 if self.mesh is None else self.mesh.shape[SEQUENCE_AXIS]

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Where an array with axes of these names lies; None is an axis that is not split."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, partition(*axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """The same array, which XLA then keeps there."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def parameter_shardings(self, parameters: Any) -> Any:
        """Of a state of nnx.Param, by the names that `split` gave their axes."""
        specs = nnx.to_pure_dict(nnx.get_partition_spec(parameters))
        return jax.tree.map(
            lambda names: self.sharding(*names), specs, is_leaf=lambda names: isinstance(names, PartitionSpec)
        )


ONE_DEVICE = Parallel()


def partition(*axes: str | None) -> PartitionSpec:
    """The mesh axes of an array with axes of these names."""
    return PartitionSpec(*(SPLIT[axis] if axis is not None else None for axis in axes))


def split(*axes: str | None, initialiser: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """An initialiser that also names the parameter's axes; LeCun's normal distribution by default."""
    return nnx.with_partitioning(initialiser or nnx.initializers.lecun_normal(), axes, eager_sharding=False)
