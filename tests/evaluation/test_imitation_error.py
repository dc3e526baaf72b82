"""The imitation error by step: the training loss, separated by trajectory and step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ringrl.cli import main
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


def test_the_command_prints_a_row_per_trajectory(at_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--checkpoint", str(at_run), "--error-by-step"])
    lines = capsys.readouterr().out.splitlines()
    (header,) = [line for line in lines if "Traj" in line]
    assert all(steps in header for steps in (" 0 ", " 1 ", "2-4", "100-249"))
    rows = [line.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split() for line in lines]
    errors = imitation_error(load_policy(at_run)).mean(0)
    found = {row[0]: row[1:] for row in rows if row and row[0] in ("1", "2", "3")}
    for number, error in enumerate(errors, start=1):
        assert found[str(number)][2] == f"{error[2:5].mean():.3f}"
        assert found[str(number)][-1] == f"{error[100:].mean():.3f}"
    assert not list(at_run.glob("evaluation*")), "nothing is rolled out"


def test_a_method_without_a_context_raises(make_run: Callable[..., Path]) -> None:
    run = make_run(model={"kind": "behaviour_cloning", "layers": 1, "width": 16})
    with pytest.raises(UserError, match="behaviour_cloning has no context"):
        imitation_error(load_policy(run))
