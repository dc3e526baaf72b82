import numpy as np
import pytest
from dm_control import composer
from dm_control.composer.initializers import ToolCenterPointInitializer
from dm_control.composer.variation.distributions import Uniform
from dm_control.entities.manipulators import kinova
from dm_control.manipulation.shared import arenas, observations

from ringrl.envs import make

_GOALS = {
    "top_left": (-0.09, 0.09, 0.001),
    "top_right": (0.09, 0.09, 0.001),
    "bottom_left": (-0.09, -0.09, 0.001),
    "bottom_right": (0.09, -0.09, 0.001),
}


class _Reach(composer.Task):
    """The reaching task as a composer task, written independently."""

    def __init__(self, goal):
        features = observations.PERFECT_FEATURES
        self.arm = kinova.JacoArm(
            observable_options=observations.make_options(features, observations.JACO_ARM_OBSERVABLES)
        )
        self.hand = kinova.JacoHand(
            use_pinch_site_as_tcp=True,
            observable_options=observations.make_options(features, observations.JACO_HAND_OBSERVABLES),
        )
        self.arena = arenas.Standard()
        self.arm.attach(self.hand)
        self.arena.attach_offset(self.arm, offset=(0.0, 0.4, 0.0))
        self.control_timestep = 0.04
        self.goal = np.array(goal)
        self.place = ToolCenterPointInitializer(
            self.hand,
            self.arm,
            position=Uniform((-0.2, -0.2, 0.02), (0.2, 0.2, 0.4)),
            quaternion=np.array([0.0, 0.70710678118, 0.70710678118, 0.0]),
        )

    @property
    def root_entity(self):
        return self.arena

    def initialize_episode(self, physics, random_state):
        self.hand.set_grasp(physics, close_factors=random_state.uniform())
        self.place(physics, random_state)

    def get_reward(self, physics):
        distance = np.linalg.norm(physics.bind(self.hand.tool_center_point).xpos - self.goal)
        beyond = max(distance - 0.05, 0.0) / 0.05
        return 0.1 ** (beyond**2)


def _flat(observation):
    return np.concatenate([value.ravel() for value in observation.values()]).astype(np.float32)


@pytest.mark.parametrize("place", list(_GOALS))
def test_equals_a_composer_environment(place, assert_equals_dm_control):
    seed = list(_GOALS).index(place)
    reference = composer.Environment(_Reach(_GOALS[place]), time_limit=10.0, random_state=seed)
    environment = make(f"jaco_reach_{place}", seed)
    steps = 250 if place == "top_left" else 40
    assert_equals_dm_control(environment, reference, steps, _flat)


@pytest.mark.parametrize(("task", "sign_x", "sign_y"), [
    ("jaco_reach_top_left", -1, 1), ("jaco_reach_top_right", 1, 1),
    ("jaco_reach_bottom_left", -1, -1), ("jaco_reach_bottom_right", 1, -1),
])  # fmt: skip
def test_reward_is_one_near_the_goal_and_a_tenth_at_10_cm(task, sign_x, sign_y):
    from ringrl.envs.jaco import JacoSimulation

    goal = np.array([sign_x * 0.09, sign_y * 0.09, 0.001])
    sensors = goal + np.array([[0, 0, 0], [0, 0, 0.049], [0, 0.1, 0], [0.5, 0, 0]])
    rewards = JacoSimulation.reward(task, sensors, np.zeros((4, 9)))
    np.testing.assert_allclose(rewards, [1, 1, 0.1, 0], atol=1e-9)
