"""The learner's memory: every transition of the collection so far, which is to say the dataset as it grows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from ringrl.data.collect.td3 import Batch
from ringrl.data.schema import Episode
from ringrl.envs import Domain


class Replay:
    """Episodes in the order of their numbers, in ExoRL's rows; rounds of them grow side by side.

    Memory is taken as it is filled. Episodes are never terminated, so every state may be followed by a value.

    Attributes:
        observation: (episodes, T+1, O) float32.
        action: (episodes, T+1, A) float32; row t is the action that led to state t, row 0 nothing.
        reward: (episodes, T+1) float32, likewise, of the task that is learned.
    """

    def __init__(self, domain: Domain, episodes: int) -> None:
        self._steps = domain.episode_length
        rows = (episodes, self._steps + 1)
        self.observation = np.zeros((*rows, domain.observation_size), np.float32)
        self.action = np.zeros((*rows, domain.action_size), np.float32)
        self.reward = np.zeros(rows, np.float32)
        self._first, self._growing, self._grown = 0, 0, 0

    @property
    def transitions(self) -> int:
        """How many there are to sample from."""
        return self._first * self._steps + self._growing * self._grown

    def grow(self, first: int, number: int, steps: int) -> None:
        """Says what is filled: the episodes before `first`, and the first `steps` of the `number` that follow."""
        self._first, self._growing, self._grown = first, number, steps

    def put(self, number: int, episode: Episode, column: int) -> None:
        """Fills in an episode, or one as far as it has come; `column` is that of the reward that is learned."""
        self.observation[number], self.action[number] = episode["observation"], episode["action"]
        self.reward[number] = episode["reward"][:, column]

    def sample(self, random: np.random.Generator, shape: tuple[int, ...], steps: int, discount: float) -> Batch:
        """Transitions drawn uniformly, each over `steps` steps or as many as its episode has had since.

        Arrays (*shape, ...) float32; see `Batch`.
        """
        index = random.integers(self.transitions, size=shape)
        whole = self._first * self._steps
        beyond = np.maximum(index - whole, 0)
        grown = max(self._grown, 1)
        is_whole = index < whole
        episode = np.where(is_whole, index // self._steps, self._first + beyond // grown)
        row = np.where(is_whole, index % self._steps, beyond % grown)
        length = np.where(is_whole, self._steps, self._grown)
        taken = np.minimum(steps, length - row)
        return Batch(
            observation=jnp.asarray(self.observation[episode, row]),
            action=jnp.asarray(self.action[episode, row + 1]),
            reward=jnp.asarray(self._discounted(episode, row, taken, steps, discount)),
            discount=jnp.asarray((discount**taken).astype(np.float32)),
            following=jnp.asarray(self.observation[episode, row + taken]),
        )

    def _discounted(
        self, episode: np.ndarray, row: np.ndarray, taken: np.ndarray, steps: int, discount: float
    ) -> Float32[np.ndarray, "*shape"]:
        rewards = np.zeros(row.shape)
        for step in range(steps):
            reward = self.reward[episode, row + 1 + np.minimum(step, taken - 1)]
            rewards += np.where(step < taken, discount**step * reward, 0)
        return rewards.astype(np.float32)
