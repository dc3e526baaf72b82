"""Replay memory of a learner: all transitions collected so far."""

import numpy as np

from ringrl.context import Transitions
from ringrl.data.store.format import Episode
from ringrl.data.transitions import n_step_return
from ringrl.envs import Domain


class Replay:
    """Episodes in ExoRL's rows, in order of their numbers. The last few episodes grow in parallel.

    Episodes never terminate, so every state may be followed by a value. `column`: the learned task among the rewards.
    """

    def __init__(self, domain: Domain, episodes: int, column: int) -> None:
        self._steps, self._column = domain.episode_length, column
        rows = (episodes, self._steps + 1)
        self.observation = np.zeros((*rows, domain.observation_size), np.float32)
        self.action = np.zeros((*rows, domain.action_size), np.float32)  # row t led to state t, row 0 is unused
        self.reward = np.zeros(rows, np.float32)  # of the learned task, in the same rows
        self._first, self._growing, self._grown = 0, 0, 0

    @property
    def transitions(self) -> int:
        """Number of transitions to sample from."""
        return self._first * self._steps + self._growing * self._grown

    def grow(self, first: int, number: int, steps: int) -> None:
        """Set the filled part: all episodes before `first`, and `steps` steps of the next `number` episodes."""
        self._first, self._growing, self._grown = first, number, steps

    def put(self, number: int, episode: Episode) -> None:
        """Store an episode, or its rows so far."""
        self.observation[number], self.action[number] = episode["observation"], episode["action"]
        self.reward[number] = episode["reward"][:, self._column]

    def sample(self, random: np.random.Generator, shape: tuple[int, ...], n_step: int, discount: float) -> Transitions:
        """Return uniform n-step transitions, arrays (*shape, ...) float32. n shrinks at the last row of an episode."""
        index = random.integers(self.transitions, size=shape)
        whole = self._first * self._steps
        beyond = np.maximum(index - whole, 0)
        grown = max(self._grown, 1)
        is_whole = index < whole
        episode = np.where(is_whole, index // self._steps, self._first + beyond // grown)
        row = np.where(is_whole, index % self._steps, beyond % grown)
        taken = np.minimum(n_step, np.where(is_whole, self._steps, self._grown) - row)
        steps = np.minimum(np.arange(n_step), taken[..., None] - 1)
        rewards = self.reward[episode[..., None], row[..., None] + 1 + steps]
        reward, discounts = n_step_return(rewards, taken, discount)
        return Transitions(
            observation=self.observation[episode, row],
            action=self.action[episode, row + 1],
            reward=reward,
            discount=discounts,
            following=self.observation[episode, row + taken],
            goal=np.zeros((*shape, 0), np.float32),
        )
