import numpy as np
import pytest
from dm_control import suite

from ringrl.envs import make


def _flat(observation):
    return observation["observations"].astype(np.float32)


@pytest.mark.parametrize("task", ["balance", "balance_sparse", "swingup", "swingup_sparse"])
@pytest.mark.parametrize("seed", [0, 7])
def test_all_tasks_equal_dm_control(task, seed, assert_equals_dm_control):
    reference = suite.load(
        "cartpole", task, task_kwargs={"random": seed}, environment_kwargs={"flat_observation": True}
    )
    assert_equals_dm_control(make(f"cartpole_{task}", seed), reference, 1000 if seed == 0 else 100, _flat)


def test_dense_reward_depends_on_the_action():
    rewards = []
    for size in (0.0, 1.0):
        environment = make("cartpole_balance", 0)
        environment.reset()
        rewards.append(environment.step(np.array([size]))[1])
    assert rewards[1] == pytest.approx(0.8 * rewards[0], rel=0.02)  # a full control costs a fifth
