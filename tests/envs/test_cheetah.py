import numpy as np
import pytest
from dm_control import suite

from ringrl.envs import make


def _flat(observation):
    return observation["observations"].astype(np.float32)


@pytest.mark.parametrize("seed", [0, 7])
def test_run_equals_dm_control(seed, assert_equals_dm_control):
    reference = suite.load(
        "cheetah", "run", task_kwargs={"random": seed}, environment_kwargs={"flat_observation": True}
    )
    assert_equals_dm_control(make("cheetah_run", seed), reference, 1000 if seed == 0 else 100, _flat)


@pytest.mark.parametrize(
    ("task", "sign", "quantity", "wanted"),
    [("run_backward", -1, "speed", 10), ("flip", 1, "spin", 5), ("flip_backward", -1, "spin", 5)],
)
def test_custom_rewards_are_linear_up_to_the_target(task, sign, quantity, wanted):
    environment, reference = make(f"cheetah_{task}", 2), suite.load("cheetah", "run", task_kwargs={"random": 2})
    environment.reset()
    reference.reset()
    generator = np.random.RandomState(0)
    sloped = 0
    for _ in range(300):
        action = generator.uniform(-1, 1, 6)
        reference.step(action)
        data = reference.physics.named.data
        achieved = data.subtree_linvel["torso"][0] if quantity == "speed" else data.subtree_angmom["torso"][1]
        expected = min(max(sign * achieved / wanted, 0.0), 1.0)
        assert environment.step(action)[1] == pytest.approx(expected, abs=1e-12)
        sloped += 0 < expected < 1
    assert sloped > 50
