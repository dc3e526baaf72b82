"""Cheetah: half of a planar quadruped. Tasks run (from dm_control), run_backward, flip, flip_backward (from ExoRL)."""

import numpy as np
from dm_control.utils.rewards import tolerance

from ringrl.envs.domain import Camera, Domain
from ringrl.envs.simulation import Actions, Observations, Rewards, Sensors, Simulation, State

_RUN_SPEED = 10.0  # metres per second
_SPIN = 5.0  # kg m^2 / s
_TORSO = 1  # the first body after the world

CHEETAH = Domain(
    name="cheetah",
    tasks=("cheetah_run", "cheetah_run_backward", "cheetah_flip", "cheetah_flip_backward"),
    observation_size=17, action_size=6, physics_size=9 + 9, episode_length=1000, control_timestep=0.01,
    # 5 seeds x 20 episodes: standard error at most 2 %.
    random_returns={
        "cheetah_run": 3.8, "cheetah_run_backward": 20.3, "cheetah_flip": 152.5, "cheetah_flip_backward": 148.0,
    },
    camera=Camera(center=(0, 0, 0.5), distance=2.8, follows=1),
    observation={"positions without the horizontal one": 8, "velocities": 9},
    rewards={
        "cheetah_run": "Speed forward as a fraction of 10 m/s, at most 1.",
        "cheetah_run_backward": "Speed backward as a fraction of 10 m/s, at most 1.",
        "cheetah_flip": "Angular momentum forward as a fraction of 5 kg m²/s, at most 1.",
        "cheetah_flip_backward": "Angular momentum backward as a fraction of 5 kg m²/s, at most 1.",
    },
)  # fmt: skip


class CheetahSimulation(Simulation):
    """Sensors: forward velocity of the centre of mass, angular momentum about y."""

    domain = CHEETAH
    refresh_calls = ("mj_kinematics", "mj_comPos", "mj_comVel", "mj_subtreeVel")

    def start(self, random: np.random.RandomState) -> None:
        from dm_control.suite import cheetah

        cheetah.Cheetah(random=random).initialize_episode(self.physics)

    def read_observation(self, data: State) -> Observations:
        return np.concatenate((data.qpos[..., 1:], data.qvel), axis=-1, dtype=np.float32)

    def read_sensors(self, data: State) -> Sensors:
        return np.concatenate((data.subtree_linvel[..., _TORSO, :1], data.subtree_angmom[..., _TORSO, 1:2]), axis=-1)

    @staticmethod
    def reward(task: str, sensors: Sensors, action: Actions) -> Rewards:
        """Return the speed of running or of spinning as a fraction of the target, at most 1."""
        velocity, angular_momentum = np.moveaxis(sensors, -1, 0)
        achieved, wanted = (angular_momentum, _SPIN) if "flip" in task else (velocity, _RUN_SPEED)
        if task.endswith("_backward"):
            achieved = -achieved
        return tolerance(achieved, bounds=(wanted, np.inf), margin=wanted, value_at_margin=0, sigmoid="linear")
