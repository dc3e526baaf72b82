"""Batches of contexts spread over a mesh: every process reads what its own devices hold, and nothing else.

Contexts are spread over the mesh's batch axes and their time steps, in the order of a ring's layout, over its sequence
axis. What the devices of other axes share is read once.
"""

import dataclasses
import math
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ringrl.attention import layout_positions
from ringrl.attention.layout import length_multiple
from ringrl.config import BATCH_AXES, SEQUENCE_AXIS
from ringrl.context import Context
from ringrl.data.sampler import ContextSampler
from ringrl.errors import UserError


@dataclasses.dataclass(frozen=True)
class ShardedSampler:
    """A sampler's batches as global arrays: (batch, time, ...) sharded over (data and fsdp, seq).

    The time axis is in layout order; it is padded until it divides. Axes that the mesh lacks count as of size one.

    Raises:
      UserError: a batch that does not divide among the devices of the batch axes.
    """

    sampler: ContextSampler
    mesh: Mesh
    layout: str = "zigzag"

    def __post_init__(self) -> None:
        shares = math.prod(self.mesh.shape.get(axis, 1) for axis in BATCH_AXES)
        if self.sampler.batch_size % shares:
            raise UserError(
                f"optimiser.batch_size: {self.sampler.batch_size} contexts do not divide among {shares} groups of "
                f"devices; give a multiple of {shares}"
            )

    @cached_property
    def times(self) -> Int[np.ndarray, " time"]:
        """Time step at each place of the time axis."""
        ring_size = self.mesh.shape.get(SEQUENCE_AXIS, 1)
        multiple = length_multiple(self.layout, ring_size)
        length = math.ceil(self.sampler.time / multiple) * multiple
        return np.asarray(layout_positions(self.layout, length, ring_size))

    @property
    def steps_per_batch(self) -> int:
        """Timesteps in a batch, padding included."""
        return self.sampler.batch_size * len(self.times)

    @cached_property
    def sharding(self) -> NamedSharding:
        """Of every array of a batch."""
        batch = tuple(axis for axis in BATCH_AXES if axis in self.mesh.shape)
        sequence = SEQUENCE_AXIS if SEQUENCE_AXIS in self.mesh.shape else None
        return NamedSharding(self.mesh, PartitionSpec(batch or None, sequence))

    def batch(self, step: int) -> Context:
        """The batch of an optimiser step, made of jax.Arrays; every process of the mesh calls this for itself."""
        plan, size = self.sampler.plan(step), (self.sampler.batch_size, len(self.times))
        indices = self.sharding.addressable_devices_indices_map(size).values()
        own = {_begin(index): _part(index) for index in indices}  # once each, however many devices hold copies
        parts = [self.sampler.read(plan, rows, self.times[places]) for rows, places in own.values()]

        def spread(*arrays: np.ndarray) -> jax.Array:
            held = dict(zip(own, arrays, strict=True))
            shape = (*size, *arrays[0].shape[2:])
            return jax.make_array_from_callback(shape, self.sharding, lambda index: held[_begin(index)])

        spread_out: Context = jax.tree.map(spread, *parts)
        return spread_out


def _part(index: tuple[slice, ...] | None) -> tuple[slice, slice]:
    """The contexts and the places on the time axis that a device holds."""
    assert index is not None
    rows, places = index[:2]
    return rows, places


def _begin(index: tuple[slice, ...] | None) -> tuple[int, int]:
    """The first of each: tells the parts of a batch apart."""
    rows, places = _part(index)
    return rows.start or 0, places.start or 0
