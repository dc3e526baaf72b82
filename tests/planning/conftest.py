"""Small workloads."""

from collections.abc import Callable
from typing import Any

import pytest

from ringrl.config import TrainConfig
from ringrl.planning.workload import Workload

Make = Callable[..., Workload]


@pytest.fixture
def make() -> Make:
    """make(tokens, mesh={...}, contexts=1, **model): a tiny transformer, by default float32 with remat."""

    def workload(tokens: int, mesh: dict[str, Any] | None = None, contexts: int = 1, **model: Any) -> Workload:
        tiny = {"token_set": "fused1", "layers": 2, "width": 64, "heads": 1, "kv_heads": 1, "remat": "layers"}
        values = {"data": "unused", "task": "unused", "run": "unused", "model": tiny | model, "mesh": mesh or {}}
        return Workload(TrainConfig.model_validate(values | {"optimiser": {"batch_size": contexts}}), tokens)

    return workload
