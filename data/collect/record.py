"""Episodes as ExoRL would have recorded them, and one of a controller under noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Float64

from ringrl.data.collect.noise import coloured_noise
from ringrl.data.collect.recipe import Recipe

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation


def start_seed(seed: int, index: int) -> int:
    """The seed of an episode's start: `ringrl.envs.make(task, start_seed)` starts its first in the same state."""
    return int(np.random.default_rng((seed, 2, index)).integers(2**32))


@dataclass(frozen=True)
class Plan:
    """All that decides an episode: whoever records it, wherever and whenever, records the same.

    Attributes:
        index: the episode's number in the collection.
        seed: the collection's seed.
        parameters: those of the controller.
        noise_limit: the largest share of noise in the actions, in [0, 1].
    """

    index: int
    seed: int
    parameters: Float64[np.ndarray, " parameters"]
    noise_limit: float

    @property
    def start_seed(self) -> int:
        """See the function of this name."""
        return start_seed(self.seed, self.index)


class Recording:
    """An episode in the making, on a simulation that it alone uses until it is over.

    Attributes:
        steps: how many have been taken.
    """

    def __init__(self, simulation: Simulation, start: int) -> None:
        """Starts an episode from the seed `start`."""
        domain = simulation.domain
        rows = domain.episode_length + 1
        self.steps = 0
        self._simulation = simulation
        self._tasks = domain.recorded_tasks(simulation.task)
        self._sensors: list[np.ndarray] = []
        self._scored = 0
        self._observation = np.empty((rows, domain.observation_size), np.float32)
        self._physics = np.empty((rows, domain.physics_size), np.float64)
        self._action = np.zeros((rows, domain.action_size), np.float32)
        self._reward = np.zeros((rows, len(self._tasks)), np.float32)
        simulation.reset(np.random.RandomState(start))
        self._read()

    @property
    def observation(self) -> Float32[np.ndarray, " observation"]:
        """That of the present state."""
        return self._observation[self.steps]

    def step(self, action: Float[np.ndarray, " action"]) -> None:
        """Takes a step and records it; what lies outside [-1, 1] is clipped."""
        self.steps += 1
        self._action[self.steps] = np.clip(action, -1, 1)
        self._simulation.step(self._action[self.steps])
        self._sensors.append(self._simulation.sensors())
        self._read()

    def score(self) -> None:
        """Computes the rewards of the steps since the last call, all at once."""
        rows = slice(self._scored + 1, self.steps + 1)
        sensors = np.stack(self._sensors[self._scored :])
        for column, task in enumerate(self._tasks):
            self._reward[rows, column] = self._simulation.reward(task, sensors, self._action[rows])
        self._scored = self.steps

    def episode(self) -> dict[str, np.ndarray]:
        """ExoRL's arrays of T+1 rows, all of them filled once the episode is over and scored.

        observation (T+1, O), action (T+1, A), reward (T+1, 1 or one column per recorded task) and discount (T+1, 1)
        float32, physics (T+1, P) float64; row t is the state s_t with the action and the reward that led to it, row 0
        the start with zeros for both.
        """
        return {
            "observation": self._observation,
            "action": self._action,
            "reward": self._reward,
            "discount": np.ones((len(self._reward), 1), np.float32),
            "physics": self._physics,
        }

    def _read(self) -> None:
        self._observation[self.steps] = self._simulation.observation()
        self._physics[self.steps] = self._simulation.physics_state()


def record_episode(simulation: Simulation, recipe: Recipe, plan: Plan) -> dict[str, np.ndarray]:
    """Runs an episode of a controller and returns its arrays; see `Recording.episode`."""
    domain = simulation.domain
    random = np.random.default_rng((plan.seed, 0, plan.index))
    recording = Recording(simulation, plan.start_seed)
    share = random.uniform(0, plan.noise_limit)
    noise = share * coloured_noise(random, domain.episode_length, domain.action_size, exponent=random.uniform(0, 2))
    controller = recipe.controller(simulation, plan.parameters)
    for step in range(domain.episode_length):
        recording.step((1 - share) * np.clip(controller(step), -1, 1) + noise[step])
    recording.score()
    return recording.episode()
