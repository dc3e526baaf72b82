"""A TD3 learner in environments of other packages: episodes that end early, resumption, and what it stores."""

import shutil
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from ringrl.collect.learner import learn
from ringrl.collect.record import start_seed
from ringrl.data.foreign import import_episodes
from ringrl.envs import make
from ringrl.errors import UserError

TASK = "gymnasium:Falls-v0"


class Falls(gymnasium.Env):
    """A point that is pushed, from -3 to 3. Beyond 2 the episode ends; before, it is truncated after 30 steps."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-3, 3, (1,), np.float32)

    def __init__(self, render_mode: None = None, breaks: str = "") -> None:
        self.breaks = breaks

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.state, {}

    def step(self, action):
        assert self.action_space.contains(action)
        if self.breaks == "cable":
            raise RuntimeError("a cable is loose")
        if self.breaks == "exit":
            raise SystemExit(0)
        self.state = self.state + np.array([0.1 * action[0], 0.0], np.float32)
        reward = float("nan") if self.breaks == "reward" else -float(abs(self.state[0]))
        return self.state, reward, bool(abs(self.state[0]) > 2), False, {}


@pytest.fixture(scope="module", autouse=True)
def quick():
    gymnasium.register("Falls-v0", Falls, max_episode_steps=30, disable_env_checker=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringrl.collect.learner._BATCH", 64)
        patch.setattr("ringrl.collect.learner._WARM_UP", 200)
        yield
    del gymnasium.registry["Falls-v0"]


def collected(folder: Path, episodes: int = 60, progress=lambda done, total: None) -> list[dict[str, np.ndarray]]:
    (folder / "buffer").mkdir(parents=True, exist_ok=True)
    learn(TASK, folder, episodes=episodes, seed=0, progress=progress, width=32)
    found = []
    for path in sorted((folder / "buffer").iterdir()):
        with np.load(path) as file:
            found.append(dict(file))
        assert path.name.endswith(f"_{len(found[-1]['reward'])}.npz")
    return found


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> tuple[Path, list[dict[str, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("falls")
    return folder, collected(folder)


def test_it_learns_not_to_fall(episodes):
    falls = [bool(episode["terminated"][-1]) for episode in episodes[1]]
    assert any(falls[:12])
    returns = [episode["reward"].mean() for episode in episodes[1]]
    assert np.mean(returns[-12:]) > np.mean(returns[:12])
    assert np.mean([episode["reward"].sum() for episode in episodes[1][-12:]]) > -20


def test_episodes_are_those_of_the_environment(episodes, tmp_path):
    folder, found = episodes
    store = import_episodes(folder / "buffer", tmp_path / "falls.h5", "npz", environment=TASK)
    assert store.facts.num_terminated == sum(bool(episode["terminated"][-1]) for episode in found) > 0
    for number in (0, 7, 59):
        episode, environment = store.episode(number), make(TASK)
        observation, _ = environment.reset(seed=start_seed(0, number))
        for step, action in enumerate(episode["action"][1:]):
            np.testing.assert_array_equal(episode["observation"][step], observation)
            observation, reward, terminated, truncated, _ = environment.step(action)
            assert episode["reward"][step + 1, 0] == np.float32(reward)
            is_last = step == len(episode["reward"]) - 2
            assert (terminated or truncated) == is_last
        np.testing.assert_array_equal(episode["observation"][-1], observation)
        assert terminated == (episode["discount"][-1, 0] == 0)


@pytest.mark.slow
def test_an_interrupted_collection_resumes_with_the_same_episodes(episodes, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 34:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path, progress=interrupt)
    damaged = shutil.copytree(tmp_path, tmp_path / "copy")
    (path,) = (damaged / "buffer").glob("episode_000002_*")
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match="episode 2 cannot be read"):
        collected(damaged)
    path.unlink()
    with pytest.raises(UserError, match="episode 2 cannot be read, it is missing"):
        collected(damaged)
    shutil.rmtree(damaged)
    for one, other in zip(episodes[1], collected(tmp_path), strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], strict=True)


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        ("cable", "RuntimeError: a cable is loose"),
        ("exit", "SystemExit: 0"),
        ("reward", "ValueError: its observation or reward is not finite"),
    ],
)
def test_an_environment_that_fails_is_named(breaks, reason, tmp_path):
    (tmp_path / "buffer").mkdir()
    task = f"gymnasium:Falls-v0(breaks={breaks!r})"
    with pytest.raises(UserError, match=rf"step 0 of the episode from seed \d+ failed .{reason}"):
        learn(task, tmp_path, episodes=1, seed=0, progress=lambda done, total: None, width=8)


def test_an_episode_of_another_length_from_before_an_interruption_is_replaced(tmp_path):
    """An environment with randomness of its own repeats the episodes after the last save with other lengths."""
    (tmp_path / "buffer").mkdir()
    (tmp_path / "buffer" / "episode_000000_31.npz").write_bytes(b"")
    learn(TASK, tmp_path, episodes=1, seed=0, progress=lambda done, total: None, width=8)
    assert len([*(tmp_path / "buffer").iterdir()]) == 1
