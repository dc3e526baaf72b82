"""The device mesh of a run, and sharding rules from the axis names of a model's arrays to the axes of the mesh.

`split` names the axes of a parameter where the parameter is created. Parameters outside the transformer blocks (token
embeddings, action head, norms) are small and replicated. XLA inserts the transfers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ringrl.attention import ring_order
from ringrl.config import BATCH_AXES, SEQUENCE_AXIS, MeshConfig, ModelConfig, TrainConfig
from ringrl.errors import UserError

MESH_AXES = (*BATCH_AXES, "tensor", SEQUENCE_AXIS)
ULYSSES_AXIS = "ulysses"

SPLIT: Mapping[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,  # contexts of a batch
    "time": (SEQUENCE_AXIS,),  # steps of each context, and the tokens of these steps
    "heads": ("tensor",),
    "hidden": ("tensor",),  # units of the feed-forward layer
    "embed": ("fsdp", SEQUENCE_AXIS),  # features of parameters, gathered layer by layer when they are used
    "layers": (),
}


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A device mesh, and the layout (see `ringrl.attention`) of contexts along its axis "seq".

    Without a mesh, all arrays are on one device and contexts are in time order.
    """

    mesh: Mesh | None = None
    layout: str = "zigzag"
    ulysses: int = 1  # neighbours along "seq" that form a group, for strategy "ulysses_ring"

    @property
    def ring_size(self) -> int:
        """Number of devices that share a context."""
        return 1 if self.mesh is None else self.mesh.shape[SEQUENCE_AXIS]

    def mesh_of_groups(self) -> Mesh:
        """Return a mesh of the same devices whose axis "seq" is split into rings of groups ("seq", "ulysses")."""
        assert self.mesh is not None
        names = *MESH_AXES, ULYSSES_AXIS
        sizes = *self.mesh.devices.shape[:-1], self.ring_size // self.ulysses, self.ulysses
        return Mesh(self.mesh.devices.reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names))

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


def make_parallel(config: TrainConfig) -> Parallel:
    """Return the mesh of a run, with its axes on the fastest links that JAX finds.

    Raise UserError for too many devices, or an axis that does not divide the batch or the model.
    """
    mesh = config.mesh
    if mesh.devices == 1 and jax.process_count() == 1:
        return ONE_DEVICE
    check_divides(config)
    devices = jax.devices()
    shape = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in MESH_AXES)
    if mesh.devices > len(devices):
        raise UserError(f"mesh: {shape} is {mesh.devices} devices, but JAX has {len(devices)} ({devices[0].platform})")
    if mesh.devices < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh: {shape} is {mesh.devices} devices, but the {jax.process_count()} processes have {len(devices)}; "
            "a run over several processes must use all of them"
        )
    return parallel_over(mesh, devices)


def parallel_over(mesh: MeshConfig, devices: Sequence[Any]) -> Parallel:
    """Return a mesh of the first of these devices, whose rings lead from neighbour to neighbour."""
    sizes, types = tuple(getattr(mesh, axis) for axis in MESH_AXES), (AxisType.Auto,) * len(MESH_AXES)
    made = jax.make_mesh(sizes, MESH_AXES, types, devices=devices[: mesh.devices])
    ordered = ring_order(list(made.devices.flat), mesh.seq)
    return Parallel(Mesh(np.reshape(np.array(ordered), sizes), MESH_AXES, axis_types=types), mesh.layout, mesh.ulysses)


def make_ring_mesh(config: TrainConfig, mesh: MeshConfig) -> Parallel:
    """Return the mesh that divides the contexts of a trained policy when it acts.

    Raise UserError for an axis other than seq, or a policy without a context, and as `make_parallel` does.
    """
    if mesh.devices != mesh.seq:
        raise UserError("mesh: only mesh.seq divides a policy that acts; leave the other axes at 1")
    if mesh.seq > 1 and not config.model.family.has_context:
        raise UserError(f"mesh.seq: {config.model.kind} has no context to divide; leave it at 1")
    one_context = config.optimiser.model_copy(update={"batch_size": 1, "accumulation": 1})
    model = config.model
    if model.strategy == "ulysses_ring" and mesh.ulysses == 1:  # acting needs no groups: those of one device are a ring
        model = model.model_copy(update={"strategy": "ring"})
    return make_parallel(config.model_copy(update={"mesh": mesh, "model": model, "optimiser": one_context}))


def check_divides(config: TrainConfig) -> None:
    """Raise UserError if an axis of the mesh does not divide the batch or the model."""
    mesh, model, optimiser = config.mesh, config.model, config.optimiser
    if not model.family.splits_batches:
        raise UserError(f"mesh: {model.kind} trains on one device; leave all axes at 1, or choose another model.kind")
    part = optimiser.batch_size // optimiser.accumulation
    hidden = model.feed_forward * model.width
    needs = [
        ("mesh.data x mesh.fsdp", mesh.data * mesh.fsdp, part, "contexts of a batch (or of its accumulated part)"),
        ("mesh.tensor", mesh.tensor, model.heads, "query heads"),
        ("mesh.tensor", mesh.tensor, model.kv_heads, "key heads"),
        ("mesh.tensor", mesh.tensor, hidden, "units of the feed-forward layer"),
        ("mesh.fsdp x mesh.seq", mesh.fsdp * mesh.seq, model.width, "features of the model's width"),
    ]
    for name, size, amount, what in needs:
        if (model.family.has_context or "data" in name) and amount % size:
            raise UserError(f"{name}: {amount} {what} do not divide among {size} devices")
    if model.family.has_context and mesh.seq > 1:
        _check_strategy(mesh, model)


def _check_strategy(mesh: MeshConfig, model: ModelConfig) -> None:
    """Raise UserError if the heads on each device do not suit the transfers along "seq"."""
    heads, key_heads = model.heads // mesh.tensor, model.kv_heads // mesh.tensor
    each = "" if mesh.tensor == 1 else f" on each device (mesh.tensor {mesh.tensor})"
    if (model.strategy == "ulysses_ring") != (mesh.ulysses > 1):
        raise UserError(
            f"mesh.ulysses: {mesh.ulysses} does not suit model.strategy {model.strategy}; use a group of 2 devices or "
            "more for ulysses_ring, and leave it out for other strategies"
        )
    axis, group = ("mesh.seq", mesh.seq) if model.strategy == "ulysses" else ("mesh.ulysses", mesh.ulysses)
    or_groups = " or ulysses_ring" if model.strategy == "ulysses" else ""
    if heads % group or (key_heads % group and group % key_heads):
        raise UserError(
            f"{axis}: with model.strategy {model.strategy}, {group} must divide the {heads} query heads{each}, and be "
            f"a multiple or a divisor of the {key_heads} key heads; use another {axis}, or model.strategy "
            f"ring{or_groups}"
        )
    circulating = max(1, key_heads // mesh.ulysses)
    if model.bidirectional and circulating % 2:
        raise UserError(
            f"model.bidirectional: the {circulating} key heads{each} cannot be halved; leave it out, or use even "
            "numbers"
        )
