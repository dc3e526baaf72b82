import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ringrl.data.exorl import save_episode
from ringrl.envs import make

# Sorting by name would put the second before the first.
EPISODE_NUMBERS = (999_999, 1_000_000, 1_000_002)


def _record_episode(task: str, seed: int) -> dict[str, np.ndarray]:
    """One real episode of uniformly random actions, in ExoRL's rows."""
    env = make(task, seed=seed)
    random = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    rows = [(observation, np.zeros(env.action_space.shape, np.float32), [0.0], [1.0], info["physics"])]
    truncated = False
    while not truncated:
        action = random.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, _, truncated, info = env.step(action)
        rows.append((observation, action, [reward], [1.0], info["physics"]))
    keys = ("observation", "action", "reward", "discount", "physics")
    arrays = {key: np.stack([np.asarray(row[i]) for row in rows]) for i, key in enumerate(keys)}
    return {key: array.astype(np.float64 if key == "physics" else np.float32) for key, array in arrays.items()}


@pytest.fixture(scope="session")
def cartpole_episodes() -> dict[int, dict[str, np.ndarray]]:
    """Three real cartpole_swingup episodes by number."""
    return {number: _record_episode("cartpole_swingup", seed) for seed, number in enumerate(EPISODE_NUMBERS)}


@pytest.fixture(scope="session")
def cartpole_folder(cartpole_episodes, tmp_path_factory) -> Path:
    """A folder in ExoRL's layout that holds `cartpole_episodes`."""
    folder = tmp_path_factory.mktemp("exorl") / "cartpole"
    (folder / "buffer").mkdir(parents=True)
    for number, episode in cartpole_episodes.items():
        save_episode(folder / "buffer", number, episode)
    return folder


@pytest.fixture(scope="session")
def cartpole_zip(cartpole_folder) -> Path:
    """The same as a zip archive, its entries in the order of their names."""
    path = cartpole_folder.parent / "cartpole.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((cartpole_folder / "buffer").iterdir()):
            archive.write(file, f"buffer/{file.name}")
    return path


@pytest.fixture(scope="session")
def exorl_folder() -> Path:
    """The shared archives recorded with the original ExoRL environments."""
    beside_the_checkout = Path(__file__).resolve().parents[2].parent / "shared" / "exorl"
    folder = Path(os.environ.get("RINGRL_EXORL", beside_the_checkout))
    if not folder.is_dir():
        pytest.skip(f"no ExoRL archives at {folder}: set RINGRL_EXORL to a folder of {{domain}}/{{algo}}.zip")
    return folder
