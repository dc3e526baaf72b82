"""The loss on held-out episodes, by hand, on meshes, after a resumption, and in the choice of the best checkpoint."""

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampling.held_out import all_but, held_out
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.errors import UserError
from ringrl.evaluation import load_policy
from ringrl.model import make_agent, make_policy
from ringrl.model.agents.imitation import ImitationPolicy
from ringrl.model.parallel import ONE_DEVICE, make_parallel
from ringrl.training import read_info, train
from ringrl.training.checkpoints import EarlyStopping, best_step, saved_steps
from ringrl.training.loop import held_out_sources
from ringrl.training.metrics import MetricsRecorder
from ringrl.training.validation import BATCHES, FIRST_BATCH, PARTS, Validation
from tests.training.conftest import SETTINGS

TASK, OTHER = "jaco_reach_top_left", "jaco_reach_bottom_right"


@pytest.fixture(scope="module")
def shared(jaco_store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """Return a function that trains `tiny` with held-out episodes and changes, once, for reading only."""
    trained: dict[str, TrainConfig] = {}

    def run(name: str, **changes: object) -> TrainConfig:
        if name not in trained:
            folder = tmp_path_factory.mktemp("validation") / name
            tiny = TrainConfig.model_validate(SETTINGS | {"data": jaco_store.path, "run": folder})
            trained[name] = with_held_out(tiny, **changes)
            train(trained[name], quiet=True)
        return trained[name]

    return run


TD3 = {
    "model": {"kind": "td3_bc"}, "optimiser": {"batch_size": 64, "learning_rate": 0.1}, "context": {"trajectories": 4},
    "actor_critic": {"n_step": 2}, "stop_after": 1,
}  # fmt: skip
# The loss rises twice in turn, and is lowest before the end.
RISING = {
    "checkpoint_every": 2, "validate_every": 2,
    "optimiser": {"learning_rate": 0.2, "final_learning_rate": 1.0, "steps": 24},
}  # fmt: skip


def with_held_out(tiny: TrainConfig, **changes) -> TrainConfig:
    """`tiny` with three of the eight episodes held out, measured at steps 4, 5, 8, 10, 12 and 14."""
    values = tiny.model_dump() | {"validation_fraction": 0.375, "validate_every": 5}
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return TrainConfig.model_validate(values)


def entries(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in one.items() if "per_second" not in key and key != "crc32"} for one in found]


def validations(run: Path) -> dict[int, dict]:
    """Step -> the fields of the held-out loss."""
    found = {one["step"]: {key: x for key, x in one.items() if key.startswith("validation")} for one in entries(run)}
    return {step: fields for step, fields in found.items() if fields}


def measure(config: TrainConfig, store: EpisodeStore) -> tuple[dict, list[np.ndarray]]:
    """Return the measured losses of the initial policy and, on one device, all errors of each source by hand."""
    scale = Normalisation.of(store)
    parallel = make_parallel(config)
    agent = make_agent(partial(make_policy, config.model, 42, 9, 0, parallel=parallel), config, parallel)
    sources = held_out_sources(store, config, scale, parallel, held_out(store, config))
    found = Validation(config, agent.graph, sources, 250, parallel)(agent.init().params)
    if parallel.mesh is not None:
        return found, []
    return found, [errors(config, source, agent.policy(agent.init().params)) for source in sources]


def errors(config: TrainConfig, source: ContextSampler, policy: ImitationPolicy) -> np.ndarray:
    """Return the error of every step of the measured batches, (contexts, trajectories, steps)."""
    found, actions = [], jax.jit(policy.actions)
    for number in range(BATCHES * config.optimiser.accumulation):
        batch = source.batch(FIRST_BATCH + number)
        error = np.square(np.asarray(actions(batch)) - batch.action).mean(-1)
        found.append(error.reshape(len(error), config.context.trajectories, -1))
    return np.concatenate(found)


