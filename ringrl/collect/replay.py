"""Replay memory of a learner: all transitions collected so far."""

import numpy as np

from ringrl.context import Transitions
from ringrl.data.store.format import Episode
from ringrl.data.transitions import n_step_return
from ringrl.envs import Domain


class Replay:
    """Episodes in ExoRL's rows, by number. An episode may be incomplete.

    An n-step target may add the value of any state, except the last state of a terminated episode (its discount is 0).

    Args:
        domain: sizes of the arrays.
        episodes: number of episodes.
        column: the learned task among the rewards.
    """

    def __init__(self, domain: Domain, episodes: int, column: int) -> None:
        self._column = column
        self._steps = np.zeros(episodes, np.int64)  # recorded in each episode
        self._terminated = np.zeros(episodes, bool)
        rows = (episodes, domain.episode_length + 1)
        self.observation = np.zeros((*rows, domain.observation_size), np.float32)
        self.action = np.zeros((*rows, domain.action_size), np.float32)  # row t led to state t, row 0 is unused
        self.reward = np.zeros(rows, np.float32)  # of the learned task, in the same rows

    @property
    def transitions(self) -> int:
        """Number of transitions to sample from."""
        return int(self._steps.sum())

    def put(self, number: int, episode: Episode, steps: int) -> None:
        """Store an episode with `steps` recorded steps, which may be fewer than it has rows."""
        rows = slice(steps + 1)
        self.observation[number, rows], self.action[number, rows] = (
            episode["observation"][rows],
            episode["action"][rows],
        )
        self.reward[number, rows] = episode["reward"][rows, self._column]
        self._steps[number], self._terminated[number] = steps, episode["discount"][steps, 0] == 0

    def sample(self, random: np.random.Generator, shape: tuple[int, ...], n_step: int, discount: float) -> Transitions:
        """Return uniform n-step transitions, arrays (*shape, ...) float32. n shrinks at the last row of an episode."""
        ends = np.cumsum(self._steps)
        index = random.integers(ends[-1], size=shape)
        episode = np.searchsorted(ends, index, side="right")
        steps = self._steps[episode]
        row = index - ends[episode] + steps
        taken = np.minimum(n_step, steps - row)
        arrivals = row[..., None] + 1 + np.minimum(np.arange(n_step), taken[..., None] - 1)
        reward, discounts = n_step_return(self.reward[episode[..., None], arrivals], taken, discount)
        return Transitions(
            observation=self.observation[episode, row],
            action=self.action[episode, row + 1],
            reward=reward,
            discount=np.where(self._terminated[episode] & (row + taken == steps), np.float32(0), discounts),
            following=self.observation[episode, row + taken],
        )
