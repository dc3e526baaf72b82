"""Jaco: a Kinova arm with a three-fingered hand that reaches for one of four places on the floor (ExoRL's tasks).

The model is composed as ExoRL composes it, from dm_control's manipulation arena and robot. The original runs it in a
`composer.Environment`, which recompiles the model for every episode although nothing in it changes; here it is compiled
once.
"""

from types import MappingProxyType

import mujoco
import numpy as np
from dm_control import mjcf
from dm_control.composer.initializers import ToolCenterPointInitializer
from dm_control.composer.variation.distributions import Uniform
from dm_control.manipulation.shared import arenas, constants, observations, robots, workspaces
from dm_control.utils.rewards import tolerance
from jaxtyping import Float, Float32, Float64

from ringrl.envs.goals import GoalSpace
from ringrl.envs.simulation import Simulation, State

_TARGET_RADIUS = 0.05  # metres
_START_LOWER, _START_UPPER = (-0.2, -0.2, 0.02), (0.2, 0.2, 0.4)  # where the hand may start, metres
_ARM = slice(0, 6)  # joints of the arm; those of the fingers follow
_TORQUES = slice(0, 18)  # the arm's six three-axis torque sensors
_PINCH = slice(30, 33)  # of the observation: position of the pinch site


def reach_reward(
    position: Float[np.ndarray, "*batch 3"], goal: Float[np.ndarray, "*batch 3"]
) -> Float[np.ndarray, "*batch"]:
    """One within 5 cm of the goal, falling to a tenth 5 cm further off; both in metres."""
    distance = np.linalg.norm(position - goal, axis=-1)
    return tolerance(distance, bounds=(0, _TARGET_RADIUS), margin=_TARGET_RADIUS)


class JacoSimulation(Simulation):
    """Sensors: position of the pinch site, between the fingers."""

    goals = GoalSpace(
        goals=MappingProxyType(
            {
                "jaco_reach_top_left": (-0.09, 0.09, 0.001),
                "jaco_reach_top_right": (0.09, 0.09, 0.001),
                "jaco_reach_bottom_left": (-0.09, -0.09, 0.001),
                "jaco_reach_bottom_right": (0.09, -0.09, 0.001),
            }
        ),
        observation=_PINCH,
        reward=reach_reward,
    )

    def build(self) -> mjcf.Physics:
        arena = arenas.Standard()
        self._arm = robots.make_arm(obs_settings=observations.PERFECT_FEATURES)
        self._hand = robots.make_hand(obs_settings=observations.PERFECT_FEATURES)
        self._arm.attach(self._hand)
        arena.attach_offset(self._arm, offset=robots.ARM_OFFSET)
        self._place_hand = ToolCenterPointInitializer(
            self._hand,
            self._arm,
            position=Uniform(_START_LOWER, _START_UPPER),
            quaternion=workspaces.DOWN_QUATERNION,
        )
        target = workspaces.add_target_site(
            arena.mjcf_model.worldbody, radius=_TARGET_RADIUS, visible=True, rgba=constants.RED, name="target_site"
        )
        target.pos = self.goals.goals[self.task]
        physics = mjcf.Physics.from_mjcf_model(arena.mjcf_model)
        self._pinch_site: int = physics.bind(self._hand.pinch_site).element_id
        self._joint_axes = physics.bind(self._arm.joints).axis.copy()
        return physics

    def start(self, random: np.random.RandomState) -> None:
        self._hand.set_grasp(self.physics, close_factors=random.uniform())
        self._place_hand(self.physics, random)

    def read_observation(self, data: State) -> Float32[np.ndarray, "*batch observation"]:
        """Arm: angles as sine and cosine (12), torques (6), velocities (6); hand: angles (3), velocities (3); pinch
        site: position (3), rotation matrix (9). Torques x are given as sign(x) log(1 + |x|).
        """
        positions, velocities = data.qpos, data.qvel
        batch = positions.shape[:-1]
        torques = (data.sensordata[..., _TORQUES].reshape(*batch, 6, 3) * self._joint_axes).sum(axis=-1)
        observation = np.empty((*batch, 42), np.float32)
        observation[..., 0:12:2] = np.sin(positions[..., _ARM])
        observation[..., 1:12:2] = np.cos(positions[..., _ARM])
        observation[..., 12:18] = np.sign(torques) * np.log1p(np.abs(torques))
        observation[..., 18:24] = velocities[..., _ARM]
        observation[..., 24:27] = positions[..., 6:]
        observation[..., 27:30] = velocities[..., 6:]
        observation[..., _PINCH] = data.site_xpos[..., self._pinch_site, :]
        observation[..., 33:] = data.site_xmat[..., self._pinch_site, :]
        return observation

    def read_sensors(self, data: State) -> Float64[np.ndarray, "*batch 3"]:
        return data.site_xpos[..., self._pinch_site, :].copy()

    def refresh(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)

    @staticmethod
    def reward(
        task: str, sensors: Float64[np.ndarray, "*batch 3"], action: Float[np.ndarray, "*batch 9"]
    ) -> Float64[np.ndarray, "*batch"]:
        """That of reaching the task's goal; see `reach_reward`."""
        return reach_reward(sensors, np.array(JacoSimulation.goals.goals[task]))


SIMULATION = JacoSimulation
