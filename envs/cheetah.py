"""Cheetah: a planar quadruped's half. Tasks run (dm_control's), run_backward, flip and flip_backward (ExoRL's)."""

import mujoco
import numpy as np
from dm_control.suite import cheetah
from dm_control.utils.rewards import tolerance
from jaxtyping import Float, Float32, Float64

from ringrl.envs.simulation import Simulation, State

_RUN_SPEED = 10.0  # metres per second
_SPIN = 5.0  # kg m^2 / s
_TORSO = 1  # the first body after the world


class CheetahSimulation(Simulation):
    """Sensors: forward velocity of the centre of mass, angular momentum about y."""

    def build(self) -> cheetah.Physics:
        return cheetah.Physics.from_xml_string(*cheetah.get_model_and_assets())

    def start(self, random: np.random.RandomState) -> None:
        cheetah.Cheetah(random=random).initialize_episode(self.physics)

    def read_observation(self, data: State) -> Float32[np.ndarray, "*batch observation"]:
        """Positions without the horizontal one (8), velocities (9)."""
        observation = np.empty((*data.qpos.shape[:-1], 17), np.float32)
        observation[..., :8] = data.qpos[..., 1:]
        observation[..., 8:] = data.qvel
        return observation

    def read_sensors(self, data: State) -> Float64[np.ndarray, "*batch 2"]:
        sensors = np.empty((*data.qpos.shape[:-1], 2))
        sensors[..., 0] = data.subtree_linvel[..., _TORSO, 0]
        sensors[..., 1] = data.subtree_angmom[..., _TORSO, 1]
        return sensors

    def refresh(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_comVel(self.model, self.data)
        mujoco.mj_subtreeVel(self.model, self.data)

    @staticmethod
    def reward(
        task: str, sensors: Float64[np.ndarray, "*batch 2"], action: Float[np.ndarray, "*batch 6"]
    ) -> Float64[np.ndarray, "*batch"]:
        """The speed of running or of spinning, as a share of the wanted one."""
        velocity, angular_momentum = np.moveaxis(sensors, -1, 0)
        achieved, wanted = (angular_momentum, _SPIN) if "flip" in task else (velocity, _RUN_SPEED)
        if task.endswith("_backward"):
            achieved = -achieved
        return tolerance(achieved, bounds=(wanted, np.inf), margin=wanted, value_at_margin=0, sigmoid="linear")


SIMULATION = CheetahSimulation
