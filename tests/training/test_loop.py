import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from ringrl.collect import collect
from ringrl.config import TrainConfig
from ringrl.config_files import read_yaml
from ringrl.data import EpisodeStore
from ringrl.data.exorl.importer import import_archive
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler, eligible_episodes
from ringrl.errors import UserError
from ringrl.evaluation import load_policy
from ringrl.model import make_policy
from ringrl.model.agents.imitation import initial_state, make_train_step
from ringrl.model.optimiser import make_optimiser
from ringrl.training import read_info, train
from ringrl.training.checkpoints import Checkpoints, with_checksum, without_checksum


def entries(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("config", ["tiny", Path("configs/tiny.yaml"), {}])
def test_only_a_configuration_is_trained(config: object) -> None:
    with pytest.raises(UserError, match=r"^train: .* is not a TrainConfig; make one.*$"):
        train(config)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Episodes of controllers, not noise: there is something to learn."""
    folder = tmp_path_factory.mktemp("collected") / "jaco"
    collect("jaco_reach_top_left", folder, episodes=8, seed=0, workers=1)
    return import_archive(folder, folder.with_suffix(".h5"), "jaco")


@pytest.mark.parametrize("kind", ["transformer", pytest.param("behaviour_cloning", marks=pytest.mark.slow)])
def test_loss_falls_and_all_files_are_written(tiny: TrainConfig, kind: str, collected: EpisodeStore) -> None:
    model = tiny.model.model_copy(update={"kind": kind, "width": 32})
    optimiser = tiny.optimiser.model_copy(update={"steps": 30, "learning_rate": 5e-3})
    changes = {"data": collected.path, "model": model, "optimiser": optimiser, "checkpoint_every": 12}
    config = tiny.model_copy(update=changes)
    assert train(config, quiet=True) == config.run
    found = [entry["loss"] for entry in entries(config.run)]
    assert len(found) == 30
    assert sum(found[-5:]) / 5 < 0.7 * found[0]
    assert TrainConfig.model_validate(read_yaml(config.run / "config.yaml")) == config
    kept = {p.name for p in (config.run / "checkpoints").iterdir()}
    assert kept in ({"24", "30"}, {"12", "24", "30"}), "the newest two and the best"
    assert list((config.run / "tensorboard").iterdir())
    trained = load_policy(config.run)
    assert trained.step == 30
    assert trained.info.data_fingerprint == collected.fingerprint
    assert trained.info.best_return == collected.returns(config.task).max()
    assert load_policy(config.run, 24).parameter_hash != trained.parameter_hash


def test_checkpoints_and_metrics_equal_a_plain_loop(tiny: TrainConfig, jaco_store: EpisodeStore) -> None:
    """Checkpoints of every step are written in the background while the next step reuses the memory of the state."""
    short = tiny.optimiser.model_copy(update={"steps": 4})
    config = tiny.model_copy(update={"optimiser": short, "checkpoint_every": 1, "keep_checkpoints": 10})
    train(config, quiet=True)
    sampler = ContextSampler(
        jaco_store, tiny.task, tiny.context, Normalisation.of(jaco_store), tiny.optimiser.batch_size, tiny.seed
    )
    policy, untrained = (make_policy(tiny.model, 42, 9, tiny.seed) for _ in range(2))
    optimiser = make_optimiser(short)
    state, like = initial_state(lambda: policy, optimiser), initial_state(lambda: untrained, optimiser)
    step = make_train_step(nnx.split(policy, nnx.Param)[0], optimiser)
    checkpoints = Checkpoints(config.run)
    for number, entry in enumerate(entries(config.run), 1):
        state, metrics = step(state, sampler.batch(number - 1))
        expected = {name: float(value) for name, value in metrics.items()}
        assert {name: entry[name] for name in expected} == expected
        saved = checkpoints.restore(number, like)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(a, b)
    checkpoints.close()
    assert number == 4
    loaded = nnx.to_pure_dict(nnx.state(load_policy(config.run).policy, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, loaded, state.params)
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(like.params), strict=True)
    assert any((a != b).any() for a, b in pairs), "parameters changed"


@pytest.mark.parametrize(
    "kind",
    ["behaviour_cloning", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("transformer", "td3_bc"))],
)
def test_a_run_on_part_of_the_data_uses_no_other_episodes(
    tiny: TrainConfig, jaco_store: EpisodeStore, kind: str
) -> None:
    context = tiny.context.model_copy(update={"max_transitions": 1100, "best_fraction": 0.75})
    model = tiny.model.model_copy(update={"kind": kind})
    optimiser = tiny.optimiser.model_copy(update={"steps": 2})
    train(tiny.model_copy(update={"context": context, "model": model, "optimiser": optimiser}), quiet=True)
    _, info = read_info(tiny.run)
    used = eligible_episodes(jaco_store, tiny.task, tiny.seed, 1100, 0.75)
    assert (len(used), info.transitions) == (3, 750)
    assert info.best_return == jaco_store.returns(tiny.task)[used].max()
    rows = np.concatenate([jaco_store.episode(int(i))["observation"] for i in used]).astype(np.float64)
    np.testing.assert_allclose(info.normalisation.mean, rows.mean(0), rtol=1e-6, atol=1e-9)
    assert np.abs(info.normalisation.mean - Normalisation.of(jaco_store).mean).max() > 1e-3


def test_statistics_of_several_tasks_are_of_all_their_best_episodes(
    tiny: TrainConfig, jaco_store: EpisodeStore
) -> None:
    other = "jaco_reach_bottom_right"
    context = tiny.context.model_copy(update={"other_tasks": (other,), "best_fraction": 0.25})
    optimiser = tiny.optimiser.model_copy(update={"steps": 2})
    train(tiny.model_copy(update={"context": context, "optimiser": optimiser}), quiet=True)
    _, info = read_info(tiny.run)
    used = sorted({int(i) for task in (tiny.task, other) for i in np.argsort(jaco_store.returns(task))[-2:]})
    assert 2 < len(used) < 8, "the tasks have different best episodes"
    assert info.transitions == 250 * len(used)
    assert info.best_return == jaco_store.returns(tiny.task).max()
    rows = np.concatenate([jaco_store.episode(i)["observation"] for i in used]).astype(np.float64)
    np.testing.assert_allclose(info.normalisation.mean, rows.mean(0), rtol=1e-6, atol=1e-9)


def test_an_existing_run_is_not_overwritten(finished: TrainConfig) -> None:
    with pytest.raises(UserError, match="use --resume") as caught:
        train(finished, quiet=True)
    assert str(finished.run) in str(caught.value)


def test_a_folder_with_other_files_is_rejected(tiny: TrainConfig) -> None:
    tiny.run.mkdir()
    (tiny.run / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        train(tiny, quiet=True)
    assert [p.name for p in tiny.run.iterdir()] == ["thesis.tex"]


def test_a_run_folder_that_cannot_be_created_is_named(tiny: TrainConfig) -> None:
    tiny.run.write_text("a file")
    for run in (tiny.run, tiny.run / "below"):
        with pytest.raises(UserError, match=r"cannot be written .* choose another") as caught:
            train(tiny.model_copy(update={"run": run}), quiet=True)
        assert str(caught.value).startswith(str(run))
    assert tiny.run.read_text() == "a file"


def test_another_configuration_is_rejected_with_the_name_of_the_setting(finished: TrainConfig) -> None:
    other = finished.model_copy(update={"optimiser": finished.optimiser.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UserError, match=r"optimiser\.learning_rate was 0\.001, is 0\.5"):
        train(other, resume=True, quiet=True)


def test_a_run_that_is_older_than_a_setting_resumes(finished: TrainConfig) -> None:
    for saved in (finished.run / "checkpoints").glob("*/info/metadata"):
        values = without_checksum(json.loads(saved.read_text()))
        del values["config"]["context"]["sampling"]
        saved.write_text(json.dumps(with_checksum(values)))
    train(finished, resume=True, quiet=True)
    values["config"]["colour"] = "red"
    saved.write_text(json.dumps(with_checksum(values)))
    with pytest.raises(UserError, match=r"does not fit this version .*colour"):
        read_info(finished.run, int(saved.parents[1].name))


def test_another_dataset_is_rejected_and_a_moved_one_is_not(
    finished: TrainConfig, jaco_folder: Path, jaco_store: EpisodeStore, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.h5"
    moved.write_bytes(jaco_store.path.read_bytes())
    train(finished.model_copy(update={"data": moved}), resume=True, quiet=True)
    fewer = tmp_path / "fewer"
    (fewer / "buffer").mkdir(parents=True)
    for file in sorted((jaco_folder / "buffer").iterdir())[:4]:
        (fewer / "buffer" / file.name).write_bytes(file.read_bytes())
    other = import_archive(fewer, tmp_path / "fewer.h5", "jaco")
    with pytest.raises(UserError, match="is not the dataset that"):
        train(finished.model_copy(update={"data": other.path}), resume=True, quiet=True)


def test_data_that_does_not_fit_is_rejected_before_any_file_is_written(tiny: TrainConfig) -> None:
    many = tiny.context.model_copy(update={"trajectories": 9})
    for change, message in (
        ({"task": "walker_walk"}, "walker_walk"),
        ({"data": tiny.data.with_name("missing.h5")}, "missing.h5"),
        ({"context": many}, "context.trajectories"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny.model_copy(update=change), quiet=True)
    assert not tiny.run.exists()
