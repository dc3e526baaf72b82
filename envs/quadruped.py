"""Quadruped: a four-legged walker in three dimensions. Tasks walk, run (from dm_control), stand, jump (from ExoRL)."""

from typing import Any

import numpy as np
from dm_control.utils.rewards import tolerance

from ringrl.envs.domain import Camera, Domain
from ringrl.envs.simulation import Actions, Observations, Rewards, Sensors, Simulation, State

_SPEEDS = {"quadruped_walk": 0.5, "quadruped_run": 5.0}  # metres per second
_JUMP_HEIGHT = 1.0  # metres
_TORSO = 1  # the first body after the world
_HINGE_POSITIONS, _HINGE_VELOCITIES = slice(7, None), slice(6, None)  # after the free torso
# In MuJoCo's sensor data: accelerometer and gyroscope, velocity of the torso, forces (12) and torques (12) at the toes.
_INERTIAL, _VELOCITY, _TOES = slice(0, 6), slice(6, 9), slice(9, 33)

QUADRUPED = Domain(
    name="quadruped",
    tasks=("quadruped_stand", "quadruped_walk", "quadruped_run", "quadruped_jump"),
    observation_size=78, action_size=12, physics_size=23 + 22 + 12, episode_length=1000, control_timestep=0.02,
    # 10 seeds x 100 episodes: standard error at most 5 % (an episode may start with the torso upside down).
    random_returns={
        "quadruped_stand": 258.6, "quadruped_walk": 128.8, "quadruped_run": 129.3, "quadruped_jump": 192.9,
    },
    camera=Camera(center=(0, 0, 0.6), distance=4.5, azimuth=115, elevation=-22, follows=2),
    observation={
        "joint angles": 16, "joint velocities": 16, "activations of the actuators": 12,
        "velocity of the torso in its own frame, m/s": 3, "uprightness of the torso": 1,
        "acceleration and angular velocity of the torso": 6, "forces and torques at the toes, as arcsinh": 24,
    },
    rewards={
        "quadruped_stand": "1 if the torso is upright, 0 if it is upside down.",
        "quadruped_walk": "The reward for standing times a factor for speed: 0.5 at rest, 1 at 0.5 m/s forward.",
        "quadruped_run": "The reward for standing times a factor for speed: 0.5 at rest, 1 at 5 m/s forward.",
        "quadruped_jump": "The reward for standing times a factor for the height of the centre of mass: 1 at 1 m.",
    },
)  # fmt: skip


class QuadrupedSimulation(Simulation):
    """Sensors: torso uprightness, forward velocity of the torso in its own frame, height of the centre of mass."""

    domain = QUADRUPED
    refresh_calls = ("mj_kinematics", "mj_comPos", "mj_comVel", "mj_sensorVel")

    def build(self) -> Any:
        from dm_control.suite import common, quadruped

        return quadruped.Physics.from_xml_string(quadruped.make_model(), common.ASSETS)

    def start(self, random: np.random.RandomState) -> None:
        from dm_control.suite import quadruped

        quadruped.Move(desired_speed=0, random=random).initialize_episode(self.physics)

    def read_observation(self, data: State) -> Observations:
        """Return the observation. Accelerations, forces and torques are those before the last substep, as in MuJoCo."""
        joints = data.qpos[..., _HINGE_POSITIONS], data.qvel[..., _HINGE_VELOCITIES], data.act
        sensed = data.sensordata
        torso = sensed[..., _VELOCITY], data.xmat[..., _TORSO, 8:], sensed[..., _INERTIAL]
        return np.concatenate((*joints, *torso, np.arcsinh(sensed[..., _TOES])), axis=-1, dtype=np.float32)

    def read_sensors(self, data: State) -> Sensors:
        velocity = data.sensordata[..., _VELOCITY][..., :1]
        return np.concatenate((data.xmat[..., _TORSO, 8:], velocity, data.subtree_com[..., _TORSO, 2:]), axis=-1)

    @staticmethod
    def reward(task: str, sensors: Sensors, action: Actions) -> Rewards:
        """Return the reward for an upright torso, for the other tasks times the reward for moving forward or up."""
        uprightness, velocity, height = np.moveaxis(sensors, -1, 0)
        upright = tolerance(uprightness, bounds=(1, np.inf), margin=2, value_at_margin=0, sigmoid="linear")
        if task == "quadruped_stand":
            return upright
        achieved, wanted = (height, _JUMP_HEIGHT) if task == "quadruped_jump" else (velocity, _SPEEDS[task])
        move = tolerance(achieved, bounds=(wanted, np.inf), margin=wanted, value_at_margin=0.5, sigmoid="linear")
        return upright * move
