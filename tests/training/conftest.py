from pathlib import Path

import pytest

from ringrl.config import TrainConfig

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
    """Fourteen steps of a tiny transformer on real jaco episodes."""
    return TrainConfig.model_validate(SETTINGS | {"data": jaco_store.path, "run": tmp_path / "run"})
