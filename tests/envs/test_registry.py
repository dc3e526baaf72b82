import re
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from ringrl.envs import DOMAINS, TASKS, domain_of, register_gymnasium

FIRST = {domain.tasks[0] for domain in DOMAINS.values()}


@pytest.mark.parametrize(
    "task", [task if task in FIRST else pytest.param(task, marks=pytest.mark.slow) for task in TASKS]
)
def test_every_task_passes_gymnasiums_checker(task):
    environment = gymnasium.make(f"ringrl/{task}-v0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(environment.unwrapped)
    # Velocities have no bound, and the spaces say so; the checker has nothing else to say.
    others = [str(w.message) for w in caught if not re.search("value is -?infinity", str(w.message))]
    assert others == []
    environment.close()


def test_made_by_id_is_the_same_environment():
    from ringrl.envs import make

    by_id, direct = gymnasium.make("ringrl/cartpole_swingup-v0", seed=4), make("cartpole_swingup", 4)
    np.testing.assert_array_equal(by_id.reset()[0], direct.reset()[0])
    truncated, steps = False, 0
    while not truncated:
        *_, terminated, truncated, _ = by_id.step(np.zeros(1, np.float32))
        assert not terminated
        steps += 1
    assert steps == by_id.spec.max_episode_steps == domain_of("cartpole_swingup").episode_length


def test_registering_again_changes_nothing():
    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_gymnasium()
    assert dict(gymnasium.registry) == before