@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_losses_of_a_transformer_by_hand(tiny: TrainConfig, jaco_store: EpisodeStore, loss_on: str) -> None:
    config = with_held_out(tiny, model={"loss_on": loss_on}, optimiser={"accumulation": 2})
    found, (by_hand,) = measure(config, jaco_store)
    assert by_hand.shape == (BATCHES * config.optimiser.batch_size, 2, 250)
    expected = by_hand if loss_on == "all" else by_hand[:, -1]
    np.testing.assert_allclose(found["validation_loss"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["validation_loss_by_trajectory"], by_hand.mean((0, 2)), rtol=1e-5)
    parts = by_hand.reshape(*by_hand.shape[:2], PARTS, -1).mean((0, 1, 3))
    np.testing.assert_allclose(found["validation_loss_by_part"], parts, rtol=1e-5)
    assert "validation_gap" not in found


def test_the_gap_after_a_prompt_of_a_wrong_task(tiny: TrainConfig, jaco_store: EpisodeStore) -> None:
    config = with_held_out(tiny, context={"other_tasks": [OTHER]}, model={"token_set": "ring4"})
    found, by_hand = measure(config, jaco_store)
    right, wrong = (errors[:, -1].mean() for errors in by_hand)
    np.testing.assert_allclose(found["validation_loss_by_trajectory"][-1], right, rtol=1e-5)
    np.testing.assert_allclose(found["validation_gap"] + right, wrong, rtol=1e-5)
    assert abs(found["validation_gap"]) > 1e-3 * right


def test_behaviour_cloning_has_no_places(tiny: TrainConfig, jaco_store: EpisodeStore) -> None:
    found, (by_hand,) = measure(with_held_out(tiny, model={"kind": "behaviour_cloning"}), jaco_store)
    assert set(found) == {"validation_loss", "validation_loss_by_part"}
    np.testing.assert_allclose(found["validation_loss"], by_hand.mean(), rtol=1e-5)


def test_a_run_reports_the_losses_of_its_policy(shared, jaco_store: EpisodeStore) -> None:
    config = shared("transformer")
    found = validations(config.run)
    assert list(found) == [4, 5, 8, 10, 12, 14]
    scale = read_info(config.run)[1].normalisation
    (source,) = held_out_sources(jaco_store, config, scale, ONE_DEVICE, held_out(jaco_store, config))
    for step in (12, 14):
        expected = errors(config, source, load_policy(config.run, step).policy).mean()
        np.testing.assert_allclose(found[step]["validation_loss"], expected, rtol=1e-5)


def test_td3_bc_reports_the_error_of_the_actor(shared, jaco_store: EpisodeStore) -> None:
    config = shared("td3_bc", **TD3)
    assert set(validations(config.run)[14]) == {"validation_loss"}
    policy, info = load_policy(config.run).policy, read_info(config.run)[1]
    excluded = held_out(jaco_store, config)
    (sampler,) = held_out_sources(jaco_store, config, info.normalisation, ONE_DEVICE, excluded)
    assert set(sampler._episodes) == set(excluded)
    found = []
    for number in range(BATCHES):
        batch = sampler.batch(FIRST_BATCH + number)
        action = np.tanh(policy.actor(policy.inputs(batch.observation)))
        found.append(np.square(action - batch.action).mean())
    np.testing.assert_allclose(validations(config.run)[14]["validation_loss"], np.mean(found), rtol=1e-5)


def test_training_data_excludes_held_out_episodes(tiny: TrainConfig, shared, jaco_store: EpisodeStore) -> None:
    config = with_held_out(tiny, context={"max_transitions": 1000}, optimiser={"steps": 1})
    train(config, quiet=True)
    info, excluded = read_info(config.run)[1], held_out(jaco_store, config)
    assert len(excluded) == 3
    kept = all_but(jaco_store, excluded)
    assert info.transitions == 1000, "the cap counts training episodes only"
    info = read_info(shared("transformer").run)[1]
    rows = np.concatenate([jaco_store.episode(i)["observation"] for i in kept]).astype(np.float64)
    np.testing.assert_allclose(info.normalisation.mean, rows.mean(0), rtol=1e-6, atol=1e-9)
    assert info.best_return == jaco_store.returns(TASK)[kept].max()
    assert info.transitions == 5 * 250


@pytest.mark.parametrize("kind", ["transformer", "td3_bc"])
def test_a_resumed_run_is_bit_identical(shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    config = shared(kind, **(TD3 if kind == "td3_bc" else {}))
    whole = config.model_copy(update={"run": tmp_path / "stopped"})
    add = MetricsRecorder.add

    def add_and_stop(recorder: MetricsRecorder, step: int, metrics: dict) -> None:
        add(recorder, step, metrics)
        if step == 6:  # no measurement is due
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsRecorder, "add", add_and_stop)
        train(whole, quiet=True)
    assert saved_steps(whole.run) == [4, 6]
    train(whole, resume=True, quiet=True)
    shutil.rmtree(whole.run / "checkpoints" / "14")  # as if the run was killed after step 12
    train(whole, resume=True, quiet=True)
    assert entries(whole.run) == entries(config.run)
    assert best_step(whole.run) == best_step(config.run)
    assert load_policy(whole.run).parameter_hash == load_policy(config.run).parameter_hash


def test_measuring_does_not_change_training(tiny: TrainConfig, shared) -> None:
    often, seldom = shared("transformer"), with_held_out(tiny, validate_every=100)
    train(seldom, quiet=True)
    assert len(validations(often.run)) == 6
    assert list(validations(seldom.run)) == [4, 8, 12, 14], "at every checkpoint"
    for name in ("loss", "gradient_norm"):
        assert [one[name] for one in entries(often.run)] == [one[name] for one in entries(seldom.run)]
    for step, fields in validations(seldom.run).items():
        assert fields == validations(often.run)[step]


def test_the_best_checkpoint_has_the_lowest_held_out_loss(shared) -> None:
    run = shared("rising", **RISING).run
    found = {step: fields["validation_loss"] for step, fields in validations(run).items()}
    assert list(found) == list(range(2, 25, 2))
    best = min(found, key=found.__getitem__)
    assert best < 22, "or it is one of the newest two"
    assert best_step(run) == best
    assert saved_steps(run) == [best, 22, 24]
    assert load_policy(run, kind="best").step == best
    assert load_policy(run).step == 24


def test_a_run_ends_when_the_held_out_loss_stops_falling(tiny: TrainConfig, shared) -> None:
    whole = shared("rising", **RISING)
    lowest, count = np.inf, 0
    for step, fields in validations(whole.run).items():
        end, loss = step, fields["validation_loss"]
        lowest, count = min(lowest, loss), count + 1 if loss >= lowest else 0
        if count == 2:
            break
    assert 6 <= end < 24
    config, output = with_held_out(tiny, stop_after=2, **RISING), io.StringIO()
    train(config, console=Console(file=output, width=200))
    assert f"stopped at step {end}: validation loss has not fallen in the last 2 validations\n" in output.getvalue()
    expected = entries(config.run)
    without_counts = [{key: x for key, x in one.items() if key != "validations_without_fall"} for one in expected]
    assert without_counts == entries(whole.run)[:end]
    assert expected[-1]["validations_without_fall"] == 2
    assert f"held out {expected[-1]['validation_loss']:.4f}" in output.getvalue(), "in the last line"
    before = {path: path.read_bytes() for path in (config.run / "checkpoints").rglob("*") if path.is_file()}
    train(config, resume=True, quiet=True)
    assert {path: path.read_bytes() for path in before} == before, "a finished run"
    shutil.rmtree(config.run / "checkpoints" / str(end))
    assert EarlyStopping.saved(config.run, end - 2).since == 1, "the loss had not fallen at the checkpoint before"
    train(config, resume=True, quiet=True)  # as if the run was killed after that checkpoint
    assert entries(config.run) == expected
    assert read_info(config.run)[0] == end


@given(st.lists(st.floats(width=16), max_size=12))
def test_when_a_loss_has_not_fallen(losses: list[float]) -> None:
    stopping = EarlyStopping()
    for loss in losses:
        stopping = EarlyStopping(*json.loads(json.dumps(stopping.after(loss), allow_nan=False)))
    finite = [loss if np.isfinite(loss) else np.inf for loss in losses]
    since = len(losses) - 1 - int(np.argmin(finite)) if np.isfinite(finite).any() else len(losses)
    assert stopping.since == since


def test_stop_after_is_for_held_out_losses_that_training_minimises(tiny: TrainConfig, shared) -> None:
    with pytest.raises(ValueError, match="stop_after: has no effect without held-out episodes; set validation_fract"):
        TrainConfig.model_validate(tiny.model_dump() | {"stop_after": 1})
    assert with_held_out(tiny, stop_after=1).patience == 1
    run = shared("td3_bc", **TD3).run
    losses = [fields["validation_loss"] for fields in validations(run).values()]
    assert losses != sorted(losses, reverse=True), "it rose once"
    assert read_info(run)[0] == 14


@given(st.lists(st.tuples(*[st.one_of(st.none(), st.floats(0, 9))] * 2), min_size=1, max_size=6))
def test_which_checkpoint_is_best(losses) -> None:
    metrics = {number: {"loss": a, "validation_loss": b} for number, (a, b) in enumerate(losses)}
    known = [(b, n) for n, (_, b) in enumerate(losses) if b is not None]
    known = known or [(a, n) for n, (a, _) in enumerate(losses) if a is not None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringrl.training.checkpoints.saved_steps", lambda run: sorted(metrics))
        patch.setattr("ringrl.training.checkpoints._saved_metrics", lambda path: metrics[int(path.name)])
        assert best_step(Path("run")) == (min(known)[1] if known else None)


def test_without_held_out_episodes_the_best_has_the_lowest_training_loss(finished: TrainConfig) -> None:
    folder = finished.run / "checkpoints"
    saved = {step: json.loads((folder / str(step) / "metrics" / "metadata").read_text()) for step in (12, 14)}
    assert all("validation_loss" not in metrics for metrics in saved.values())
    assert load_policy(finished.run, kind="best").step == best_step(finished.run)
    for step in saved_steps(finished.run):
        (folder / str(step) / "metrics" / "metadata").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint has a finite loss"):
        load_policy(finished.run, kind="best")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation_fraction": 0.1}, r"validation_fraction: 0\.1 holds out 1 eligible .* needs 2; raise it"),
        ({"validation_fraction": 0.9}, r"leaves 1 eligible .* needs 2; lower it"),
    ],
    ids=str,
)
def test_too_few_episodes_stop_before_training(tiny: TrainConfig, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(tiny.model_copy(update=changes), quiet=True)
    assert not tiny.run.exists()


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "seq": 4}, {"fsdp": 2, "tensor": 2, "seq": 2}], ids=str)
def test_a_mesh_gives_the_losses_of_one_device(tiny: TrainConfig, jaco_store: EpisodeStore, mesh: dict) -> None:
    """Two processes on a mesh: test_distributed.py."""
    model = {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "token_set": "fused1"}
    config = with_held_out(tiny, model=model, context={"other_tasks": [OTHER]}, optimiser={"batch_size": 4})
    one, many = (measure(with_held_out(config, mesh=sizes), jaco_store)[0] for sizes in ({}, mesh))
    assert set(one) > {"validation_loss", "validation_gap"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), many, one)
