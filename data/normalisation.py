"""Statistics that bring a dataset's numbers to order one; they travel with every checkpoint."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Float32, Float64

from ringrl.data.foreign import ForeignDomain
from ringrl.data.schema import reward_key
from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

SMALLEST_STD = 1e-3  # components that never move stay near zero instead of being blown up


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each observation component (O,), the steps of an episode, and scales of rewards.

    The `ignored` components are zero once normalised: no model sees them.

    Attributes:
        reward_scale: what a reward is divided by; 1 in ExoRL, where rewards lie in [0, 1].
        return_scale: what a return is divided by; None for the steps of an episode, as where rewards lie in [0, 1].
    """

    mean: Float64[np.ndarray, " observation"]
    std: Float64[np.ndarray, " observation"]
    episode_length: int
    ignored: tuple[int, ...] = ()
    reward_scale: float = 1.0
    return_scale: float | None = None

    @classmethod
    def of(cls, store: EpisodeStore, ignored: Sequence[int] = (), episodes: Iterable[int] | None = None) -> Self:
        """Measure a store's episodes, all or the given ones: one pass, one episode in memory at a time.

        The steps of an episode are those of the store's longest, whichever are measured. Rewards of a domain that is
        none of ExoRL's may be of any size: they and their returns are scaled by the largest of the store.

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
        return cls(mean, np.maximum(std, SMALLEST_STD), length, tuple(ignored), *_scales(store))

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
        """Returns per step of an episode: where rewards lie in [0, 1], so do these. Others per largest return."""
        return (np.asarray(x) / (self.return_scale or self.episode_length)).astype(np.float32)

    def reward(self, x: Float32[np.ndarray, "*batch"]) -> Float32[np.ndarray, "*batch"]:
        """Rewards per largest reward; where they lie in [0, 1], just as they are."""
        return x if self.reward_scale == 1 else (x / np.float64(self.reward_scale)).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "episode_length": self.episode_length,
            "ignored": list(self.ignored),
            "reward_scale": self.reward_scale,
            "return_scale": self.return_scale,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        # Older checkpoints ignore nothing and know rewards in [0, 1] only.
        ignored, scales = (
            tuple(values.get("ignored", ())),
            (values.get("reward_scale", 1.0), values.get("return_scale")),
        )
        mean, std = np.asarray(values["mean"]), np.asarray(values["std"])
        return cls(mean, std, int(values["episode_length"]), ignored, *scales)


def _scales(store: EpisodeStore) -> tuple[float, float | None]:
    """Of the rewards and the returns of a store."""
    if not isinstance(store.facts, ForeignDomain):
        return 1.0, None
    (task,) = store.facts.tasks
    rewards, returns = store.arrays[reward_key(task)], store.returns(task)
    return float(max(rewards.max(), -rewards.min())) or 1.0, float(np.abs(returns).max()) or 1.0
