import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ringrl.envs import load_simulation

load_simulation("cartpole_balance")  # before the tests import dm_control, which would look for a display

# One archive per domain, as recorded by the original environments.
_ARCHIVES = {
    "walker": ("walker/ddpg.zip", "walker_walk"),
    "cheetah": ("cheetah/ddpg.zip", "cheetah_run"),
    "cartpole": ("cartpole/ddpg.zip", "cartpole_swingup"),
    "jaco": ("jaco/ddpg.zip", "jaco_reach_top_left"),
}


@pytest.fixture
def recorded_episodes():
    """Return a function from a domain name to (task, three recorded episodes), which skips without archives."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "exorl"
    folder = Path(os.environ.get("RINGRL_EXORL", default))

    def episodes(domain):
        name, task = _ARCHIVES[domain]
        if not (folder / name).exists():
            pytest.skip(f"no recorded ExoRL archive {name}; set RINGRL_EXORL to a folder that has it")
        with zipfile.ZipFile(folder / name) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".npz"))
            chosen = [names[0], names[len(names) // 2], names[-1]]
            return task, [dict(np.load(io.BytesIO(archive.read(name)))) for name in chosen]

    return episodes


@pytest.fixture
def assert_equals_dm_control():
    """Return a function that checks that our environment and dm_control's agree under the same actions."""

    def compare(environment, reference, steps, flatten):
        generator = np.random.RandomState(3)
        lower, upper = reference.action_spec().minimum, reference.action_spec().maximum
        for _ in range(2):  # the second episode continues the stream of starts
            observation, info = environment.reset()
            timestep = reference.reset()
            np.testing.assert_array_equal(observation, flatten(timestep.observation))
            np.testing.assert_array_equal(info["physics"], reference.physics.get_state())
            for step in range(1, steps + 1):
                action = generator.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
                timestep = reference.step((upper + lower) / 2 + (upper - lower) / 2 * action)
                observation, reward, terminated, truncated, info = environment.step(action)
                np.testing.assert_array_equal(observation, flatten(timestep.observation))
                np.testing.assert_array_equal(info["physics"], reference.physics.get_state())
                assert reward == pytest.approx(float(timestep.reward), abs=1e-12)
                assert not terminated
                assert truncated == timestep.last() == (step == environment.domain.episode_length)

    return compare
