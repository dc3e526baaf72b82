"""The batches of a run through grain: random access by step, read ahead in the background, resumable anywhere."""

import dataclasses
from typing import Any, Protocol

import grain

READ_AHEAD = 2  # batches that wait while one is used; one thread makes them, which reads with many


class BatchSource(Protocol):
    """A sampler: the batch of a step is a pure function of the step."""

    @property
    def steps_per_batch(self) -> int:
        """Timesteps in a batch."""

    def batch(self, step: int) -> Any:
        """The batch of an optimiser step."""


@dataclasses.dataclass(frozen=True)
class _Steps:
    """A source as grain's random-access data: one element per optimiser step."""

    source: BatchSource
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> Any:
        return self.source.batch(step)


def iterate_batches(source: BatchSource, steps: int) -> grain.DatasetIterator:
    """The batches of steps 0 ... steps - 1. Close it after use.

    `get_state` and `set_state` give and take plain JSON: which step comes next. The batches that follow are the same,
    whatever was read before, and on however many hosts.
    """
    dataset = grain.MapDataset.source(_Steps(source, steps))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)))
