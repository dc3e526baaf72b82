"""Cartpole: a pole on a cart. Tasks balance and swingup, each with a dense and a sparse reward (from dm_control)."""

import numpy as np
from dm_control.utils.rewards import tolerance

from ringrl.envs.domain import Camera, Domain
from ringrl.envs.simulation import Actions, Observations, Rewards, Sensors, Simulation, State

_CART_RANGE = (-0.25, 0.25)  # metres
_COSINE_RANGE = (0.995, 1.0)
_POLE = 2  # world, cart, pole
_DENSE = "The pole is upright, the cart is near the centre, and the control and the speed of the pole are small."
_SPARSE = "1 if the pole is within 5.7 degrees of upright and the cart within 25 cm of the centre, else 0."

CARTPOLE = Domain(
    name="cartpole",
    tasks=("cartpole_balance", "cartpole_balance_sparse", "cartpole_swingup", "cartpole_swingup_sparse"),
    observation_size=5, action_size=1, physics_size=2 + 2, episode_length=1000, control_timestep=0.01,
    # 10 seeds x 100 episodes: standard error at most 2 %.
    random_returns={
        "cartpole_balance": 359.0, "cartpole_balance_sparse": 49.6, "cartpole_swingup": 27.1,
        "cartpole_swingup_sparse": 0.0,
    },
    camera=Camera(center=(0, 0, 0.95), distance=3.9, elevation=-5),
    observation={"position of the cart, m": 1, "cosine and sine of the pole's angle": 2, "velocities": 2},
    rewards={
        "cartpole_balance": f"{_DENSE} The pole starts upright.",
        "cartpole_balance_sparse": f"{_SPARSE} The pole starts upright.",
        "cartpole_swingup": f"{_DENSE} The pole starts hanging down.",
        "cartpole_swingup_sparse": f"{_SPARSE} The pole starts hanging down.",
    },
)  # fmt: skip


class CartpoleSimulation(Simulation):
    """Sensors: position of the cart, cosine of the pole's angle, angular velocity of the pole."""

    domain = CARTPOLE
    refresh_calls = ("mj_kinematics",)

    def start(self, random: np.random.RandomState) -> None:
        from dm_control.suite import cartpole

        swing_up = self.task.startswith("cartpole_swingup")
        cartpole.Balance(swing_up=swing_up, sparse=False, random=random).initialize_episode(self.physics)

    def read_observation(self, data: State) -> Observations:
        angle = data.xmat[..., _POLE, 8:1:-6]  # zz and xz
        return np.concatenate((data.qpos[..., :1], angle, data.qvel), axis=-1, dtype=np.float32)

    def read_sensors(self, data: State) -> Sensors:
        return np.concatenate((data.qpos[..., :1], data.xmat[..., _POLE, 8:], data.qvel[..., 1:]), axis=-1)

    @staticmethod
    def reward(task: str, sensors: Sensors, action: Actions) -> Rewards:
        """Return the reward for an upright, centred pole; if dense, with small controls and velocities."""
        position, cosine, angular_velocity = np.moveaxis(sensors, -1, 0)
        if task.endswith("_sparse"):
            return tolerance(position, _CART_RANGE) * tolerance(cosine, _COSINE_RANGE)
        control = np.asarray(action[..., 0], np.float64)
        upright = (cosine + 1) / 2
        centered = (1 + tolerance(position, margin=2)) / 2
        small_control = (4 + tolerance(control, margin=1, value_at_margin=0, sigmoid="quadratic")) / 5
        small_velocity = (1 + tolerance(angular_velocity, margin=5)) / 2
        return upright * small_control * small_velocity * centered
