"""The cross-entropy method: the learner whose history a collected dataset is."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

_MEMORY = 3  # generations that an update learns from: few episodes each, so one alone would make the search rash
_ELITE_SHARE = 0.15
_LEARNING_RATE = 0.6
_FLOOR = 0.1  # the deviation never falls below this share of the first one: the search stays awake


@dataclass(frozen=True)
class CrossEntropySearch:
    """A normal distribution over a controller's parameters that moves towards those that bring high returns.

    Rubinstein 1999, "The cross-entropy method for combinatorial and continuous optimization", with smoothed updates.

    Attributes:
        mean: the distribution's mean, one number per parameter.
        deviation: its standard deviation, likewise.
        floor: the least the deviation may shrink to.
        memory: parameters and returns of the last generations.
    """

    mean: Float64[np.ndarray, " parameters"]
    deviation: Float64[np.ndarray, " parameters"]
    floor: Float64[np.ndarray, " parameters"]
    memory: tuple[tuple[Float64[np.ndarray, "number parameters"], Float64[np.ndarray, " number"]], ...] = ()

    @classmethod
    def start(
        cls, mean: Float64[np.ndarray, " parameters"], deviation: Float64[np.ndarray, " parameters"]
    ) -> "CrossEntropySearch":
        """A search that has seen nothing yet."""
        return cls(mean, deviation, _FLOOR * deviation)

    def propose(self, random: np.random.Generator, number: int) -> Float64[np.ndarray, "number parameters"]:
        """Parameters to try next."""
        return self.mean + self.deviation * random.normal(size=(number, len(self.mean)))

    def learn(
        self, parameters: Float64[np.ndarray, "number parameters"], returns: Float64[np.ndarray, " number"]
    ) -> "CrossEntropySearch":
        """The search after a generation tried parameters that brought these returns; equal returns teach nothing."""
        memory = (*self.memory, (parameters, returns))[-_MEMORY:]
        tried, brought = (np.concatenate(arrays) for arrays in zip(*memory, strict=True))
        if brought.min() == brought.max():
            return CrossEntropySearch(self.mean, self.deviation, self.floor, memory)
        number = max(2, round(_ELITE_SHARE * len(brought)))
        elite = tried[np.argsort(-brought, kind="stable")[:number]]
        mean = self.mean + _LEARNING_RATE * (elite.mean(0) - self.mean)
        deviation = self.deviation + _LEARNING_RATE * (elite.std(0) - self.deviation)
        return CrossEntropySearch(mean, np.maximum(deviation, self.floor), self.floor, memory)
