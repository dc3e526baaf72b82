"""Recording of episodes in ExoRL's arrays, and of one episode of a scripted controller with noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from ringrl.collect.controllers import ParameterVector, Recipe
from ringrl.data.exorl import save_episode
from ringrl.data.store.format import recorded_arrays
from ringrl.envs import Domain, ForeignEnv
from ringrl.errors import UserError, brief

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation


def start_seed(seed: int, index: int) -> int:
    """Return the seed of an episode's initial state. `ringrl.envs.make(task, start_seed)` starts in the same state."""
    return int(np.random.default_rng((seed, 2, index)).integers(2**32))


def coloured_noise(
    random: np.random.Generator, steps: int, size: int, exponent: float
) -> Float64[np.ndarray, "steps size"]:
    """Return Gaussian noise with power spectrum 1/frequency^exponent, zero mean and unit variance in expectation.

    Columns are independent. The noise is drawn in the frequency domain (Timmer and König 1995).
    """
    frequencies = np.fft.rfftfreq(steps)
    scale = np.zeros(len(frequencies))
    scale[1:] = frequencies[1:] ** (-exponent / 2)
    spectrum = scale[:, None] * (random.normal(size=(len(scale), size, 2)) @ np.array([1, 1j]))
    # Parseval: every frequency but the last counts twice, with real and imaginary parts of variance one.
    deviation = 2 * np.sqrt(np.sum(scale**2)) / steps
    return np.fft.irfft(spectrum, n=steps, axis=0) / deviation


class Recording(ABC):
    """An episode that is being recorded. Until it ends, nothing else may use the environment."""

    def __init__(self, domain: Domain) -> None:
        self.steps, self.has_ended = 0, False
        arrays, length = recorded_arrays(domain).items(), domain.episode_length + 1
        self._rows = {name: np.zeros((length, spec.width), spec.dtype) for name, spec in arrays}
        self._rows["discount"][:] = 1

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """ExoRL's arrays of T+1 rows. Row t holds state s_t with the action and the reward that led to it.

        Row 0 has zero action and reward. Rows after the last step are unused.
        """
        return self._rows

    @property
    def observation(self) -> Float32[np.ndarray, " observation"]:
        """Observation of the current state."""
        return self._rows["observation"][self.steps]

    def step(self, action: Float[np.ndarray, " action"]) -> None:
        """Take a step and record it. The action is clipped to [-1, 1]. Nothing happens after the end."""
        if not self.has_ended:
            self._step(np.clip(action, -1, 1).astype(np.float32))

    @abstractmethod
    def _step(self, action: Float32[np.ndarray, " action"]) -> None: ...

    @abstractmethod
    def save(self, folder: Path, number: int) -> None:
        """Write the episode to a file."""

    def _put(self, **values: Any) -> None:
        """Set the current row."""
        for name, value in values.items():
            self._rows[name][self.steps] = value


class EpisodeRecording(Recording):
    """A recording of a simulation from the seed `start`, in the file of an ExoRL archive."""

    def __init__(self, simulation: Simulation, start: int) -> None:
        super().__init__(simulation.domain)
        self._simulation = simulation
        self._sensors: list[np.ndarray] = []  # of the steps without reward
        simulation.reset(np.random.RandomState(start))
        self._put(observation=simulation.observation(), physics=simulation.physics_state())

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """As in every recording. Rewards are computed here, for all steps since the last access at once."""
        if self._sensors:
            simulation, rows = self._simulation, slice(self.steps + 1 - len(self._sensors), self.steps + 1)
            for column, task in enumerate(simulation.domain.recorded_tasks(simulation.task)):
                reward = simulation.reward(task, np.stack(self._sensors), self._rows["action"][rows])
                self._rows["reward"][rows, column] = reward
            self._sensors.clear()
        return self._rows

    def _step(self, action: Float32[np.ndarray, " action"]) -> None:
        simulation = self._simulation
        simulation.step(action)
        self.steps += 1
        self.has_ended = self.steps == simulation.domain.episode_length
        self._sensors.append(simulation.sensors())
        self._put(action=action, observation=simulation.observation(), physics=simulation.physics_state())

    def save(self, folder: Path, number: int) -> None:
        save_episode(folder, number, self.rows)


class ForeignRecording(Recording):
    """A recording of an environment of another package from the seed `start`, in a file for `--format npz`.

    The file has T + 1 observations, T actions as the environment takes them and T rewards. If the environment raises an
    exception or gives a number that is not finite, a UserError names the step.
    """

    def __init__(self, environment: ForeignEnv, start: int) -> None:
        super().__init__(environment.domain)
        self._environment, self._start = environment, start
        self._put(observation=self._call("reset", seed=start)[0])

    def _step(self, action: Float32[np.ndarray, " action"]) -> None:
        observation, reward, terminated, truncated, _ = self._call("step", action)
        self.steps, self.has_ended = self.steps + 1, terminated or truncated
        self._put(observation=observation, action=action, reward=reward, discount=not terminated)

    def save(self, folder: Path, number: int) -> None:
        steps, rows = slice(1, self.steps + 1), self.rows
        for old in folder.glob(f"episode_{number:06d}_*.npz"):  # of another length, from before an interruption
            old.unlink()
        save_episode(folder, number, {
            "observation": rows["observation"][: self.steps + 1],
            "action": self._environment.domain.taken(rows["action"][steps]),
            "reward": rows["reward"][steps, 0],
            "terminated": rows["discount"][steps, 0] == 0,
        })  # fmt: skip

    def _call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        try:
            observation, *others = getattr(self._environment, name)(*arguments, **keywords)
            if not np.isfinite(np.append(observation, others[0] if name == "step" else 0.0)).all():
                raise ValueError("its observation or reward is not finite")
            return observation, *others
        except (Exception, SystemExit) as error:  # an environment may raise anything
            where = f"{self._environment.task}: {name} {self.steps} of the episode from seed {self._start}"
            raise UserError(
                f"{where} failed ({type(error).__name__}: {brief(error)}); correct the environment"
            ) from error


def record_episode(
    simulation: Simulation, recipe: Recipe, parameters: ParameterVector, *, seed: int, index: int, noise_limit: float
) -> dict[str, np.ndarray]:
    """Return the `rows` of an episode of a collection. At most a share of `noise_limit` of its actions is noise."""
    domain = simulation.domain
    random = np.random.default_rng((seed, 0, index))
    recording = EpisodeRecording(simulation, start_seed(seed, index))
    share = random.uniform(0, noise_limit)
    noise = share * coloured_noise(random, domain.episode_length, domain.action_size, exponent=random.uniform(0, 2))
    controller = recipe.controller(simulation, parameters)
    for step in range(domain.episode_length):
        recording.step((1 - share) * np.clip(controller(step), -1, 1) + noise[step])
    return recording.rows
