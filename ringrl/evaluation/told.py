"""What a policy is told at each step of a rollout."""

import dataclasses
from functools import partial

import jax
import numpy as np

from ringrl.context import Context, Outcome
from ringrl.data.normalisation import Normalisation


@dataclasses.dataclass(frozen=True)
class Told:
    """How steps are put to a policy: in the units, and at the places, that it knows from its training.

    Attributes:
        normalisation: the statistics it was trained with.
        target_return: what every episode asks for; None: nothing, and return-to-go and completion are always zero.
        trajectories: the trajectory index stays below this.
        prompt: a context (1, T, ...) that comes before the first step; places go on from its last one.
    """

    normalisation: Normalisation
    target_return: float | None
    trajectories: int | None = None
    prompt: Context | None = None

    @property
    def clipped_prompt(self) -> Context | None:
        """The prompt as the policy sees it."""
        if self.prompt is None or self.trajectories is None:
            return self.prompt
        return clipped(self.prompt, self.trajectories)

    def before(self, streams: int, action_size: int) -> Outcome:
        """What came before the first step: the prompt's last outcome, or nothing."""
        if self.prompt is None:
            zeros = np.zeros((streams, 1), np.float32)
            return Outcome(np.zeros((streams, 1, action_size), np.float32), zeros, zeros)
        last = Outcome(*(np.asarray(getattr(self.prompt, name))[:, -1:] for name in Outcome._fields))
        return Outcome(*(np.repeat(x, streams, axis=0) for x in last))

    def step(
        self, episode: int, timestep: int, observation: np.ndarray, earned: np.ndarray, previous: Outcome
    ) -> Context:
        """One timestep (B, 1, ...) as far as it is known before acting.

        Args:
          episode: index of the live episode.
          timestep: within it.
          observation: (B, observation); zero is told where it is NaN.
          earned: (B,) rewards of this episode so far.
          previous: outcome of the step before.
        """
        steps, trajectories = self._prompted
        index = trajectories + episode
        index = index if self.trajectories is None else min(index, self.trajectories - 1)
        constant = partial(np.full, (len(observation), 1))
        left = np.zeros_like(earned) if self.target_return is None else self.target_return - earned
        unknown = jax.tree.map(np.zeros_like, previous)
        return Context(
            observation=np.nan_to_num(self.normalisation.observation(observation), nan=0.0)[:, None],
            return_to_go=self.normalisation.return_to_go(left)[:, None],
            timestep=constant(timestep, dtype=np.int32),
            trajectory=constant(index, dtype=np.int32),
            position=constant(steps + episode * self.normalisation.episode_length + timestep, dtype=np.int32),
            weight=constant(1, dtype=np.float32),
            previous=previous,
            **unknown._asdict(),
        )

    def outcome(self, action: np.ndarray, reward: np.ndarray, earned: np.ndarray, is_last: bool) -> Outcome:
        """What a step led to: action (B, action), reward (B,), and what the episode has earned with it (B,)."""
        reached = np.zeros(len(earned), bool)
        if is_last and self.target_return is not None:
            reached = earned >= self.target_return
        scaled = self.normalisation.reward(reward[:, None].astype(np.float32))
        return Outcome(action[:, None], scaled, reached[:, None].astype(np.float32))

    @property
    def _prompted(self) -> tuple[int, int]:
        """Steps and trajectories of the prompt."""
        if self.prompt is None:
            return 0, 0
        return int(self.prompt.position[0, -1]) + 1, int(self.prompt.trajectory[0, -1]) + 1


def clipped(context: Context, trajectories: int) -> Context:
    """A context (B, T, ...) whose trajectory index stays below `trajectories`; the very same one where it does."""
    if context.trajectory.max() < trajectories:
        return context
    return context._replace(trajectory=np.minimum(context.trajectory, trajectories - 1))
