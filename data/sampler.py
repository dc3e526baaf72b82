"""Contexts for training: n trajectories of a store, ordered, relabelled to a target, as one long sequence.

The batch of a step is a pure function of (seed, step): a run that is resumed, or read on other hosts, sees the same.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from ringrl.config import ContextConfig
from ringrl.context import Context
from ringrl.data.normalisation import Normalisation
from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

RETURN_RANGES = 10  # of `return_stratified`


@dataclasses.dataclass(frozen=True)
class ContextSampler:
    """Draws batches of contexts from a store.

    Each context holds `config.trajectories` distinct trajectories (2305.16554, section 3): sorted ascending by
    return, every return-to-go starts from the best trajectory's return, R_t = R_0 - sum of rewards so far, and the
    completion token is 1 on the last step of a trajectory that reaches that target.
    """

    store: EpisodeStore
    task: str
    config: ContextConfig
    normalisation: Normalisation
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.task not in self.store.tasks:
            raise UserError(
                f"{self.store.path}: is a {self.store.domain} dataset and has no rewards for task {self.task}; "
                f"it has {', '.join(self.store.tasks)}"
            )
        if len(set(self.store.lengths.tolist())) > 1:
            raise UserError(f"{self.store.path}: has episodes of several lengths; contexts need equal ones")
        if self.config.trajectories > len(self.eligible()):
            raise UserError(
                f"context.trajectories: {self.config.trajectories} do not fit the {len(self.eligible())} eligible "
                f"episodes of {self.store.path}; ask for fewer or raise context.best_fraction"
            )

    def eligible(self) -> Int[np.ndarray, " episodes"]:
        """Episodes that may be drawn, in the order they were collected."""
        return best_episodes(self.store, self.task, self.config.best_fraction)

    @property
    def steps_per_batch(self) -> int:
        """Timesteps in a batch."""
        return self.batch_size * self.config.trajectories * int(self.store.lengths[0])

    def batch(self, step: int) -> Context:
        """The batch of contexts of an optimiser step, every array (batch_size, trajectories * T, ...)."""
        random = np.random.default_rng([self.seed, step])
        episodes = self.eligible()
        weights = self._weights(episodes)
        contexts = [self._context(self._draw(random, episodes, weights)) for _ in range(self.batch_size)]
        return Context(*(np.stack(arrays) for arrays in zip(*contexts, strict=True)))

    def _weights(self, episodes: np.ndarray) -> Float[np.ndarray, " episodes"]:
        if self.config.sampling == "uniform":
            return np.full(len(episodes), 1 / len(episodes))
        returns = self.store.returns(self.task)[episodes]
        edges = np.linspace(returns.min(), returns.max(), RETURN_RANGES + 1)[1:-1]
        ranges = np.digitize(returns, edges)
        weights = 1 / np.bincount(ranges, minlength=RETURN_RANGES)[ranges]
        return weights / weights.sum()

    def _draw(self, random: np.random.Generator, episodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        chosen = random.choice(episodes, self.config.trajectories, replace=False, p=weights)
        if self.config.order == "ascending":
            return chosen[np.argsort(self.store.returns(self.task)[chosen], kind="stable")]
        return np.sort(chosen) if self.config.order == "history" else chosen

    def _context(self, episodes: np.ndarray) -> Context:
        returns = self.store.returns(self.task)[episodes]
        best = returns.max()
        targets = np.full(len(returns), best) if self.config.target == "best" else returns
        parts = [
            trajectory(self.store, self.task, self.normalisation, int(episode), float(target), index)
            for index, (episode, target) in enumerate(zip(episodes, targets, strict=True))
        ]
        return Context(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def best_episodes(store: EpisodeStore, task: str, fraction: float) -> Int[np.ndarray, " episodes"]:
    """The given fraction of a store's episodes, at least one: those of highest return, in the order of collection."""
    returns = store.returns(task)
    count = max(1, round(fraction * len(returns)))
    return np.sort(np.argsort(returns, kind="stable")[len(returns) - count :])


def trajectory(
    store: EpisodeStore, task: str, normalisation: Normalisation, episode: int, target: float, index: int
) -> Context:
    """One episode of a store as the steps of a context (no batch axis), its return-to-go starting from `target`."""
    rows = store.episode(episode)
    reward = rows[f"reward/{task}"][1:]
    length = len(reward)
    earned = np.cumsum(reward, dtype=np.float64)
    completion = np.zeros(length, np.float32)
    completion[-1] = float(store.returns(task)[episode]) >= target
    return Context(
        observation=normalisation.observation(rows["observation"][:-1]),
        action=rows["action"][1:],
        reward=reward,
        return_to_go=normalisation.return_to_go(target - np.concatenate([[0.0], earned[:-1]])),
        completion=completion,
        timestep=np.arange(length, dtype=np.int32),
        trajectory=np.full(length, index, np.int32),
    )
