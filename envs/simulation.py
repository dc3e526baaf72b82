"""One MuJoCo model and its state: what all domains share. The first simulation imports MuJoCo."""

from __future__ import annotations

import importlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from jaxtyping import Float, Float32, Float64

from ringrl.envs.domain import Domain
from ringrl.errors import UserError

if TYPE_CHECKING:
    import mujoco
    from dm_control import mujoco as dm_mujoco

Observations: TypeAlias = Float32[np.ndarray, "*batch observation"]
Sensors: TypeAlias = Float64[np.ndarray, "*batch sensors"]
Actions: TypeAlias = Float[np.ndarray, "*batch action"]
Rewards: TypeAlias = Float64[np.ndarray, "*batch"]
State: TypeAlias = "mujoco.MjData | StackedData"
"""One MuJoCo state, or several states stacked over a leading axis. Arrays read from it have the same leading axis."""


def check_mujoco() -> None:
    """Raise UserError unless MuJoCo >=3.17,<4 is installed: with MuJoCo 4, dm_control 1.0 cannot load models."""
    fix = "run: pip install 'mujoco>=3.17,<4'"
    try:
        version = metadata.version("mujoco")
    except metadata.PackageNotFoundError:
        raise UserError(f"MuJoCo is not installed, and the environments need it; {fix}") from None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not (3, 17) <= (int(numbers[1]), int(numbers[2])) < (4, 0):
        raise UserError(f"MuJoCo {version} is installed, but the environments need >=3.17,<4; {fix}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress dm_control's warnings about itself (a deprecated attribute, a failed attempt of inverse kinematics)."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def mujoco_gl(library: str) -> Iterator[None]:
    """Set the environment variable MUJOCO_GL, the OpenGL library that MuJoCo chooses on import, for a while."""
    chosen = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = library
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]
        if chosen is not None:
            os.environ["MUJOCO_GL"] = chosen


def _import_mujoco() -> Any:
    """Import dm_control and return the module mujoco, without OpenGL, whose choice costs time, warns or raises."""
    with mujoco_gl("disabled"):
        mujoco = importlib.import_module("mujoco")
        importlib.import_module("dm_control.mujoco")
    return mujoco


