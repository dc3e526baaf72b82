"""Batches of n-step transitions for TD3. A batch is a pure function of (seed, step)."""

import dataclasses
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int

from ringrl.config import ActorCriticConfig
from ringrl.context import Transitions
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import NONE, Episodes, eligible_episodes
from ringrl.data.store import EpisodeStore
from ringrl.data.store.format import reward_key


def n_step_return(
    rewards: Float[np.ndarray, "*batch n"], taken: Int[np.ndarray, "*batch"], discount: float
) -> tuple[Float32[np.ndarray, "*batch"], Float32[np.ndarray, "*batch"]]:
    """Return the discounted sum of the first `taken` of n rewards, and the discount of the value after them."""
    steps = np.arange(rewards.shape[-1])
    total = np.where(steps < taken[..., None], rewards * discount**steps, 0).sum(-1)
    return total.astype(np.float32), (discount**taken).astype(np.float32)


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
        random = np.random.default_rng([self.seed, step])
        row, end = self._draw(random)
        last = np.minimum(row + self.config.n_step, end)
        arrivals = row[:, None] + 1 + np.arange(self.config.n_step)  # row t + 1 holds the action taken in state t
        rewards = self.store.arrays[reward_key(self.task)][np.minimum(arrivals, end[:, None])]
        taken = last - row
        reward, discount = n_step_return(self.normalisation.reward(rewards), taken, self.config.discount)
        observation, action = self.store.arrays["observation"], self.store.arrays["action"]
        return Transitions(
            observation=self.normalisation.observation(observation[row]),
            action=action[row + 1],
            reward=reward,
            # No value follows a termination. ExoRL episodes never terminate.
            discount=discount * (self.store.arrays["discount"][last, 0] != 0),
            following=self.normalisation.observation(observation[last]),
        )

    def _draw(self, random: np.random.Generator) -> tuple[Int[np.ndarray, " batch"], Int[np.ndarray, " batch"]]:
        """Return random rows with an action, and the last rows of their episodes."""
        episodes, steps = self._episodes, self._steps_before
        index = random.integers(steps[-1], size=self.batch_size)
        number = np.searchsorted(steps, index, side="right") - 1
        first, past = self.store.offsets[episodes[number]], self.store.offsets[episodes[number] + 1]
        return first + index - steps[number], past - 1

    @cached_property
    def _episodes(self) -> Int[np.ndarray, " episodes"]:
        selection = self.max_transitions, self.best_fraction, self.excluded
        return eligible_episodes(self.store, self.task, self.seed, *selection)

    @cached_property
    def _steps_before(self) -> Int[np.ndarray, " episodes_plus_1"]:
        return np.concatenate([[0], np.cumsum(self.store.lengths[self._episodes])])
