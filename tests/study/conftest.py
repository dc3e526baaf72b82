"""Plans of tiny cells."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[..., Path]:
    """Writes a plan for a store and returns its path; a value of None removes the key."""

    def write(store: Path, **changes: object) -> Path:
        plan = {
            "data": str(store), "task": "jaco_reach_top_left", "output": str(tmp_path / "runs"), "trajectories": [1, 2],
            "seeds": [0], "trajectories_per_batch": 2, "episodes": 4,
            "settings": {"model": {"layers": 1, "width": 16, "token_set": "fused1"}, "optimiser": {"steps": 3}},
        } | changes  # fmt: skip
        path = tmp_path / "plan.yaml"
        kept = {name: value for name, value in plan.items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return path

    return write
