"""Training cost, compared with counts by hand, XLA's count, and a run's own log."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringrl.config import ModelConfig, TrainConfig
from ringrl.config_files import merged
from ringrl.model.transformer import Transformer
from ringrl.training import read_info, train
from ringrl.training.budget import Budget, budget, forward_flops, step_cost, step_flops

CONFIG = ModelConfig(layers=3, width=64, heads=4, kv_heads=4)


def test_flops_equal_the_formula_of_the_paper():
    tokens, width = 512, 64
    assert forward_flops(CONFIG, tokens) == 3 * (24 * tokens * width**2 + 2 * tokens**2 * width)
    assert step_flops(CONFIG, tokens, contexts=5) == 15 * forward_flops(CONFIG, tokens)


def test_flops_with_fewer_key_heads_and_another_feed_forward_width():
    config = CONFIG.model_copy(update={"kv_heads": 1, "feed_forward": 2})
    assert forward_flops(config, 10) == 3 * 10 * (2 * 64 * (64 + 2 * 16 + 64) + 2 * 2 * 64 * 128 + 2 * 10 * 64)


@pytest.mark.parametrize("window", [0, 30, 100, 500, None])
def test_flops_of_an_episode_window(window):
    """Counted from the mask of four trajectories of 200 steps of one token."""
    step = np.arange(800)
    query, key = step[:, None], step[None]
    near = query - key < (800 if window is None else window)
    pairs = ((key <= query) & (near | (key < query // 200 * 200))).sum()
    config = CONFIG.model_copy(update={"token_set": "fused1", "episode_window": () if window is None else (window,)})
    attention = forward_flops(config, 800, 4) - 3 * 24 * 800 * config.width**2
    assert attention == pytest.approx(3 * 4 * config.width * pairs, rel=0.01)


def test_flops_are_unknown_for_a_model_without_a_context():
    assert step_flops(CONFIG.model_copy(update={"kind": "behaviour_cloning"}), 512, 1) is None


def test_xla_counts_the_same_matrix_operations():
    """One layer of vanilla attention, which also computes masked logits: twice our attention term."""
    config = CONFIG.model_copy(update={"layers": 1, "attention": "vanilla"})
    model = Transformer(config, nnx.Rngs(params=0))
    tokens = 256
    cost = jax.jit(model.__call__).lower(jnp.zeros((1, tokens, 64))).compile().cost_analysis()
    expected = forward_flops(config, tokens) + 2 * tokens**2 * 64
    assert cost["flops"] == pytest.approx(expected, rel=0.2), "the rest is norms, softmax and rotations"


def test_budget_of_contexts(finished_run: Path) -> None:
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


def test_tokens_follow_the_token_set_and_the_step(finished_run: Path) -> None:
    step, info = read_info(finished_run)
    early, late = (budget(info, number, finished_run) for number in (4, step))
    assert early.timesteps * 14 == late.timesteps * 4
    assert early.seconds is not None
    assert late.seconds is not None
    assert early.seconds < late.seconds
    model = info.config.model.model_copy(update={"token_set": "at5"})
    other = type(info)(**vars(info) | {"config": info.config.model_copy(update={"model": model})})
    assert budget(other, step, finished_run).tokens == 5 * late.tokens
    assert budget(other, step, finished_run).timesteps == late.timesteps


def test_segments_cost_their_own_steps(tiny: TrainConfig) -> None:
    context = tiny.context.model_copy(update={"segment_steps": 20})
    cost = step_cost(tiny.model_copy(update={"context": context}), 250)
    assert cost.timesteps == tiny.optimiser.batch_size * context.trajectories * 20
    assert cost.tokens == step_cost(tiny, 20).tokens


@pytest.mark.parametrize(
    ("kind", "row"), [("behaviour_cloning", 2 * 250), pytest.param("td3_bc", 1, marks=pytest.mark.slow)]
)
def test_budget_of_models_without_a_context(tiny: TrainConfig, kind: str, row: int) -> None:
    values = merged(tiny.model_dump(), {"model": {"kind": kind}, "optimiser": {"steps": 3}})
    run = train(TrainConfig.model_validate(values), quiet=True)
    step, info = read_info(run)
    found = budget(info, step, run)
    assert found.timesteps == found.tokens == 3 * 2 * row
    assert found.flops is None
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        assert entry["tokens_per_second"] / entry["steps_per_second"] == pytest.approx(found.tokens / 3)


def test_seconds_are_unknown_if_the_log_is_incomplete(finished: TrainConfig) -> None:
    step, info = read_info(finished.run)
    log = finished.run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    whole = budget(info, step, finished.run).seconds
    assert whole is not None
    without_speed = json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != "steps_per_second"})
    for text in ([without_speed, *lines[1:]], lines[:-1], [*lines[:-1], lines[-1][:20]], ["nonsense}"]):
        log.write_text("\n".join(text))
        assert budget(info, step, finished.run).seconds is None
    log.write_text("\n".join([*lines, lines[-1][:20]]))
    assert budget(info, step, finished.run).seconds == whole, "a line of a later step, cut short by a kill, is ignored"
    log.unlink()
    assert budget(info, step, finished.run).seconds is None


def test_a_budget_may_be_larger_than_a_setting() -> None:
    large = Budget(steps=10, batch_size=4, timesteps=2**40, tokens=2**42)
    assert Budget.model_validate_json(large.model_dump_json()) == large
