"""Point mass maze: a sphere moves between four rooms to reach a goal in one of them (tasks from ExoRL).

ExoRL draws the starts from NumPy's global generator. Here they depend on the seed, as in every other domain.
"""

import re
from importlib import resources
from typing import Any

import numpy as np
from dm_control.utils.rewards import tolerance

from ringrl.envs.domain import Camera, Domain
from ringrl.envs.simulation import Actions, Observations, Rewards, Sensors, Simulation, State
from ringrl.errors import UserError

_GOAL_RADIUS = 0.015  # metres
_START_LOWER, _START_UPPER = (-0.29, 0.15), (-0.15, 0.29)  # corner of the top left room, metres
_MASS = 1  # the first body after the world

GOALS = {
    "point_mass_maze_reach_top_left": (-0.15, 0.15, 0.01),
    "point_mass_maze_reach_top_right": (0.15, 0.15, 0.01),
    "point_mass_maze_reach_bottom_left": (-0.15, -0.15, 0.01),
    "point_mass_maze_reach_bottom_right": (0.15, -0.15, 0.01),
}
"""Full task name -> goal position, metres."""

_ANY_GOAL = re.compile(r"point_mass_maze_reach\((-?\d*\.?\d+),(-?\d*\.?\d+)\)")  # x and y
_ROOMS = (0.03, 0.28)  # distance of a goal from both axes, metres


def goal_of(task: str) -> tuple[float, float, float] | None:
    """Return the goal position of a task in metres, None for another name. UserError for a goal outside the rooms.

    Tasks are ExoRL's four and one for every place in the rooms, such as "point_mass_maze_reach(-0.1,0.25)".
    """
    if task in GOALS:
        return GOALS[task]
    if not task.startswith("point_mass_maze_reach("):
        return None
    match = _ANY_GOAL.fullmatch(task)
    if match is None:
        raise UserError(f"{task}: write x and y in metres, without spaces, as in point_mass_maze_reach(-0.1,0.25)")
    x, y = map(float, match.groups())
    if not all(_ROOMS[0] <= abs(distance) <= _ROOMS[1] for distance in (x, y)):
        raise UserError(
            f"{task}: the goal is not in a room; choose a place {_ROOMS[0]} to {_ROOMS[1]} m from both axes"
        )
    return x, y, 0.01


POINT_MASS_MAZE = Domain(
    name="point_mass_maze",
    tasks=tuple(GOALS),
    observation_size=4, action_size=2, physics_size=2 + 2, episode_length=1000, control_timestep=0.02,
    records_all_tasks=True,
    # 10 seeds x 100 episodes: standard error at most 11 % (only starts near the goal of the same room reach it).
    random_returns=dict(zip(GOALS, (22.9, 0.0, 0.0, 0.0), strict=True)),
    has_more=goal_of,
    camera=Camera(center=(0, 0, 0), distance=0.86, elevation=-90),
    observation={"position, m": 2, "velocity, m/s": 2},
    rewards={
        task: f"1 within 1.5 cm of the goal ({goal[0]}, {goal[1]}) m, 0.1 at 3 cm. Full controls cost a fifth."
        for task, goal in GOALS.items()
    },
)  # fmt: skip


class PointMassMazeSimulation(Simulation):
    """Sensors: position of the mass."""

    domain = POINT_MASS_MAZE
    refresh_calls = ("mj_kinematics",)

    def build(self) -> Any:
        from dm_control import mujoco as dm_mujoco
        from dm_control.suite import common

        model = (resources.files("ringrl.envs") / "point_mass_maze.xml").read_text(encoding="utf-8")
        physics = dm_mujoco.Physics.from_xml_string(model, common.ASSETS)
        physics.named.model.site_pos["goal"] = goal_of(self.task)
        return physics

    def start(self, random: np.random.RandomState) -> None:
        self.data.qpos[:] = random.uniform(_START_LOWER, _START_UPPER)

    def read_observation(self, data: State) -> Observations:
        return np.concatenate((data.qpos, data.qvel), axis=-1, dtype=np.float32)

    def read_sensors(self, data: State) -> Sensors:
        return data.xpos[..., _MASS, :].copy()

    @staticmethod
    def reward(task: str, sensors: Sensors, action: Actions) -> Rewards:
        """Return 1 within 1.5 cm of the goal, falling to 0.1 at 3 cm; full controls cost a fifth."""
        distance = np.linalg.norm(sensors - np.array(goal_of(task)), axis=-1)
        near_goal = tolerance(distance, bounds=(0, _GOAL_RADIUS), margin=_GOAL_RADIUS)
        control = np.asarray(action, np.float64)
        control_reward = tolerance(control, margin=1, value_at_margin=0, sigmoid="quadratic").mean(axis=-1)
        return near_goal * (4 + control_reward) / 5
