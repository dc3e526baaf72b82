"""Walker: a planar biped. Tasks stand, walk, run (from dm_control) and flip (from ExoRL)."""

import numpy as np
from dm_control.utils.rewards import tolerance

from ringrl.envs.domain import Camera, Domain
from ringrl.envs.simulation import Actions, Observations, Rewards, Sensors, Simulation, State

_STAND_HEIGHT = 1.2  # metres
_SPEEDS = {"walker_walk": 1.0, "walker_run": 8.0}  # metres per second
_SPIN = 5.0  # kg m^2 / s
_TORSO = 1  # the first body after the world

WALKER = Domain(
    name="walker",
    tasks=("walker_stand", "walker_walk", "walker_run", "walker_flip"),
    observation_size=24, action_size=6, physics_size=9 + 9, episode_length=1000, control_timestep=0.025,
    # 5 seeds x 20 episodes: standard error at most 2 %.
    random_returns={"walker_stand": 129.9, "walker_walk": 32.7, "walker_run": 23.1, "walker_flip": 50.3},
    camera=Camera(center=(0, 0, 0.85), distance=3.2, follows=1),
    observation={"orientation of every body in the plane": 14, "height of the torso, m": 1, "joint velocities": 9},
    rewards={
        "walker_stand": "The torso is upright and high. 1 at a height of 1.2 m or more.",
        "walker_walk": "The reward for standing times a factor for speed: 1/6 at rest, 1 at 1 m/s forward.",
        "walker_run": "The reward for standing times a factor for speed: 1/6 at rest, 1 at 8 m/s forward.",
        "walker_flip": "The reward for standing times a factor for a forward spin: 1/6 at rest, 1 at 5 kg m²/s.",
    },
)  # fmt: skip


class WalkerSimulation(Simulation):
    """Sensors: torso height, torso uprightness, forward velocity of the centre of mass, angular momentum about y."""

    domain = WALKER
    refresh_calls = ("mj_kinematics", "mj_comPos", "mj_comVel", "mj_subtreeVel")

    def start(self, random: np.random.RandomState) -> None:
        from dm_control.suite import walker

        walker.PlanarWalker(move_speed=0, random=random).initialize_episode(self.physics)

    def read_observation(self, data: State) -> Observations:
        orientations = data.xmat[..., 1:, :3:2].reshape(*data.qpos.shape[:-1], 14)  # xx and xz
        return np.concatenate((orientations, data.xpos[..., _TORSO, 2:], data.qvel), axis=-1, dtype=np.float32)

    def read_sensors(self, data: State) -> Sensors:
        height, upright = data.xpos[..., _TORSO, 2:], data.xmat[..., _TORSO, 8:]
        velocity, angular_momentum = data.subtree_linvel[..., _TORSO, :1], data.subtree_angmom[..., _TORSO, 1:2]
        return np.concatenate((height, upright, velocity, angular_momentum), axis=-1)

    @staticmethod
    def reward(task: str, sensors: Sensors, action: Actions) -> Rewards:
        """Return the reward for standing, for the other tasks times the reward for moving."""
        height, upright, velocity, spin = np.moveaxis(sensors, -1, 0)
        standing = tolerance(height, bounds=(_STAND_HEIGHT, np.inf), margin=_STAND_HEIGHT / 2)
        stand = (3 * standing + (1 + upright) / 2) / 4
        if task == "walker_stand":
            return stand
        if task == "walker_flip":
            move = tolerance(spin, bounds=(_SPIN, np.inf), margin=_SPIN, value_at_margin=0, sigmoid="linear")
        else:
            speed = _SPEEDS[task]
            move = tolerance(velocity, bounds=(speed, np.inf), margin=speed / 2, value_at_margin=0.5, sigmoid="linear")
        return stand * (5 * move + 1) / 6