class Simulation(ABC):
    """One MuJoCo model and its state, with the results of dm_control and without its overhead.

    A simulation belongs to one thread. A subclass defines a domain (docs/adding_a_domain.md) and imports dm_control in
    `build` and `start`, so that importing the file is fast.
    """

    domain: ClassVar[Domain]
    refresh_calls: ClassVar[tuple[str, ...]]  # MuJoCo functions that compute what `read_sensors` reads from the physics

    def __init__(self, task: str) -> None:
        self.task = task
        self.mujoco = _import_mujoco()
        with _quiet():
            self.physics = self.build()
        self.model: mujoco.MjModel = self.physics.model.ptr
        self.data: mujoco.MjData = self.physics.data.ptr
        self._warnings = self.physics.data.warning.number  # a view of MuJoCo's counters, which a reset clears
        self._substeps = round(self.domain.control_timestep / self.model.opt.timestep)
        self._runge_kutta = self.model.opt.integrator == self.mujoco.mjtIntegrator.mjINT_RK4
        lower, upper = self.model.actuator_ctrlrange.T
        self._control_center, self._control_radius = (upper + lower) / 2, (upper - lower) / 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by compiling the model again: views of C memory cannot be copied."""
        return _restored, (type(self), self.task, self.data)

    def build(self) -> dm_mujoco.Physics:
        """Compile the model of `self.task`. By default it is dm_control's model with the name of the domain."""
        suite = importlib.import_module(f"dm_control.suite.{self.domain.name}")
        return suite.Physics.from_xml_string(*suite.get_model_and_assets())

    @abstractmethod
    def start(self, random: np.random.RandomState) -> None:
        """Set the state at the start of an episode, drawn from `random` exactly as dm_control does."""

    @abstractmethod
    def read_observation(self, data: State) -> Observations:
        """Return the observation of a state, in ExoRL's order."""

    @abstractmethod
    def read_sensors(self, data: State) -> Sensors:
        """Return the quantities from which the rewards are computed."""

    @staticmethod
    @abstractmethod
    def reward(task: str, sensors: Sensors, action: Actions) -> Rewards:
        """Return the rewards of actions that led to states with these sensors."""

    def reset(self, random: np.random.RandomState) -> None:
        """Start a new episode."""
        with _quiet(), self.physics.reset_context():
            self.start(random)

    def step(self, action: Float[np.ndarray, " action"]) -> None:
        """Hold an action in [-1, 1] for one control timestep. dm_control's PhysicsError if this is unstable."""
        self.data.ctrl[:] = self.controls(action)
        self.advance(self.data)
        if self._warnings.any():
            from dm_control.rl.control import PhysicsError

            counts = zip(self.mujoco.mjtWarning.__members__, self._warnings, strict=False)
            names = ", ".join(name for name, count in counts if count)
            raise PhysicsError(f"{self.task}: the simulation is unstable ({names})")

    def controls(self, action: Actions) -> Float64[np.ndarray, "*batch action"]:
        """Convert actions in [-1, 1] to the actuators' units."""
        return self._control_center + self._control_radius * action

    def advance(self, data: mujoco.MjData) -> None:
        """Hold the controls for one control timestep. Several threads may advance different states of one model."""
        mujoco, model = self.mujoco, self.model
        # As in dm_control, end with mj_step1, so that everything computed from positions and velocities belongs to the
        # new state, and start with mj_step2, since the last call has done the first half.
        if self._runge_kutta:
            mujoco.mj_step(model, data, self._substeps)
        else:
            mujoco.mj_step2(model, data)
            if self._substeps > 1:
                mujoco.mj_step(model, data, self._substeps - 1)
        mujoco.mj_step1(model, data)

    def refresh(self) -> None:
        """Call `refresh_calls` after `set_physics_state`, so that `sensors` reads the new state."""
        for name in self.refresh_calls:
            getattr(self.mujoco, name)(self.model, self.data)

    def observation(self) -> Float32[np.ndarray, " observation"]:
        """Return the observation of the current state, in ExoRL's order."""
        return self.read_observation(self.data)

    def sensors(self) -> Float64[np.ndarray, " sensors"]:
        """Return the quantities from which the rewards are computed, for the current state."""
        return self.read_sensors(self.data)

    @staticmethod
    def read_physics(data: State) -> Float64[np.ndarray, "*batch physics"]:
        """Return a copy of the positions, velocities and activations of a state."""
        return np.concatenate((data.qpos, data.qvel, data.act), axis=-1)

    def physics_state(self) -> Float64[np.ndarray, " physics"]:
        """Return a copy of the current positions, velocities and activations."""
        return self.read_physics(self.data)

    def set_physics_state(self, physics: Float64[np.ndarray, " physics"]) -> None:
        """Set the positions, velocities and activations. Nothing that depends on them is recomputed."""
        self.mujoco.mj_setState(self.model, self.data, physics, int(self.mujoco.mjtState.mjSTATE_PHYSICS))


def _restored(kind: type[Simulation], task: str, data: mujoco.MjData) -> Simulation:
    simulation = kind(task)
    simulation.mujoco.mj_copyData(simulation.data, simulation.model, data)
    return simulation


class StackedData:
    """Arrays of several MjData (`stacked.qpos`) over a leading axis, copied on their first access after `renew`."""

    def __init__(self, datas: Sequence[Any]) -> None:
        self._datas = datas
        self._views: dict[str, list[np.ndarray]] = {}
        self._copies: dict[str, np.ndarray] = {}

    def renew(self) -> None:
        """Forget the copies, so that the next access reads the current states."""
        self._copies.clear()

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._copies:
            if name not in self._views:  # the arrays of an MjData keep their address
                self._views[name] = [getattr(data, name)[None] for data in self._datas]
            self._copies[name] = np.concatenate(self._views[name])
        return self._copies[name]
