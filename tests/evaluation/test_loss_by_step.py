"""The benchmark of errors by step: the training loss, taken apart."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from ringrl.data import EpisodeStore
from ringrl.data.sampler import ContextSampler
from ringrl.evaluation.prompt import FIRST_DRAW
from ringrl.training import load_policy


def test_errors_make_up_the_loss(at_run: Path, jaco_store: EpisodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script = importlib.import_module("loss_by_step")
    trained = load_policy(at_run)
    config = trained.info.config
    sampler = ContextSampler(jaco_store, config.task, config.context, trained.info.normalisation, 2, config.seed)
    losses = [float(trained.policy.loss(sampler.batch(FIRST_DRAW + number))) for number in range(2)]
    found = script.errors(at_run, None, 2)
    assert found.shape == (4, 3, 250)
    np.testing.assert_allclose(found.reshape(2, -1).mean(1), losses, rtol=1e-5)
    names, rows = script.table(found)
    assert names[:3] == ["0", "1", "2-4"]
    assert names[-1] == "100-249"
    np.testing.assert_allclose(rows[1][2], found[:, 1, 2:5].mean(), rtol=1e-5)
    np.testing.assert_allclose([row[-1] for row in rows], found[:, :, 100:].mean((0, 2)), rtol=1e-5)
