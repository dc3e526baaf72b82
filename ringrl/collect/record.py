"""Recording of episodes in ExoRL's arrays, and of one episode of a scripted controller with noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Float64

from ringrl.collect.controllers import ParameterVector, Recipe
from ringrl.data.exorl import save_episode

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation


def start_seed(seed: int, index: int) -> int:
    """Return the seed of an episode's initial state. `ringrl.envs.make(task, start_seed)` starts in the same state."""
    return int(np.random.default_rng((seed, 2, index)).integers(2**32))


def coloured_noise(
    random: np.random.Generator, steps: int, size: int, exponent: float
) -> Float64[np.ndarray, "steps size"]:
    """Return Gaussian noise with power spectrum 1/frequency^exponent, zero mean and unit variance in expectation.

    Exponent 0 is white, 1 pink and 2 red noise. Columns are independent. The noise is drawn in the frequency domain
    (Timmer and König 1995, "On generating power law noise").
    """
    frequencies = np.fft.rfftfreq(steps)
    scale = np.zeros(len(frequencies))
    scale[1:] = frequencies[1:] ** (-exponent / 2)
    spectrum = scale[:, None] * (random.normal(size=(len(scale), size, 2)) @ np.array([1, 1j]))
    # Parseval: every frequency but the last counts twice, with real and imaginary parts of variance one.
    deviation = 2 * np.sqrt(np.sum(scale**2)) / steps
    return np.fft.irfft(spectrum, n=steps, axis=0) / deviation


class EpisodeRecording:
    """An episode that is being recorded, from the seed `start`. Until it ends, nothing else may use the simulation."""

    def __init__(self, simulation: Simulation, start: int) -> None:
        domain = simulation.domain
        rows = domain.episode_length + 1
        self.steps = 0  # taken so far
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
    def has_ended(self) -> bool:
        """Whether the last step has been taken."""
        return self.steps == self._simulation.domain.episode_length

    @property
    def observation(self) -> Float32[np.ndarray, " observation"]:
        """Observation of the current state."""
        return self._observation[self.steps]

    def step(self, action: Float[np.ndarray, " action"]) -> None:
        """Take a step and record it. The action is clipped to [-1, 1]."""
        self.steps += 1
        self._action[self.steps] = np.clip(action, -1, 1)
        self._simulation.step(self._action[self.steps])
        self._sensors.append(self._simulation.sensors())
        self._read()

    def score(self) -> None:
        """Compute the rewards of all steps since the last call."""
        rows = slice(self._scored + 1, self.steps + 1)
        sensors = np.stack(self._sensors[self._scored :])
        for column, task in enumerate(self._tasks):
            self._reward[rows, column] = self._simulation.reward(task, sensors, self._action[rows])
        self._scored = self.steps

    def episode(self) -> dict[str, np.ndarray]:
        """Return ExoRL's arrays of T+1 rows. They are complete after the last step and `score`.

        observation (T+1, O), action (T+1, A), reward (T+1, recorded tasks) and discount (T+1, 1) are float32, and
        physics (T+1, P) is float64. Row t holds state s_t with the action and the reward that led to it. Row 0 has
        zero action and reward.
        """
        return {
            "observation": self._observation,
            "action": self._action,
            "reward": self._reward,
            "discount": np.ones((len(self._reward), 1), np.float32),
            "physics": self._physics,
        }

    def save(self, folder: Path, number: int) -> None:
        """Write the episode as a file of an ExoRL archive."""
        save_episode(folder, number, self.episode())

    def _read(self) -> None:
        self._observation[self.steps] = self._simulation.observation()
        self._physics[self.steps] = self._simulation.physics_state()


def record_episode(
    simulation: Simulation, recipe: Recipe, parameters: ParameterVector, *, seed: int, index: int, noise_limit: float
) -> dict[str, np.ndarray]:
    """Run episode `index` of the collection `seed` and return its arrays, see `EpisodeRecording.episode`.

    The same arguments give the same episode in any process. `noise_limit` is the largest share of noise in the actions,
    in [0, 1].
    """
    domain = simulation.domain
    random = np.random.default_rng((seed, 0, index))
    recording = EpisodeRecording(simulation, start_seed(seed, index))
    share = random.uniform(0, noise_limit)
    noise = share * coloured_noise(random, domain.episode_length, domain.action_size, exponent=random.uniform(0, 2))
    controller = recipe.controller(simulation, parameters)
    for step in range(domain.episode_length):
        recording.step((1 - share) * np.clip(controller(step), -1, 1) + noise[step])
    recording.score()
    return recording.episode()
