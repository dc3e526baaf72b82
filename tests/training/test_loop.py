import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ringrl.config import TrainConfig, read_yaml, to_yaml
from ringrl.data import EpisodeStore
from ringrl.data.collect import collect
from ringrl.data.importer import import_archive
from ringrl.errors import UserError
from ringrl.training import load_policy, train


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["transformer", "behaviour_cloning"])
def test_loss_falls_and_everything_is_written(tiny: TrainConfig, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "collected"
    collect(tiny.task, folder, episodes=8, seed=0)  # controllers, not noise: there is something to learn
    store = import_archive(folder, tmp_path / "collected.h5", "jaco")
    model = tiny.model.model_copy(update={"kind": kind, "width": 32})
    optimiser = tiny.optimiser.model_copy(update={"steps": 60, "learning_rate": 3e-3})
    changes = {"data": store.path, "model": model, "optimiser": optimiser, "checkpoint_every": 25}
    config = tiny.model_copy(update=changes)
    assert train(config, quiet=True) == config.run
    found = losses(config.run)
    assert len(found) == 60
    assert sum(found[-5:]) / 5 < 0.7 * found[0]
    assert TrainConfig.model_validate(read_yaml(config.run / "config.yaml")) == config
    assert sorted(p.name for p in (config.run / "checkpoints").iterdir()) == ["50", "60"]  # the newest two
    assert list((config.run / "tensorboard").iterdir())
    trained = load_policy(config.run)
    assert trained.step == 60
    assert trained.info.data_fingerprint == store.fingerprint
    assert trained.info.best_return == store.returns(config.task).max()
    assert load_policy(config.run, 50).parameter_hash != trained.parameter_hash


def test_an_existing_run_is_not_overwritten(tiny: TrainConfig) -> None:
    train(tiny, quiet=True)
    with pytest.raises(UserError, match="use --resume") as caught:
        train(tiny, quiet=True)
    assert str(tiny.run) in str(caught.value)


def test_a_folder_with_other_files_is_left_alone(tiny: TrainConfig) -> None:
    tiny.run.mkdir()
    (tiny.run / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        train(tiny, quiet=True)
    assert [p.name for p in tiny.run.iterdir()] == ["thesis.tex"]


def test_another_configuration_is_refused_by_the_settings_name(tiny: TrainConfig) -> None:
    train(tiny, quiet=True)
    other = tiny.model_copy(update={"optimiser": tiny.optimiser.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UserError, match=r"optimiser\.learning_rate was 0\.001, is 0\.5"):
        train(other, resume=True, quiet=True)


def test_another_dataset_is_refused_and_a_moved_one_is_not(
    tiny: TrainConfig, jaco_folder: Path, jaco_store: EpisodeStore, tmp_path: Path
) -> None:
    train(tiny, quiet=True)
    moved = tmp_path / "moved.h5"
    moved.write_bytes(jaco_store.path.read_bytes())
    train(tiny.model_copy(update={"data": moved}), resume=True, quiet=True)
    fewer = tmp_path / "fewer"
    (fewer / "buffer").mkdir(parents=True)
    for file in sorted((jaco_folder / "buffer").iterdir())[:4]:
        (fewer / "buffer" / file.name).write_bytes(file.read_bytes())
    other = import_archive(fewer, tmp_path / "fewer.h5", "jaco")
    with pytest.raises(UserError, match="is not the dataset that"):
        train(tiny.model_copy(update={"data": other.path}), resume=True, quiet=True)


def test_missing_and_damaged_checkpoints_are_named(tiny: TrainConfig) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_policy(tiny.run)
    train(tiny, quiet=True)
    newest = tiny.run / "checkpoints" / "14"
    with pytest.raises(UserError, match="has no checkpoint of step 3; it has 12, 14"):
        load_policy(tiny.run, 3)
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\x00" * 16)
    with pytest.raises(UserError, match="is damaged") as caught:
        load_policy(tiny.run)
    assert str(newest) in str(caught.value)
    (newest / "info" / "metadata").write_text('{"config": ')
    with pytest.raises(UserError, match="is damaged"):
        load_policy(tiny.run)
    assert load_policy(tiny.run, 12).step == 12


def test_a_full_disk_is_one_line_and_the_run_can_go_on(tiny: TrainConfig) -> None:
    """A limit on file size stands for the disk: writing beyond it fails as a full disk does."""
    model = tiny.model.model_copy(update={"width": 128})  # a checkpoint larger than the limit
    config = tiny.model_copy(update={"model": model})
    file = config.run.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    command = [str(Path(sys.executable).with_name("ringrl")), "train", "--config", str(file)]

    limited = ["bash", "-c", f"ulimit -f 100; exec {shlex.join(command)}"]  # kilobytes
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"ringrl: {config.run}")
    assert "Traceback" not in done.stderr
    assert subprocess.run([*command, "--resume"], capture_output=True, check=False).returncode == 0
    assert load_policy(config.run).step == 14
