"""What a run took, counted by hand and beside what its own log says."""

import json
from pathlib import Path

import pytest

from ringrl.config import TrainConfig, merged
from ringrl.training import read_info, train
from ringrl.training.budget import budget
from ringrl.training.throughput import forward_flops


def test_of_contexts(finished_run: Path) -> None:
    step, info = read_info(finished_run)
    found = budget(info, step, finished_run)
    assert (found.steps, found.batch_size, found.devices) == (14, 2, 1)
    assert found.timesteps == found.tokens == 14 * 2 * (2 * 250)
    assert found.transitions == 8 * 250
    assert found.flops == pytest.approx(14 * 2 * 3 * forward_flops(info.config.model, 500))
    entries = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    by_speed = sum(found.tokens / 14 / entry["tokens_per_second"] for entry in entries)
    assert found.seconds == pytest.approx(by_speed)
    assert found.seconds > 0


def test_tokens_are_those_of_the_set_and_an_earlier_checkpoint_took_less(finished_run: Path) -> None:
    step, info = read_info(finished_run)
    early, late = (budget(info, number, finished_run) for number in (4, step))
    assert early.timesteps * 14 == late.timesteps * 4
    assert early.seconds is not None
    assert late.seconds is not None
    assert early.seconds < late.seconds
    model = info.config.model.model_copy(update={"token_set": "at5"})
    other = type(info)(**vars(info) | {"config": info.config.model_copy(update={"model": model})})
    assert budget(other, step).tokens == 5 * late.tokens
    assert budget(other, step).timesteps == late.timesteps


@pytest.mark.parametrize(("kind", "row"), [("behaviour_cloning", 2 * 250), ("td3_bc", 1)])
def test_of_what_sees_one_step_at_a_time(tiny: TrainConfig, kind: str, row: int) -> None:
    values = merged(tiny.model_dump(), {"model": {"kind": kind}, "optimiser": {"steps": 3}})
    run = train(TrainConfig.model_validate(values), quiet=True)
    step, info = read_info(run)
    found = budget(info, step, run)
    assert found.timesteps == found.tokens == 3 * 2 * row
    assert found.flops is None
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        assert entry["tokens_per_second"] / entry["steps_per_second"] == pytest.approx(found.tokens / 3)


def test_seconds_are_told_whole_or_not_at_all(finished: TrainConfig) -> None:
    step, info = read_info(finished.run)
    log = finished.run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    whole = budget(info, step, finished.run).seconds
    assert whole is not None
    assert budget(info, step).seconds is None
    old = [json.dumps({k: v for k, v in json.loads(line).items() if k != "steps_per_second"}) for line in lines]
    for text in ([*old[:1], *lines[1:]], lines[:-1], [*lines[:-1], lines[-1][:20]], ["nonsense}"]):
        log.write_text("\n".join(text))
        assert budget(info, step, finished.run).seconds is None
    log.write_text("\n".join([*lines, lines[-1][:20]]))
    assert budget(info, step, finished.run).seconds == whole, "a line of later work that a kill cut short is none of it"
    log.unlink()
    assert budget(info, step, finished.run).seconds is None
