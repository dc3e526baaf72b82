import dataclasses
import errno
import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringrl.config import TrainConfig
from ringrl.config_files import to_yaml
from ringrl.errors import UserError
from ringrl.evaluation import load_policy
from ringrl.model import TrainState
from ringrl.training import read_info, train
from ringrl.training.checkpoints import (
    Checkpoints,
    EarlyStopping,
    RunInfo,
    _hide_late_errors,
    array_checksums,
    saved_steps,
    with_checksum,
    without_checksum,
)
from tests.damage import CHECKPOINT, ITERATOR, arrays, write_zeros


def test_missing_checkpoints_are_reported(finished: TrainConfig, tmp_path: Path) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="holds no checkpoint") as caught:
            load_policy(folder)
        assert str(folder) in str(caught.value)
    with pytest.raises(UserError, match=r"has no checkpoint of step 3; it has .*12, 14"):
        load_policy(finished.run, 3)
    assert load_policy(finished.run).step == 14
    assert load_policy(finished.run, 12).step == 12


def a_bit_of_the_arrays(step: Path) -> None:
    """Flip a bit of a value. The format holds some values twice and reads one copy, so several places are tried."""
    file = arrays(step)
    run, whole = step.parents[1], file.read_bytes()
    saved = load_policy(run).parameter_hash
    for place in range(len(whole) // 8, len(whole), len(whole) // 50):
        content = bytearray(whole)
        content[place] ^= 16
        file.write_bytes(content)
        try:
            found = load_policy(run)
        except UserError:
            return
        assert found.parameter_hash == saved, "a changed value was not noticed"
    raise AssertionError("no flipped bit changed a value")


DAMAGES = CHECKPOINT | {"a bit of the arrays": a_bit_of_the_arrays}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves coroutines behind
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error(finished: TrainConfig, damage: str) -> None:
    newest = finished.run / "checkpoints" / "14"
    DAMAGES[damage](newest)
    with pytest.raises(UserError, match=r"is damaged.*remove it to use an older one") as caught:
        load_policy(finished.run)
    assert str(newest) in str(caught.value)
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    with pytest.raises(UserError, match=r"14: is damaged.*remove it to use an older one"):
        train(finished, resume=True, quiet=True)


def test_without_the_newest_checkpoint_training_uses_the_one_before(finished: TrainConfig) -> None:
    metrics = finished.run / "metrics.jsonl"
    before = metrics.read_text()
    shutil.rmtree(finished.run / "checkpoints" / "14")
    train(finished, resume=True, quiet=True)
    assert load_policy(finished.run).step == 14
    assert without_speed(metrics.read_text()) == without_speed(before), "steps 13 and 14 again, bit for bit"


def without_speed(metrics: str) -> list[dict]:
    entries = map(json.loads, metrics.splitlines())
    return [
        {name: value for name, value in entry.items() if "per_second" not in name and name != "crc32"}
        for entry in entries
    ]


def test_without_a_readable_checkpoint_nothing_is_changed(finished: TrainConfig) -> None:
    steps = sorted((finished.run / "checkpoints").iterdir())
    for step in steps:
        write_zeros(step / "state")
    with pytest.raises(UserError, match=r"14: is damaged"):
        train(finished, resume=True, quiet=True)
    assert sorted((finished.run / "checkpoints").iterdir()) == steps, "nothing is moved"


def test_a_temporary_error_is_not_damage(finished: TrainConfig, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("orbax.checkpoint.AsyncCheckpointer.restore", refuse)
    with pytest.raises(UserError, match=r"cannot be read now and is not changed"):
        train(finished, resume=True, quiet=True)
    assert (finished.run / "checkpoints" / "14").is_dir()


@pytest.mark.parametrize("sitting", [6, 1, 2], ids=["at once", "resumed after each", "resumed after two"])
def test_the_newest_checkpoints_and_that_of_lowest_loss_are_kept(finished, tmp_path: Path, sitting: int) -> None:
    """Losses are saved, or each process would leave its checkpoints behind forever."""
    info = read_info(finished.run)[1]
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 4.0, 2.5], start=1):
        if step % sitting == 1 % sitting:
            checkpoints = Checkpoints(tmp_path, keep=2)
        state = TrainState({"w": jnp.full(3, step)}, (), jnp.array(step))
        checkpoints.save(state, info, {}, loss)
        if step % sitting == 0:
            checkpoints.close()
    assert saved_steps(tmp_path) == [2, 3, 5, 6], "one without a loss is kept too, to diagnose a failed run"


