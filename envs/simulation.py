"""One MuJoCo model with its state: the part that all domains share.

Importing this module imports dm_control and MuJoCo; `ringrl.envs` does so only when a simulation is loaded.
"""

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeAlias

import numpy as np
from jaxtyping import Float, Float32, Float64, Integer

from ringrl.envs.domain import Domain, domain_named, domain_of
from ringrl.envs.goals import GoalSpace
from ringrl.envs.stacked import StackedData


@contextmanager
def _without_opengl() -> Iterator[None]:
    """Keep dm_control and MuJoCo from picking an OpenGL library on import.

    Nothing here draws: without a display that choice costs time and prints warnings, and one in MUJOCO_GL that is not
    installed ends in a traceback. Who draws in the same process imports mujoco first.
    """
    chosen = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]
        if chosen is not None:
            os.environ["MUJOCO_GL"] = chosen


with _without_opengl():
    import mujoco
    from absl import logging as absl_logging
    from dm_control import mujoco as dm_mujoco
    from dm_control.rl.control import PhysicsError


_PHYSICS = int(mujoco.mjtState.mjSTATE_PHYSICS)  # positions, velocities, activations


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what dm_control warns of in its own doing: a deprecated attribute, a failed inverse-kinematics try."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


State: TypeAlias = mujoco.MjData | StackedData
"""One MuJoCo state, or several stacked over a leading axis; what is read from it has the same leading axis."""


class Simulation(ABC):
    """One MuJoCo model and its state, stepped and read without dm_control's overhead, with dm_control's results.

    A simulation belongs to one thread. A domain gives the model (`build`), the start of an episode (`start`), how to
    read a state (`read_observation`, `read_sensors`) and the rewards of all its tasks (`reward`).

    Attributes:
        task: full task name.
        domain: the task's domain.
        physics: dm_control's physics, through which episodes are started.
        model: the MuJoCo model.
        data: the MuJoCo state.
        goals: what the domain's tasks ask to be reached; None where they ask for something else, or for more than
            a place.
    """

    goals: ClassVar[GoalSpace | None] = None

    def __init__(self, task: str) -> None:
        self.task = task
        self.domain: Domain = domain_of(task)
        with _quiet():
            self.physics = self.build()
        self.model: mujoco.MjModel = self.physics.model.ptr
        self.data: mujoco.MjData = self.physics.data.ptr
        self._warnings = self.physics.data.warning.number  # a view of MuJoCo's counters, which a reset clears
        self._substeps = round(self.domain.control_timestep / self.model.opt.timestep)
        self._runge_kutta = self.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
        lower, upper = self.model.actuator_ctrlrange.T
        self._control_center, self._control_radius = (upper + lower) / 2, (upper - lower) / 2

    @abstractmethod
    def build(self) -> dm_mujoco.Physics:
        """Compile the model of `self.task`."""

    @abstractmethod
    def start(self, random: np.random.RandomState) -> None:
        """Set the state at the start of an episode, drawing from `random` exactly as dm_control does."""

    @abstractmethod
    def read_observation(self, data: State) -> Float32[np.ndarray, "*batch observation"]:
        """The observation of a state, in ExoRL's order."""

    @abstractmethod
    def read_sensors(self, data: State) -> Float64[np.ndarray, "*batch sensors"]:
        """What the domain's rewards are computed from, read from a state."""

    @abstractmethod
    def refresh(self) -> None:
        """Compute from the physics state what `sensors` reads, and nothing more."""

    @staticmethod
    @abstractmethod
    def reward(
        task: str, sensors: Float64[np.ndarray, "*batch sensors"], action: Float[np.ndarray, "*batch action"]
    ) -> Float64[np.ndarray, "*batch"]:
        """The rewards of arriving, by `action`, in states with these `sensors`."""

    def reset(self, random: np.random.RandomState) -> None:
        """Start a new episode."""
        with _quiet(), self.physics.reset_context():
            self.start(random)

    def step(self, action: Float[np.ndarray, " action"]) -> None:
        """Hold an action in [-1, 1] for one control timestep.

        Raises:
            dm_control.rl.control.PhysicsError: the simulation became unstable.
        """
        self.advance(self.data, self.controls(action))
        if self._warnings.any():
            raise self.unstable(self._warnings)

    def controls(self, action: Float[np.ndarray, "*batch action"]) -> Float64[np.ndarray, "*batch action"]:
        """The actuators' controls of actions in [-1, 1], in the actuators' own units."""
        return self._control_center + self._control_radius * action

    def advance(self, data: mujoco.MjData, control: Float64[np.ndarray, " action"]) -> None:
        """Hold controls for one control timestep. Threads may advance different states of one model at once."""
        model = self.model
        data.ctrl[:] = control
        # As dm_control does: end on mj_step1, so that all that depends on positions and velocities belongs to the new
        # state, and start on mj_step2, because the last call has already done the first half.
        if self._runge_kutta:
            mujoco.mj_step(model, data, self._substeps)
        else:
            mujoco.mj_step2(model, data)
            if self._substeps > 1:
                mujoco.mj_step(model, data, self._substeps - 1)
        mujoco.mj_step1(model, data)

    def unstable(self, warnings: Integer[np.ndarray, " warnings"]) -> PhysicsError:
        """The error to raise when MuJoCo has counted `warnings`."""
        names = [name for name, count in zip(mujoco.mjtWarning.__members__, warnings, strict=False) if count]
        return PhysicsError(f"{self.task}: the simulation is no longer valid ({', '.join(names)})")

    def observation(self) -> Float32[np.ndarray, " observation"]:
        """The observation of the current state, in ExoRL's order."""
        return self.read_observation(self.data)

    def sensors(self) -> Float64[np.ndarray, " sensors"]:
        """What the domain's rewards are computed from, read from the current state."""
        return self.read_sensors(self.data)

    @staticmethod
    def read_physics(data: State) -> Float64[np.ndarray, "*batch physics"]:
        """A copy of the positions, velocities and activations of a state."""
        return np.concatenate((data.qpos, data.qvel, data.act), axis=-1)

    def copy_to(self, data: mujoco.MjData) -> None:
        """Copy the whole MuJoCo state to another one of this model."""
        mujoco.mj_copyData(data, self.model, self.data)

    def physics_state(self) -> Float64[np.ndarray, " physics"]:
        """A copy of the current positions, velocities and activations."""
        return self.read_physics(self.data)

    def set_physics_state(self, physics: Float64[np.ndarray, " physics"]) -> None:
        """Set the positions, velocities and activations; nothing that depends on them is recomputed."""
        mujoco.mj_setState(self.model, self.data, physics, _PHYSICS)


def simulation_class(domain: str) -> type[Simulation]:
    """The class that simulates a domain.

    Raises:
        UserError: unknown domain.
    """
    simulation: type[Simulation] = importlib.import_module(f"ringrl.envs.{domain_named(domain).name}").SIMULATION
    return simulation


def load_simulation(task: str) -> Simulation:
    """Compile the model of a task, in about 0.1 s.

    Raises:
        UserError: unknown task.
    """
    return simulation_class(domain_of(task).name)(task)
