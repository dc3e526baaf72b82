"""Batches of n-step transitions for TD3. A batch is a pure function of (seed, step)."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int

from ringrl.config import ActorCriticConfig
from ringrl.context import Transitions
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import NONE, Episodes, eligible_episodes
from ringrl.data.store import EpisodeStore
from ringrl.data.store.format import reward_key


def n_step_transitions(
    arrays: Mapping[str, np.ndarray],
    reward: Float32[np.ndarray, " rows"],
    row: Int[np.ndarray, "*batch"],
    end: Int[np.ndarray, "*batch"],
    config: ActorCriticConfig,
    normalisation: Normalisation,
) -> Transitions:
    """Return transitions of `config.n_step` steps, or fewer at the end of an episode, arrays (*batch, ...) float32.

    Args:
        arrays: observation, action and discount over all rows of all episodes, as in a store.
        reward: the reward of each row.
        row, end: the row of each transition's first state, and the last row of its episode.
    """
    last = np.minimum(row + config.n_step, end)
    steps = np.arange(config.n_step)
    arrivals = np.minimum(row[..., None] + 1 + steps, end[..., None])  # row t + 1 holds the action taken in state t
    is_taken = steps < (last - row)[..., None]
    rewards = np.where(is_taken, normalisation.reward(reward[arrivals]) * config.discount**steps, 0)
    # No value follows a termination. ExoRL episodes never terminate.
    discount = config.discount ** (last - row) * (arrays["discount"][last, 0] != 0)
    return Transitions(
        observation=normalisation.observation(arrays["observation"][row]),
        action=arrays["action"][row + 1],
        reward=rewards.sum(-1).astype(np.float32),
        discount=discount.astype(np.float32),
        following=normalisation.observation(arrays["observation"][last]),
    )


@dataclasses.dataclass(frozen=True)
class TransitionSampler:
    """Sampler of n-step transitions, uniform over the steps of the eligible episodes (see `eligible_episodes`)."""

    store: EpisodeStore
    task: str
    config: ActorCriticConfig
    normalisation: Normalisation
    batch_size: int
    seed: int
    best_fraction: float = 1.0
    max_transitions: int | None = None
    excluded: Episodes = dataclasses.field(default_factory=NONE.copy)  # never drawn

    def __post_init__(self) -> None:
        self.store.returns(self.task)  # a UserError if the store has no such task

    def batch(self, step: int) -> Transitions:
        """Return the transitions of an optimiser step."""
        episodes, steps = self._episodes, self._steps_before
        index = np.random.default_rng([self.seed, step]).integers(steps[-1], size=self.batch_size)
        number = np.searchsorted(steps, index, side="right") - 1
        row = self.store.offsets[episodes[number]] + index - steps[number]
        end = self.store.offsets[episodes[number] + 1] - 1
        arrays, reward = self.store.arrays, self.store.arrays[reward_key(self.task)]
        return n_step_transitions(arrays, reward, row, end, self.config, self.normalisation)

    @cached_property
    def _episodes(self) -> Int[np.ndarray, " episodes"]:
        selection = self.max_transitions, self.best_fraction, self.excluded
        return eligible_episodes(self.store, self.task, self.seed, *selection)

    @cached_property
    def _steps_before(self) -> Int[np.ndarray, " episodes_plus_1"]:
        return np.concatenate([[0], np.cumsum(self.store.lengths[self._episodes])])
