"""The imitation error by step: the training loss, separated by trajectory and step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ringrl.data import EpisodeStore
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.errors import UserError
from ringrl.evaluation import load_policy
from ringrl.evaluation.prompt import FIRST_DRAW, imitation_error


def test_the_mean_error_is_the_loss(at_run: Path, jaco_store: EpisodeStore) -> None:
    trained = load_policy(at_run)
    config = trained.info.config
    sampler = ContextSampler(jaco_store, config.task, config.context, trained.info.normalisation, 2, config.seed)
    losses = [float(trained.policy.loss(sampler.batch(FIRST_DRAW + number))) for number in range(2)]
    found = imitation_error(trained, batches=2)
    assert found.shape == (4, 3, 250)
    np.testing.assert_allclose(found.reshape(2, -1).mean(1), losses, rtol=1e-5)


def test_a_method_without_a_context_raises(make_run: Callable[..., Path]) -> None:
    run = make_run(model={"kind": "behaviour_cloning", "layers": 1, "width": 16})
    with pytest.raises(UserError, match="behaviour_cloning has no context"):
        imitation_error(load_policy(run))
