"""Statistics that bring a dataset's numbers to order one; they travel with every checkpoint."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Float32, Float64

from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

SMALLEST_STD = 1e-3  # components that never move stay near zero instead of being blown up


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each observation component (O,), and the steps of an episode.

    The `ignored` components are zero once normalised: no model sees them.
    """

    mean: Float64[np.ndarray, " observation"]
    std: Float64[np.ndarray, " observation"]
    episode_length: int
    ignored: tuple[int, ...] = ()

    @classmethod
    def of(cls, store: EpisodeStore, ignored: Sequence[int] = (), episodes: Iterable[int] | None = None) -> Self:
        """Measure a store's episodes, all or the given ones: one pass, one episode in memory at a time.

        The steps of an episode are those of the store's longest, whichever are measured.

        Raises:
          UserError: an ignored component that the observations do not have.
        """
        for column in ignored:
            if not 0 <= column < store.observation_size:
                raise UserError(
                    f"ignored_observations: {column} is none of the {store.observation_size} numbers of an observation "
                    f"of {store.domain}; give 0 to {store.observation_size - 1}"
                )
        length = int(store.lengths.max())
        count, total, squares = 0, np.zeros(store.observation_size), np.zeros(store.observation_size)
        ones, double = np.ones(length + 1), np.empty((length + 1, store.observation_size))
        observations = store.arrays["observation"]
        for i in range(store.num_episodes) if episodes is None else episodes:
            rows = slice(int(store.offsets[i]), int(store.offsets[i + 1]))
            n = rows.stop - rows.start
            double[:n] = observations[rows]
            count += n
            total += ones[:n] @ double[:n]  # as products of matrices these sums are several times as fast
            squares += ones[:n] @ np.square(double[:n], out=double[:n])
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return cls(mean, np.maximum(std, SMALLEST_STD), length, tuple(ignored))

    @cached_property
    def _shift_and_scale(self) -> tuple[Float32[np.ndarray, " observation"], Float32[np.ndarray, " observation"]]:
        scale = 1 / self.std
        scale[list(self.ignored)] = 0
        return self.mean.astype(np.float32), scale.astype(np.float32)

    def observation(
        self, x: Float[np.ndarray, "*batch observation"], out: np.ndarray | None = None
    ) -> Float32[np.ndarray, "*batch observation"]:
        """Normalised observations, written to `out` where it is given."""
        shift, scale = self._shift_and_scale
        normalised = np.subtract(x, shift, out=out, dtype=np.float32, casting="same_kind")
        return np.multiply(normalised, scale, out=normalised)

    def return_to_go(self, x: np.ndarray | float) -> Float32[np.ndarray, "*batch"]:
        """Returns per step of an episode: rewards lie in [0, 1], so these do too."""
        return (np.asarray(x) / self.episode_length).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "episode_length": self.episode_length,
            "ignored": list(self.ignored),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        ignored = tuple(values.get("ignored", ()))  # older checkpoints ignore nothing
        return cls(np.asarray(values["mean"]), np.asarray(values["std"]), int(values["episode_length"]), ignored)
