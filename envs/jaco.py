"""Jaco: a Kinova arm with a three-fingered hand that reaches for one of four goals on the floor (tasks from ExoRL).

The model is composed as in ExoRL, from dm_control's manipulation arena and robot. ExoRL's `composer.Environment`
recompiles the model for every episode although it does not change; here it is compiled once.
"""

from typing import Any

import numpy as np
from dm_control.utils.rewards import tolerance

from ringrl.envs.domain import Camera, Domain
from ringrl.envs.simulation import Actions, Observations, Rewards, Sensors, Simulation, State

_TARGET_RADIUS = 0.05  # metres
_START_LOWER, _START_UPPER = (-0.2, -0.2, 0.02), (0.2, 0.2, 0.4)  # bounds of the hand's start, metres
_ARM, _HAND = slice(0, 6), slice(6, 9)  # joints
_TORQUES = slice(0, 18)  # the arm's six three-axis torque sensors

_GOALS = {
    "jaco_reach_top_left": (-0.09, 0.09, 0.001),
    "jaco_reach_top_right": (0.09, 0.09, 0.001),
    "jaco_reach_bottom_left": (-0.09, -0.09, 0.001),
    "jaco_reach_bottom_right": (0.09, -0.09, 0.001),
}

JACO = Domain(
    name="jaco",
    tasks=tuple(_GOALS),
    observation_size=42, action_size=9, physics_size=9 + 9, episode_length=250, control_timestep=0.04,
    # 10 seeds x 100 episodes: standard error at most 8 %.
    random_returns=dict(zip(_GOALS, (11.6, 10.6, 12.3, 13.1), strict=True)),
    camera=Camera(center=(0, 0.12, 0.2), distance=1.25, azimuth=110, elevation=-35),
    observation={
        "arm: sine and cosine of the angles": 12, "arm: torques x, as sign(x) log(1 + |x|)": 6, "arm: velocities": 6,
        "hand: angles": 3, "hand: velocities": 3,
        "point between the fingers: position, m": 3, "point between the fingers: rotation matrix": 9,
    },
    rewards={
        task: f"1 if the point between the fingers is within 5 cm of the goal ({goal[0]}, {goal[1]}) m. 0.1 at 10 cm."
        for task, goal in _GOALS.items()
    },
)  # fmt: skip


class JacoSimulation(Simulation):
    """Sensors: position of the pinch site, between the fingers."""

    domain = JACO
    refresh_calls = ("mj_kinematics",)

    def build(self) -> Any:
        from dm_control import mjcf
        from dm_control.composer.initializers import ToolCenterPointInitializer
        from dm_control.composer.variation.distributions import Uniform
        from dm_control.manipulation.shared import arenas, constants, observations, robots, workspaces

        arena = arenas.Standard()
        self._arm = robots.make_arm(obs_settings=observations.PERFECT_FEATURES)
        self._hand = robots.make_hand(obs_settings=observations.PERFECT_FEATURES)
        self._arm.attach(self._hand)
        arena.attach_offset(self._arm, offset=robots.ARM_OFFSET)
        self._place_hand = ToolCenterPointInitializer(
            self._hand, self._arm, Uniform(_START_LOWER, _START_UPPER), workspaces.DOWN_QUATERNION
        )
        target = workspaces.add_target_site(
            arena.mjcf_model.worldbody, radius=_TARGET_RADIUS, visible=True, rgba=constants.RED, name="target_site"
        )
        target.pos = _GOALS[self.task]
        physics = mjcf.Physics.from_mjcf_model(arena.mjcf_model)
        self._pinch_site: int = physics.bind(self._hand.pinch_site).element_id
        self._joint_axes = physics.bind(self._arm.joints).axis.copy()
        return physics

    def start(self, random: np.random.RandomState) -> None:
        self._hand.set_grasp(self.physics, close_factors=random.uniform())
        self._place_hand(self.physics, random)

    def read_observation(self, data: State) -> Observations:
        positions, velocities = data.qpos, data.qvel
        batch = positions.shape[:-1]
        torques = (data.sensordata[..., _TORQUES].reshape(*batch, 6, 3) * self._joint_axes).sum(axis=-1)
        angles = np.stack((np.sin(positions[..., _ARM]), np.cos(positions[..., _ARM])), axis=-1).reshape(*batch, 12)
        arm = angles, np.sign(torques) * np.log1p(np.abs(torques)), velocities[..., _ARM]
        hand = positions[..., _HAND], velocities[..., _HAND]
        pinch = data.site_xpos[..., self._pinch_site, :], data.site_xmat[..., self._pinch_site, :]
        return np.concatenate((*arm, *hand, *pinch), axis=-1, dtype=np.float32)

    def read_sensors(self, data: State) -> Sensors:
        return data.site_xpos[..., self._pinch_site, :].copy()

    @staticmethod
    def reward(task: str, sensors: Sensors, action: Actions) -> Rewards:
        """Return 1 within 5 cm of the task's goal, falling to 0.1 at 10 cm."""
        distance = np.linalg.norm(sensors - np.array(_GOALS[task]), axis=-1)
        return tolerance(distance, bounds=(0, _TARGET_RADIUS), margin=_TARGET_RADIUS)
