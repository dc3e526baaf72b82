import shutil
from pathlib import Path

import pytest

from ringrl.config import TrainConfig
from ringrl.training import train

SETTINGS = {
    "task": "jaco_reach_top_left",
    "seed": 3,
    "checkpoint_every": 4,
    "log_every": 2,
    "context": {"trajectories": 2},
    "model": {"layers": 1, "width": 16, "token_set": "fused1"},
    "optimiser": {"steps": 14, "batch_size": 2, "warmup_steps": 2},
}


@pytest.fixture
def tiny(jaco_store, tmp_path: Path) -> TrainConfig:
    """Fourteen steps of a tiny transformer on real jaco episodes; not trained yet."""
    return TrainConfig.model_validate(SETTINGS | {"data": jaco_store.path, "run": tmp_path / "run"})


@pytest.fixture(scope="session")
def finished_run(jaco_store, tmp_path_factory) -> Path:
    """A run of `tiny`'s settings, for reading only."""
    run = tmp_path_factory.mktemp("training") / "run"
    return train(TrainConfig.model_validate(SETTINGS | {"data": jaco_store.path, "run": run}), quiet=True)


@pytest.fixture
def finished(tiny: TrainConfig, finished_run: Path) -> TrainConfig:
    """`tiny` with a copy of its finished run, which a test may change."""
    shutil.copytree(finished_run, tiny.run)
    return tiny
