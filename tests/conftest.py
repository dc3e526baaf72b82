"""Shared by all rooms: small real datasets."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.extend.backend import clear_backends

from ringrl.data import EpisodeStore, import_archive
from ringrl.data.exorl import save_episode
from ringrl.envs import make


def record_random_episodes(task: str, folder: Path, episodes: int) -> Path:
    """Random actions in the real environment, written as an ExoRL folder."""
    (folder / "buffer").mkdir(parents=True)
    environment = make(task, seed=0)
    random = np.random.default_rng(0)
    for number in range(episodes):
        observation, info = environment.reset()
        rows = [(observation, np.zeros(environment.action_space.shape, np.float32), 0.0, info["physics"])]
        truncated = False
        while not truncated:
            action = random.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
            observation, reward, _, truncated, info = environment.step(action)
            rows.append((observation, action, reward, info["physics"]))
        observations, actions, rewards, physics = zip(*rows, strict=True)
        episode = {
            "observation": np.stack(observations),
            "action": np.stack(actions),
            "reward": np.array(rewards, np.float32)[:, None],
            "discount": np.ones((len(rows), 1), np.float32),
            "physics": np.stack(physics),
        }
        save_episode(folder / "buffer", number, episode)
    return folder


@pytest.fixture(scope="session")
def jaco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight random jaco episodes of 250 steps in ExoRL's format."""
    return record_random_episodes("jaco_reach_top_left", tmp_path_factory.mktemp("jaco") / "random", 8)


@pytest.fixture(scope="session")
def jaco_store(jaco_folder: Path) -> EpisodeStore:
    """The same episodes as a store."""
    return import_archive(jaco_folder, jaco_folder.with_suffix(".h5"), "jaco")


@pytest.fixture(scope="module")
def eight_devices() -> Iterator[None]:
    """Eight host devices for the tests of a module, and what there was before for those after it."""
    if jax.local_device_count() >= 8:
        yield
        return
    before = jax.config.jax_num_cpu_devices
    _restart_with(8)
    yield
    _restart_with(before)


def _restart_with(devices: int) -> None:
    clear_backends()
    jax.config.update("jax_num_cpu_devices", devices)
