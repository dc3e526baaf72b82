"""Batches of a run: contexts sharded over a mesh of devices, and an iterator that reads ahead in the background."""

import dataclasses
import math
from functools import cached_property
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ringrl.attention import layout_positions
from ringrl.attention.layout import length_multiple
from ringrl.config import BATCH_AXES, SEQUENCE_AXIS
from ringrl.context import Context
from ringrl.data.sampling.sampler import ContextSampler

READ_AHEAD = 2  # batches that are prepared in advance


class BatchSource(Protocol):
    """A sampler. The batch of a step is a pure function of the step."""

    def batch(self, step: int) -> Any:
        """Return the batch of an optimiser step."""


def iterate_batches(source: BatchSource, steps: int) -> grain.DatasetIterator:
    """Return an iterator over the batches of steps 0 ... steps - 1, whose state is plain JSON. Close it after use."""
    dataset = grain.MapDataset.range(steps).map(source.batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)))


@dataclasses.dataclass(frozen=True)
class ShardedSampler:
    """A sampler's batches as global arrays: (batch, time, ...) sharded over (data and fsdp, seq).

    The time axis is in layout order and padded to a multiple that divides. Axes that the mesh lacks count as size one.
    Every process reads only the steps of its own devices, and steps that several devices share once.
    """

    sampler: ContextSampler
    mesh: Mesh
    layout: str = "zigzag"

    @cached_property
    def times(self) -> Int[np.ndarray, " time"]:
        """The time step at each place of the time axis."""
        ring_size = self.mesh.shape.get(SEQUENCE_AXIS, 1)
        multiple = length_multiple(self.layout, ring_size)
        length = math.ceil(self.sampler.time / multiple) * multiple
        return np.asarray(layout_positions(self.layout, length, ring_size))

    @cached_property
    def sharding(self) -> NamedSharding:
        """The sharding of every array of a batch."""
        batch = tuple(axis for axis in BATCH_AXES if axis in self.mesh.shape)
        sequence = SEQUENCE_AXIS if SEQUENCE_AXIS in self.mesh.shape else None
        return NamedSharding(self.mesh, PartitionSpec(batch or None, sequence))

    def batch(self, step: int) -> Context:
        """Return the batch of an optimiser step as jax.Arrays. Every process of the mesh must call this."""
        draw, size = self.sampler.draw(step), (self.sampler.batch_size, len(self.times))
        indices = self.sharding.addressable_devices_indices_map(size).values()
        own = {_begin(index): index[:2] for index in indices if index}  # once each, even if several devices have copies
        parts = [self.sampler.read(draw, rows, self.times[places]) for rows, places in own.values()]

        def spread(*arrays: np.ndarray) -> jax.Array:
            held = dict(zip(own, arrays, strict=True))
            shape = (*size, *arrays[0].shape[2:])
            return jax.make_array_from_callback(shape, self.sharding, lambda index: held[_begin(index)])

        return jax.tree.map(spread, *parts)


def _begin(index: tuple[slice, ...] | None) -> tuple[int, int]:
    """Return the first context and place of a device, which identify its part of the batch."""
    assert index is not None
    rows, places = index[:2]
    return rows.start or 0, places.start or 0
