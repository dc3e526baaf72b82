"""Batches of n-step transitions for TD3, with hindsight goals. A batch is a pure function of (seed, step)."""

import dataclasses
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int

from ringrl.config import ActorCriticConfig
from ringrl.context import Transitions
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import NONE, Episodes, eligible_episodes, subset
from ringrl.data.store import EpisodeStore
from ringrl.data.store.format import reward_key
from ringrl.envs import GoalSpace
from ringrl.errors import UserError

FARTHEST = 1.0  # metres; distances are clipped here in `distance_cost`


def n_step_return(
    rewards: Float[np.ndarray, "*batch n"], taken: Int[np.ndarray, "*batch"], discount: float
) -> tuple[Float32[np.ndarray, "*batch"], Float32[np.ndarray, "*batch"]]:
    """Return the discounted sum of the first `taken` of n rewards, and the discount of the value after them."""
    steps = np.arange(rewards.shape[-1])
    total = np.where(steps < taken[..., None], rewards * discount**steps, 0).sum(-1)
    return total.astype(np.float32), (discount**taken).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TransitionSampler:
    """Sampler of n-step transitions, uniform over the steps of the eligible episodes (see `eligible_episodes`).

    If the task has a goal position, a share of the transitions is relabelled with other goals (hindsight experience
    replay, 1707.01495): positions later in the same episode, or positions in the data near the task's goal. Rewards are
    then computed from the observed positions by the task's formula.
    """

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
        hindsight = self.config.hindsight
        if self.goals is None and (hindsight.later or hindsight.nearby or hindsight.distance_cost):
            raise UserError(
                f"actor_critic.hindsight: {self.task} has no goal position; set later, nearby and distance_cost to 0"
            )
        if self.goals and {*range(self.store.observation_size)[self.goals.observation]} & {*self.normalisation.ignored}:
            raise UserError(
                f"ignored_observations: {self.task} needs the position that moves to the goal; "
                f"keep {self.goals.observation.start} to {self.goals.observation.stop - 1}"
            )
        if hindsight.nearby and len(self._nearby) == 0:
            raise UserError(
                f"actor_critic.hindsight.radius: {self.store.path} has no position within {hindsight.radius:g} m of "
                f"the goal of {self.task}; raise the radius, or set nearby to 0"
            )

    @property
    def goals(self) -> GoalSpace | None:
        """Goal positions of the domain's tasks, or None if the domain has none or is not an ExoRL domain."""
        return self.store.facts.goals

    def batch(self, step: int) -> Transitions:
        """Return the transitions of an optimiser step."""
        random = np.random.default_rng([self.seed, step])
        row, end = self._draw(random)
        goal = self._draw_goals(random, row, end)
        last = np.minimum(row + self.config.n_step, end)
        arrivals = row[:, None] + 1 + np.arange(self.config.n_step)  # row t + 1 holds the action taken in state t
        rewards = self._rewards(np.minimum(arrivals, end[:, None]), goal[:, None])
        reward, discount = n_step_return(rewards, last - row, self.config.discount)
        observation, action = self.store.arrays["observation"], self.store.arrays["action"]
        return Transitions(
            observation=self.normalisation.observation(observation[row]),
            action=action[row + 1],
            reward=reward,
            # No value follows a termination. ExoRL episodes never terminate.
            discount=discount * (self.store.arrays["discount"][last, 0] != 0),
            following=self.normalisation.observation(observation[last]),
            goal=goal,
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

    def _draw_goals(
        self, random: np.random.Generator, row: Int[np.ndarray, " batch"], end: Int[np.ndarray, " batch"]
    ) -> Float32[np.ndarray, "batch goal"]:
        if self.goals is None:
            return np.empty((len(row), 0), np.float32)
        hindsight = self.config.hindsight
        goal = np.tile(self._task_goal, (len(row), 1))
        share = random.random(len(row))
        later = share < hindsight.later
        ahead = random.geometric(1 / hindsight.steps_ahead, len(row))
        goal[later] = self._positions[np.minimum(row + ahead, end)[later]]
        nearby = ~later & (share < hindsight.later + hindsight.nearby)
        if nearby.any():
            goal[nearby] = self._nearby[random.integers(len(self._nearby), size=int(nearby.sum()))]
        return goal

    @property
    def _task_goal(self) -> Float32[np.ndarray, " goal"]:
        assert self.goals is not None
        return np.array(self.goals.goals[self.task], np.float32)

    @cached_property
    def _positions(self) -> Float32[np.ndarray, "rows goal"]:
        """Positions of every row of the store, a view."""
        assert self.goals is not None
        return self.store.arrays["observation"][:, self.goals.observation]

    @cached_property
    def _nearby(self) -> Float32[np.ndarray, "positions goal"]:
        offsets = self.store.offsets
        episodes = subset(self.store, self.seed, self.max_transitions, self.excluded)
        positions = np.concatenate([self._positions[offsets[i] : offsets[i + 1]] for i in episodes])
        distance = np.linalg.norm(positions - self._task_goal, axis=-1)
        return positions[distance < self.config.hindsight.radius]

    def _rewards(
        self, rows: Int[np.ndarray, "batch n"], goal: Float32[np.ndarray, "batch 1 goal"]
    ) -> Float[np.ndarray, "batch n"]:
        """Return the rewards of reaching these rows."""
        if self.goals is None:
            return self.normalisation.reward(self.store.arrays[reward_key(self.task)][rows])
        positions = self._positions[rows].astype(np.float64)
        distance = np.linalg.norm(positions - goal, axis=-1)
        return self.goals.reward(positions, goal) - self.config.hindsight.distance_cost * np.minimum(distance, FARTHEST)
