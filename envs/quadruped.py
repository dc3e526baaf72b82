"""Quadruped: a four-legged walker in three dimensions. Tasks walk and run (dm_control's), stand and jump (ExoRL's)."""

import mujoco
import numpy as np
from dm_control.suite import common, quadruped
from dm_control.utils.rewards import tolerance
from jaxtyping import Float, Float32, Float64

from ringrl.envs.simulation import Simulation, State

_SPEEDS = {"quadruped_walk": 0.5, "quadruped_run": 5.0}  # metres per second
_JUMP_HEIGHT = 1.0  # metres
_TORSO = 1  # the first body after the world
_HINGE_POSITIONS, _HINGE_VELOCITIES = slice(7, None), slice(6, None)  # behind those of the free torso
# Of MuJoCo's sensor data: accelerometer and gyroscope, velocity of the torso, forces (12) and torques (12) at the toes.
_INERTIAL, _VELOCITY, _TOES = slice(0, 6), slice(6, 9), slice(9, 33)


class QuadrupedSimulation(Simulation):
    """Sensors: torso uprightness, forward velocity of the torso in its own frame, height of the centre of mass."""

    def build(self) -> quadruped.Physics:
        return quadruped.Physics.from_xml_string(quadruped.make_model(), common.ASSETS)

    def start(self, random: np.random.RandomState) -> None:
        quadruped.Move(desired_speed=0, random=random).initialize_episode(self.physics)

    def read_observation(self, data: State) -> Float32[np.ndarray, "*batch observation"]:
        """Joint angles (16), joint velocities (16), activations of the actuators (12), velocity of the torso in its own
        frame (3), uprightness (1), acceleration and angular velocity of the torso (6), inverse hyperbolic sines of the
        forces and torques at the toes (24). Acceleration, forces and torques are those at the beginning of the last
        substep: they follow from the forces, which MuJoCo computes on the way to the next state.
        """
        sensed = data.sensordata
        observation = np.empty((*data.qpos.shape[:-1], 78), np.float32)
        observation[..., :16] = data.qpos[..., _HINGE_POSITIONS]
        observation[..., 16:32] = data.qvel[..., _HINGE_VELOCITIES]
        observation[..., 32:44] = data.act
        observation[..., 44:47] = sensed[..., _VELOCITY]
        observation[..., 47] = data.xmat[..., _TORSO, 8]
        observation[..., 48:54] = sensed[..., _INERTIAL]
        observation[..., 54:] = np.arcsinh(sensed[..., _TOES])
        return observation

    def read_sensors(self, data: State) -> Float64[np.ndarray, "*batch 3"]:
        sensors = np.empty((*data.qpos.shape[:-1], 3))
        sensors[..., 0] = data.xmat[..., _TORSO, 8]
        sensors[..., 1] = data.sensordata[..., _VELOCITY][..., 0]
        sensors[..., 2] = data.subtree_com[..., _TORSO, 2]
        return sensors

    def refresh(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_comVel(self.model, self.data)
        mujoco.mj_sensorVel(self.model, self.data)

    @staticmethod
    def reward(
        task: str, sensors: Float64[np.ndarray, "*batch 3"], action: Float[np.ndarray, "*batch 12"]
    ) -> Float64[np.ndarray, "*batch"]:
        """Upright, and for the other tasks upright times the wish to move forward or up."""
        uprightness, velocity, height = np.moveaxis(sensors, -1, 0)
        upright = tolerance(uprightness, bounds=(1, np.inf), margin=2, value_at_margin=0, sigmoid="linear")
        if task == "quadruped_stand":
            return upright
        achieved, wanted = (height, _JUMP_HEIGHT) if task == "quadruped_jump" else (velocity, _SPEEDS[task])
        move = tolerance(achieved, bounds=(wanted, np.inf), margin=wanted, value_at_margin=0.5, sigmoid="linear")
        return upright * move


SIMULATION = QuadrupedSimulation
