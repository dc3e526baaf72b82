"""Normalisation of observations, rewards and returns. Every checkpoint stores it."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Float32, Float64

from ringrl.data.store.format import StoredDomain, reward_key
from ringrl.data.store.reader import EpisodeStore

SMALLEST_STD = 1e-3  # constant components stay near zero instead of being amplified


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Statistics of a dataset that scale its numbers to order one."""

    mean: Float64[np.ndarray, " observation"]
    std: Float64[np.ndarray, " observation"]  # at least SMALLEST_STD
    episode_length: int  # steps of the longest episode
    reward_scale: float = 1.0  # divisor of rewards; 1 in ExoRL, where rewards are in [0, 1]
    return_scale: float | None = None  # divisor of returns; None for the episode length, as in ExoRL

    @classmethod
    def of(
        cls,
        store: EpisodeStore,
        episodes: Iterable[int] | None = None,
        held_out: Sequence[int] | np.ndarray = (),
    ) -> Self:
        """Measure all or the given episodes of a store in one pass, with one episode in memory at a time.

        Outside ExoRL's domains, rewards and returns are divided by the largest absolute values of the episodes that are
        not held out.
        """
        length = int(store.lengths.max())
        count, total, squares = 0, np.zeros(store.observation_size), np.zeros(store.observation_size)
        ones, double = np.ones(length + 1), np.empty((length + 1, store.observation_size))
        observations = store.arrays["observation"]
        for i in range(store.num_episodes) if episodes is None else episodes:
            rows = slice(int(store.offsets[i]), int(store.offsets[i + 1]))
            n = rows.stop - rows.start
            double[:n] = observations[rows]
            count += n
            total += ones[:n] @ double[:n]  # sums as matrix products are several times as fast
            squares += ones[:n] @ np.square(double[:n], out=double[:n])
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return cls(mean, np.maximum(std, SMALLEST_STD), length, *_scales(store, held_out))

    @cached_property
    def _shift_and_scale(self) -> tuple[Float32[np.ndarray, " observation"], Float32[np.ndarray, " observation"]]:
        return self.mean.astype(np.float32), (1 / self.std).astype(np.float32)

    def observation(
        self, x: Float[np.ndarray, "*batch observation"], out: np.ndarray | None = None
    ) -> Float32[np.ndarray, "*batch observation"]:
        """Return normalised observations, written to `out` if given."""
        shift, scale = self._shift_and_scale
        normalised = np.subtract(x, shift, out=out, dtype=np.float32, casting="same_kind")
        return np.multiply(normalised, scale, out=normalised)

    def return_to_go(self, x: np.ndarray | float) -> Float32[np.ndarray, "*batch"]:
        """Return returns divided by the episode length (by the largest return outside ExoRL's domains)."""
        return (np.asarray(x) / (self.return_scale or self.episode_length)).astype(np.float32)

    def reward(self, x: Float32[np.ndarray, "*batch"]) -> Float32[np.ndarray, "*batch"]:
        """Return rewards divided by the reward scale. ExoRL's are unchanged."""
        return x if self.reward_scale == 1 else (x / np.float64(self.reward_scale)).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as lists and numbers."""
        return dataclasses.asdict(self) | {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read the output of `to_json`."""
        arrays = {"mean": np.asarray(values["mean"]), "std": np.asarray(values["std"])}
        known = {name: value for name, value in values.items() if name != "ignored"}  # of older versions, empty
        return cls(**known | arrays)


def _scales(store: EpisodeStore, held_out: Sequence[int] | np.ndarray) -> tuple[float, float | None]:
    """Return the divisors of rewards and of returns."""
    if not isinstance(store.facts, StoredDomain):
        return 1.0, None
    (task,) = store.facts.tasks
    kept = ~np.isin(np.arange(store.num_episodes), held_out)
    rewards, returns = (
        store.arrays[reward_key(task)][np.repeat(kept, np.diff(store.offsets))],
        store.returns(task)[kept],
    )
    return float(max(rewards.max(), -rewards.min())) or 1.0, float(np.abs(returns).max()) or 1.0
