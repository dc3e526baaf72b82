"""Cartpole: a pole on a cart. Tasks balance and swingup, each with a dense and a sparse reward (dm_control's)."""

import mujoco
import numpy as np
from dm_control.suite import cartpole
from dm_control.utils.rewards import tolerance
from jaxtyping import Float, Float32, Float64

from ringrl.envs.simulation import Simulation

_CART_RANGE = (-0.25, 0.25)  # metres
_COSINE_RANGE = (0.995, 1.0)
_POLE = 2  # world, cart, pole


class CartpoleSimulation(Simulation):
    """Sensors: position of the cart, cosine of the pole's angle, angular velocity of the pole."""

    def build(self) -> cartpole.Physics:
        return cartpole.Physics.from_xml_string(*cartpole.get_model_and_assets())

    def start(self, random: np.random.RandomState) -> None:
        swing_up = self.task.startswith("cartpole_swingup")
        cartpole.Balance(swing_up=swing_up, sparse=False, random=random).initialize_episode(self.physics)

    def observation(self) -> Float32[np.ndarray, " observation"]:
        """Position of the cart, cosine and sine of the pole's angle, velocities (2)."""
        data = self.data
        observation = np.empty(5, np.float32)
        observation[0] = data.qpos[0]
        observation[1:3] = data.xmat[_POLE, [8, 2]]
        observation[3:] = data.qvel
        return observation

    def sensors(self) -> Float64[np.ndarray, " 3"]:
        return np.array((self.data.qpos[0], self.data.xmat[_POLE, 8], self.data.qvel[1]))

    def refresh(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)

    @staticmethod
    def reward(
        task: str, sensors: Float64[np.ndarray, "*batch 3"], action: Float[np.ndarray, "*batch 1"]
    ) -> Float64[np.ndarray, "*batch"]:
        """Upright and centred; the dense reward also wants small controls and velocities."""
        position, cosine, angular_velocity = np.moveaxis(sensors, -1, 0)
        if task.endswith("_sparse"):
            return tolerance(position, _CART_RANGE) * tolerance(cosine, _COSINE_RANGE)
        control = np.asarray(action[..., 0], np.float64)
        upright = (cosine + 1) / 2
        centered = (1 + tolerance(position, margin=2)) / 2
        small_control = (4 + tolerance(control, margin=1, value_at_margin=0, sigmoid="quadratic")) / 5
        small_velocity = (1 + tolerance(angular_velocity, margin=5)) / 2
        return upright * small_control * small_velocity * centered


SIMULATION = CartpoleSimulation
