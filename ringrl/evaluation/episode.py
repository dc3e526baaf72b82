"""What happened in one in-context episode of a batch of streams."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Float32, Float64, Int64


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of each of B streams, step by step. All is NaN where a stream had failed, in this or before."""

    observation: Float32[np.ndarray, "time_plus_1 streams observation"]  # row t is what action t was chosen in
    action: Float32[np.ndarray, "time streams action"]
    reward: Float64[np.ndarray, "time streams"]
    physics: Float64[np.ndarray, "time_plus_1 streams physics"]  # no columns where the environment does not tell
    seconds: float  # that it took, waiting for the policy included

    @property
    def returns(self) -> Float64[np.ndarray, " streams"]:
        """Undiscounted, NaN where the stream had failed."""
        return np.add.accumulate(self.reward, axis=0)[-1]

    @property
    def steps(self) -> Int64[np.ndarray, " streams"]:
        """Steps before the stream failed; all, if it did not."""
        return np.isfinite(self.reward).sum(axis=0)

    def streams(self, chosen: slice) -> Self:
        """The same episode of some streams."""
        arrays = {name: getattr(self, name)[:, chosen] for name in ARRAYS}
        return dataclasses.replace(self, **arrays)

    @classmethod
    def join(cls, parts: Sequence[Self], seconds: float) -> Self:
        """The streams of several groups as one batch."""
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts], 1) for name in ARRAYS}, seconds=seconds
        )


ARRAYS = ("observation", "action", "reward", "physics")
