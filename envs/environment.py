"""The Gymnasium environment of a task."""

from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float, Float32, UInt8

from ringrl.envs.foreign import ForeignEnv, is_foreign
from ringrl.envs.registry import domain_of, load_simulation
from ringrl.errors import UserError

_Observation = Float32[np.ndarray, " observation"]


class ExoRLEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """An ExoRL task: float32 observations in ExoRL's order, float32 actions in [-1, 1], reward in [0, 1] per step.

    Episodes are truncated after `domain.episode_length` steps and never terminate. `info["physics"]` is the float64
    physics state (positions, velocities, activations), as ExoRL records it. `reset` without a seed continues the
    stream of starts. With `render_mode="rgb_array"`, `render` returns images.

    Raises:
        UserError: unknown task, another render mode, or a seed outside 0 .. 2**32 - 1.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self, task: str, seed: int | None = None, render_mode: str | None = None) -> None:
        self.task = task
        self.domain = domain_of(task)
        if render_mode not in (None, "rgb_array"):
            raise UserError(f"{task}: render_mode is {render_mode!r}, it must be 'rgb_array' or None")
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / self.domain.control_timestep)}
        self._random = random_stream(seed)
        self._simulation = load_simulation(task)
        self._steps: int | None = None
        self.observation_space, self.action_space = self.domain.spaces()

    def __repr__(self) -> str:
        sizes = f"observation {self.observation_space.shape}, action {self.action_space.shape}"
        return f"ExoRLEnv({self.task}, {sizes}, {self.domain.episode_length} steps)"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Observation, dict[str, Any]]:
        """Start an episode. A seed begins a new stream of starts. UserError for a seed outside 0 .. 2**32 - 1."""
        if seed is not None:
            self._random = random_stream(seed)
        super().reset(seed=seed)
        self._simulation.reset(self._random)
        self._steps = 0
        return self._simulation.observation(), {"physics": self._simulation.physics_state()}

    def step(self, action: Float[np.ndarray, " action"]) -> tuple[_Observation, float, bool, bool, dict[str, Any]]:
        """Hold an action, clipped to [-1, 1], for one control timestep.

        Raises:
            UserError: the action has another shape than the action space, or is not finite.
            gymnasium.error.ResetNeeded: no episode has been started, or the last one has ended.
            dm_control.rl.control.PhysicsError: the simulation became unstable.
        """
        if self._steps is None or self._steps >= self.domain.episode_length:
            raise gymnasium.error.ResetNeeded(f"{self.task}: call reset() before the first step of an episode")
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise UserError(f"{self.task}: the action has shape {action.shape}, expected {self.action_space.shape}")
        if not np.isfinite(action).all():
            raise UserError(f"{self.task}: the action of step {self._steps} is not finite: {action}")
        action = np.clip(action, -1.0, 1.0)
        self._simulation.step(action)
        self._steps += 1
        reward = float(self._simulation.reward(self.task, self._simulation.sensors(), action))
        truncated = self._steps == self.domain.episode_length
        return self._simulation.observation(), reward, False, truncated, {"physics": self._simulation.physics_state()}

    def render(self) -> UInt8[np.ndarray, "height width 3"]:
        """Return an image of the current state (360, 480, 3). UserError without a render mode or OpenGL.

        The environment variable MUJOCO_GL selects the OpenGL library, by default EGL on Linux.
        """
        if self.render_mode is None:
            raise UserError(f"{self.task}: cannot render; make the environment with render_mode='rgb_array'")
        from ringrl.envs.render import shared_renderer  # imports OpenGL

        return shared_renderer(self.task).scene(self._simulation.physics_state())


def random_stream(seed: int | None) -> np.random.RandomState:
    """Return the generator from which dm_control draws the starts. UserError for a seed outside 0 .. 2**32 - 1."""
    try:
        return np.random.RandomState(seed)
    except (TypeError, ValueError):
        raise UserError(f"the seed is {seed!r}, it must be an integer in 0 .. 2**32 - 1") from None


def make(task: str, seed: int | None = None, render_mode: str | None = None) -> ExoRLEnv | ForeignEnv:
    """Make the environment of a task such as "walker_walk" or "gymnasium:Hopper-v5".

    Args:
        task: one of `ringrl.envs.TASKS`, or "gymnasium:" and the id of a registered environment.
        seed: seed of the episodes' starts. None: from the operating system.
        render_mode: "rgb_array": `render` returns images. None: no rendering.

    Raises:
        UserError: unknown task (the message lists similar names), another render mode, a seed outside
            0 .. 2**32 - 1, or as `ForeignEnv`.
    """
    return ForeignEnv(task, seed, render_mode) if is_foreign(task) else ExoRLEnv(task, seed, render_mode)
