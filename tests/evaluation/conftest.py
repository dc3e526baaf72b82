"""A small trained run, and environments of a few steps."""

from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore
from ringrl.evaluation import TrainedPolicy, load_policy
from ringrl.training import train

LENGTH = 4


class Drift(gymnasium.Env):
    """Four steps from a random start. Actions change the state, and the reward depends on the state.

    Args:
        breaks: (observation, reward) that replace those of step `at` of episode `episode`.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (42,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (9,), np.float32)

    def __init__(self, breaks: tuple[float, float] | None = None, episode: int = 0, at: int = 2) -> None:
        self.breaks, self.when = breaks, (episode, at)
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        self.place = self.np_random.normal(size=42).astype(np.float32)
        return self.place, {}

    def step(self, action):
        assert np.isfinite(action).all()
        self.place = np.roll(self.place, 1) + np.float32(action.sum())
        observation, reward = self.place, float(np.cos(self.place[0]) ** 2)
        if self.breaks is not None and (self.episode, self.steps) == self.when:
            observation, reward = np.full(42, self.breaks[0], np.float32), self.breaks[1]
        self.steps += 1
        return observation, reward, False, self.steps == LENGTH, {}


@pytest.fixture
def drift() -> Callable[..., SyncVectorEnv]:
    """Return a function that makes a vector of `Drift`, each with its arguments or None."""

    def make(*breaks: dict | None) -> SyncVectorEnv:
        makers = [lambda one=one: Drift(**(one or {})) for one in breaks]
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)

    return make


@pytest.fixture(scope="session")
def make_run(jaco_store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains a tiny policy for two steps."""

    def make(**changes: object) -> Path:
        values = {
            "data": jaco_store.path, "task": "jaco_reach_top_left", "run": tmp_path_factory.mktemp("runs") / "run",
            "model": {"layers": 1, "width": 16, "token_set": "fused1", "trajectory_embedding": True},
            "context": {"trajectories": 3}, "optimiser": {"steps": 2, "batch_size": 2},
        }  # fmt: skip
        return train(TrainConfig.model_validate(values | changes), quiet=True)

    return make


@pytest.fixture(scope="session")
def at_run(make_run: Callable[..., Path]) -> Path:
    """An Agentic Transformer of three trajectories."""
    return make_run()


@pytest.fixture(scope="module")
def trained(at_run: Path) -> TrainedPolicy:
    """The policy of the small run."""
    return load_policy(at_run)
