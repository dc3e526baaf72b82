from pathlib import Path

import pytest

from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore
from ringrl.evaluation.protocol import Protocol, evaluate_policy
from ringrl.training import load_policy, train


@pytest.mark.parametrize(("later", "method"), [(0.0, "td3+bc"), (0.5, "td3+bc+her")])
def test_an_actor_critic_is_rolled_out_and_named(
    jaco_store: EpisodeStore, tmp_path: Path, later: float, method: str
) -> None:
    values = {
        "data": jaco_store.path, "task": "jaco_reach_top_left", "run": tmp_path / "run",
        "model": {"kind": "td3_bc", "layers": 1, "width": 16}, "optimiser": {"steps": 2},
        "actor_critic": {"hindsight": {"later": later}},
    }  # fmt: skip
    run = train(TrainConfig.model_validate(values), quiet=True)
    (record,) = evaluate_policy(load_policy(run), run, Protocol(environments=1))
    assert record.method == method
    assert (record.token_set, record.train_trajectories, record.steps_trained) == (None, None, 2)
    assert 0 <= record.returns[0] <= 250