def test_a_deletion_that_a_kill_interrupts_leaves_no_half_checkpoint(finished: TrainConfig, monkeypatch) -> None:
    info, checkpoints = read_info(finished.run)[1], Checkpoints(finished.run, keep=1)
    state = TrainState({"w": jnp.ones(3)}, (), jnp.array(15))

    def killed(path: Path) -> None:
        next(path.rglob("*metadata")).unlink()
        raise KeyboardInterrupt

    def save_and_delete() -> None:
        checkpoints.save(state, info, {}, 9.0)
        checkpoints.wait()

    with monkeypatch.context() as patch:
        patch.setattr("ringrl.training.checkpoints.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            save_and_delete()
    assert all(read_info(finished.run, step) for step in saved_steps(finished.run))
    assert any(path.name.startswith(".deleted-") for path in checkpoints.folder.iterdir())
    Checkpoints(finished.run, keep=1).close()
    assert all(path.name.isdecimal() for path in checkpoints.folder.iterdir())


@pytest.mark.parametrize("half", ["metrics", "state", "all"])
def test_an_old_checkpoint_that_is_half_deleted_is_removed(finished: TrainConfig, half: str) -> None:
    """Earlier versions left such folders when they were killed."""
    folder = finished.run / "checkpoints"
    old = folder / "2"
    shutil.copytree(folder / "12", old)
    for item in ("metrics", "state") if half == "all" else (half,):
        shutil.rmtree(old / item)
    shutil.copytree(folder / "12", folder / "3.orbax-checkpoint-tmp")
    shutil.rmtree(folder / "14")
    train(finished, resume=True, quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == ["12", "14"]


@pytest.mark.parametrize("content", ["", '{"loss": 0.', '{"lass": 0.5}', "[]", '{"loss": "x"}'])
@pytest.mark.parametrize("file", ["metadata", "metrics"])
def test_damaged_metrics_of_any_checkpoint_stop_nothing(finished: TrainConfig, content: str, file: str) -> None:
    folder = finished.run / "checkpoints"
    (folder / "12" / "metrics" / "metadata").unlink()
    (folder / "12" / "metrics" / file).write_text(content)
    # What training reads of the metrics: when it resumes, and when it deletes old checkpoints.
    assert EarlyStopping.saved(finished.run, 12) == EarlyStopping()
    Checkpoints(finished.run, keep=2).close()
    assert saved_steps(finished.run) == [12, 14]
    assert load_policy(finished.run).step == 14
    if content == "[]":
        shutil.rmtree(folder / "14")
        train(finished, resume=True, quiet=True)
        assert load_policy(finished.run).step == 14


def test_a_full_disk_that_shows_at_the_end_is_one_line(tiny: TrainConfig, monkeypatch) -> None:
    """Orbax may raise the error of a background write again when it is closed."""

    def fail(self: ocp.AsyncCheckpointer) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "close", fail)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
        train(tiny, quiet=True)


def test_a_checkpoint_of_which_a_part_is_missing_stops_the_run(tiny: TrainConfig, monkeypatch) -> None:
    """Such a run used to end with exit code 0."""
    wait = ocp.AsyncCheckpointer.wait_until_finished

    def lose_the_arrays(self: ocp.AsyncCheckpointer) -> None:
        wait(self)
        for manifest in tiny.run.glob("checkpoints/*/state/manifest.ocdbt"):
            manifest.unlink()

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", lose_the_arrays)
    with pytest.raises(UserError, match=r"cannot be written .*checkpoints/4/state/manifest.ocdbt is missing"):
        train(tiny, quiet=True)


@pytest.mark.parametrize("name", ["[2026] thesis", "back\\slash"])
def test_a_path_that_orbax_reads_as_a_pattern_is_an_error(tiny: TrainConfig, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be stored in a path with [[\\]"):
        train(tiny.model_copy(update={"run": tiny.run.with_name(name)}), quiet=True)


def test_a_checkpoint_that_training_removes_while_it_is_read_is_named(finished, monkeypatch) -> None:
    restore, path = Checkpoints.restore, finished.run / "checkpoints" / "14"

    def prune_first(self: Checkpoints, step: int, like: TrainState) -> TrainState:
        shutil.rmtree(path)
        return restore(self, step, like)

    monkeypatch.setattr(Checkpoints, "restore", prune_first)
    with pytest.raises(UserError, match=r"14: was removed while it was read, .*try again"):
        load_policy(finished.run)


def test_a_dollar_in_a_saved_path_is_not_expanded(finished: TrainConfig) -> None:
    info = read_info(finished.run)[1]
    moved = info.config.model_copy(update={"data": Path("my$data/c.h5")})
    assert RunInfo.from_json(dataclasses.replace(info, config=moved).to_json()).config == moved


@pytest.mark.parametrize("damage", ITERATOR)
def test_resuming_needs_the_state_of_the_batch_iterator(finished: TrainConfig, damage: str) -> None:
    newest = finished.run / "checkpoints" / "14"
    ITERATOR[damage](newest)
    assert load_policy(finished.run).step == 14, "evaluation does not need it"
    with pytest.raises(UserError, match=r"14: is damaged"):
        train(finished, resume=True, quiet=True)


def test_the_description_of_a_checkpoint(finished: TrainConfig) -> None:
    step, info = read_info(finished.run)
    assert (step, info.config, info.domain) == (14, finished.model_copy(update={"run": info.config.run}), "jaco")
    assert (info.observation_size, info.action_size, info.normalisation.episode_length) == (42, 9, 250)
    assert {"ringrl", "jax", "mujoco"} <= set(info.versions)
    assert info.transitions == 8 * 250
    iterator = json.loads((finished.run / "checkpoints" / "14" / "iterator" / "metadata").read_text())
    assert without_checksum(iterator) == {"next_index": 14}


def test_a_checkpoint_of_another_version_is_not_called_damaged(finished: TrainConfig) -> None:
    description = finished.run / "checkpoints" / "14" / "info" / "metadata"
    values = json.dumps(without_checksum(json.loads(description.read_text()))).replace('"token_set"', '"token_sort"')
    description.write_text(json.dumps(with_checksum(json.loads(values))))
    with pytest.raises(UserError, match=r"does not fit this version.*token_sort"):
        load_policy(finished.run)


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_run_resumes(tiny: TrainConfig) -> None:
    """A limit on the file size plays the disk: writes beyond it fail as on a full disk."""
    model = tiny.model.model_copy(update={"width": 128})  # a checkpoint larger than the limit
    config = tiny.model_copy(update={"model": model})
    file = config.run.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    command = [str(Path(sys.executable).with_name("ringrl")), "train", "--config", str(file)]

    limited = ["bash", "-c", f"ulimit -f 100; exec {shlex.join(command)}"]  # kilobytes
    alone = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # or files of other tests would be cut short
    done = subprocess.run(limited, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("ringrl: ")]
    assert len(message) == 1
    assert message[0].startswith(f"ringrl: {config.run}")
    assert train(config, resume=True, quiet=True) == config.run
    assert load_policy(config.run).step == 14
    assert sorted(p.name for p in (config.run / "checkpoints").iterdir()) == ["12", "14"]


TREE = {
    "float": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.asarray(jnp.linspace(0, 3, 5, dtype=jnp.bfloat16)),
    "count": np.array(7, np.int32),
    "zeros": np.zeros(6, np.float32),
}


def flipped(array: np.ndarray, bit: int) -> np.ndarray:
    content = bytearray(array.tobytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    return np.frombuffer(bytes(content), array.dtype).reshape(array.shape)


@given(st.sampled_from(sorted(TREE)), st.integers(0, 10_000))
def test_one_flipped_bit_changes_the_checksum_of_its_array_only(name: str, bit: int) -> None:
    before = dict(zip(sorted(TREE), array_checksums(TREE), strict=True))
    after = dict(zip(sorted(TREE), array_checksums(TREE | {name: flipped(TREE[name], bit)}), strict=True))
    assert [key for key in before if before[key] != after[key]] == [name]


def test_values_with_a_checksum_survive_json() -> None:
    values = {"mean": [0.1, 1e-300, float("nan")], "name": "walker", "nothing": None, "deep": {"b": 1, "a": 2.0}}
    text = json.dumps(with_checksum(values))
    assert json.dumps(without_checksum(json.loads(text)), sort_keys=True) == json.dumps(values, sort_keys=True)
    with pytest.raises(ValueError, match="its checksum differs"):
        without_checksum(values)
    for was, now in (("0.1", "0.3"), ("walker", "wblker"), ("2.0", "6.0"), ('"b"', '"c"')):
        assert was in text
        with pytest.raises(ValueError, match="its checksum differs"):
            without_checksum(json.loads(text.replace(was, now)))


def test_only_errors_of_tensorstore_threads_are_hidden(tmp_path, monkeypatch):
    reports: list[str] = []
    monkeypatch.setattr("sys.unraisablehook", lambda ignored: reports.append(str(ignored.exc_value)))
    _hide_late_errors.cache_clear()
    for _ in range(2):
        Checkpoints(tmp_path).close()
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert reports == ["another"]
