"""Statistics that bring a dataset's numbers to order one; they travel with every checkpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, Float64

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
    def of(cls, store: EpisodeStore, ignored: Sequence[int] = ()) -> Self:
        """Measure a store: one pass, one episode in memory at a time.

        Raises:
          UserError: an ignored component that the observations do not have.
        """
        for column in ignored:
            if not 0 <= column < store.observation_size:
                raise UserError(
                    f"ignored_observations: {column} is none of the {store.observation_size} numbers of an observation "
                    f"of {store.domain}; give 0 to {store.observation_size - 1}"
                )
        count, total, squares = 0, 0.0, 0.0
        for i in range(store.num_episodes):
            observation = store.episode(i)["observation"].astype(np.float64)
            count += len(observation)
            total = total + observation.sum(0)
            squares = squares + np.square(observation).sum(0)
        mean = np.asarray(total / count)
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return cls(mean, np.maximum(std, SMALLEST_STD), int(store.lengths.max()), tuple(ignored))

    def observation(self, x: np.ndarray) -> Float32[np.ndarray, "*batch observation"]:
        """Normalised observations."""
        normalised = ((x - self.mean) / self.std).astype(np.float32)
        normalised[..., list(self.ignored)] = 0
        return normalised

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
