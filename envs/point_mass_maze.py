"""Point mass maze: a sphere pushed about four rooms, to reach a place in one of them (ExoRL's tasks).

ExoRL draws the starts from NumPy's global generator; here they follow the seed, like those of every other domain.
"""

from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

import mujoco
import numpy as np
from dm_control import mujoco as dm_mujoco
from dm_control.suite import common
from dm_control.utils.rewards import tolerance
from jaxtyping import Float, Float32, Float64

from ringrl.envs.simulation import Simulation, State

_GOAL_RADIUS = 0.015  # metres
_START_LOWER, _START_UPPER = (-0.29, 0.15), (-0.15, 0.29)  # the corner of the top left room, metres
_MASS = 1  # the first body after the world

GOALS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "point_mass_maze_reach_top_left": (-0.15, 0.15, 0.01),
        "point_mass_maze_reach_top_right": (0.15, 0.15, 0.01),
        "point_mass_maze_reach_bottom_left": (-0.15, -0.15, 0.01),
        "point_mass_maze_reach_bottom_right": (0.15, -0.15, 0.01),
    }
)
"""Full task name -> the place to reach, metres."""


class PointMassMazeSimulation(Simulation):
    """Sensors: position of the mass."""

    def build(self) -> dm_mujoco.Physics:
        model = (resources.files("ringrl.envs") / "point_mass_maze.xml").read_text(encoding="utf-8")
        physics = dm_mujoco.Physics.from_xml_string(model, common.ASSETS)
        physics.named.model.site_pos["goal"] = GOALS[self.task]
        return physics

    def start(self, random: np.random.RandomState) -> None:
        self.data.qpos[:] = random.uniform(_START_LOWER, _START_UPPER)

    def read_observation(self, data: State) -> Float32[np.ndarray, "*batch observation"]:
        """Position (2), velocity (2)."""
        return np.concatenate((data.qpos, data.qvel), axis=-1, dtype=np.float32, casting="same_kind")

    def read_sensors(self, data: State) -> Float64[np.ndarray, "*batch 3"]:
        return data.xpos[..., _MASS, :].copy()

    def refresh(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)

    @staticmethod
    def reward(
        task: str, sensors: Float64[np.ndarray, "*batch 3"], action: Float[np.ndarray, "*batch 2"]
    ) -> Float64[np.ndarray, "*batch"]:
        """Near the goal: one within 1.5 cm, a tenth 1.5 cm further off; full controls cost a fifth of it."""
        distance = np.linalg.norm(sensors - np.array(GOALS[task]), axis=-1)
        near_goal = tolerance(distance, bounds=(0, _GOAL_RADIUS), margin=_GOAL_RADIUS)
        control = np.asarray(action, np.float64)
        control_reward = tolerance(control, margin=1, value_at_margin=0, sigmoid="quadratic").mean(axis=-1)
        return near_goal * (4 + control_reward) / 5


SIMULATION = PointMassMazeSimulation
