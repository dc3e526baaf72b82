"""A run's folder: copied, moved, linked, locked, edited and refused runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ringrl.cli import main
from ringrl.config import TrainConfig
from ringrl.config_files import read_yaml, to_yaml
from ringrl.errors import UserError
from ringrl.evaluation import load_policy
from ringrl.training import read_info, train
from ringrl.training.checkpoints import saved_steps
from ringrl.training.run_folder import run_lock


def as_preempted(run: Path) -> None:
    """Make a finished run look as if it was killed after step 12."""
    shutil.rmtree(run / "checkpoints" / "14")


def rejected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    line = capsys.readouterr().err
    assert (stop.value.code, line.count("\n")) == (2, 1), line
    return line


@pytest.mark.parametrize("arguments", ["--resume {}", "--config {}/config.yaml --resume", "--run {} --resume-or-start"])
def test_a_copy_resumes_in_its_own_folder(finished: TrainConfig, tmp_path: Path, arguments: str) -> None:
    as_preempted(finished.run)
    copy = tmp_path / "copy"
    shutil.copytree(finished.run, copy)
    main(["train", *arguments.format(copy).split()])
    assert (saved_steps(copy)[-1], saved_steps(finished.run)[-1]) == (14, 12)


def test_a_moved_and_a_linked_run_resume_with_their_own_settings(finished: TrainConfig, tmp_path: Path) -> None:
    expected = load_policy(finished.run).parameter_hash
    as_preempted(finished.run)
    moved = finished.run.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    (moved / "config.yaml").unlink()  # the checkpoint holds the settings
    main(["train", "--resume", str(tmp_path / "link"), "--keep-checkpoints", "1"])
    assert load_policy(moved).parameter_hash == expected
    assert not finished.run.exists()


@pytest.mark.slow
def test_a_run_may_be_a_link_to_a_folder_that_is_not_there_yet(tiny: TrainConfig, tmp_path: Path) -> None:
    tiny.run.symlink_to(tmp_path / "scratch" / "run")
    train(tiny, quiet=True)
    assert saved_steps(tmp_path / "scratch" / "run") == [12, 14]
    assert tiny.run.is_symlink()


@pytest.mark.slow
def test_a_read_only_run_is_read(finished: TrainConfig) -> None:
    before = load_policy(finished.run).parameter_hash
    folders = [finished.run, *(path for path in finished.run.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    code = "import sys; from pathlib import Path; from ringrl.evaluation import load_policy; "
    code += "print(load_policy(Path(sys.argv[1])).parameter_hash)"
    command = [sys.executable, "-c", code, finished.run]
    if os.getuid() == 0:  # root could write anywhere
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for folder in folders:
        folder.chmod(0o755)
    assert done.stdout.strip() == before, done.stderr


def test_resuming_needs_a_run(finished: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nothing", "."):
        assert "holds no run to resume" in rejected(["train", "--resume", str(tmp_path / name)], capsys)
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(finished.model_copy(update={"run": tmp_path / "gone"})))
    assert "holds no run to resume" in rejected(["train", "--config", str(config), "--resume"], capsys)
    assert not (tmp_path / "gone").exists()
    assert "--run b: differs from --resume a" in rejected(["train", "--resume", "a", "--run", "b"], capsys)
    assert "give the folder of a run" in rejected(["train", "--resume"], capsys)


def test_an_edited_configuration_is_compared_with_the_checkpoint(finished: TrainConfig, capsys) -> None:
    saved = finished.run / "config.yaml"
    whole = saved.read_text()
    for setting, was, now in (("learning_rate", "0.001", "0.5"), ("width", "16", "32")):
        saved.write_text(whole.replace(f"{setting}: {was}", f"{setting}: {now}"))
        line = rejected(["train", "--config", str(saved), "--resume"], capsys)
        assert f"{setting} was {was}, is {now}" in line
        assert "damaged" not in line
    assert saved_steps(finished.run) == saved_steps(finished.run)


def test_one_process_trains_in_a_folder(finished: TrainConfig, tmp_path: Path) -> None:
    as_preempted(finished.run)
    with (
        run_lock(finished.run),
        pytest.raises(UserError, match=rf"run: another process trains in it \(process {os.getpid()} on "),
    ):
        train(finished, resume=True, quiet=True)
    train(finished, resume=True, quiet=True)
    code = "import os, sys; from pathlib import Path; from ringrl.training.run_folder import run_lock; "
    code += "held = run_lock(Path(sys.argv[1])); held.__enter__(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, finished.run], check=False)
    assert (finished.run / ".lock").exists()
    train(finished, resume=True, quiet=True)
    assert not (finished.run / ".lock").exists(), "the lock of a process that is gone is taken over"


def test_a_run_that_fails_before_its_first_step_leaves_its_name(tiny: TrainConfig, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("ringrl.training.loop.make_agent", fail)
        with pytest.raises(MemoryError):
            train(tiny, quiet=True)
    other = tiny.model_copy(update={"checkpoint_every": 7})
    train(other, quiet=True)
    assert read_info(tiny.run)[1].config.checkpoint_every == 7
    assert TrainConfig.model_validate(read_yaml(tiny.run / "config.yaml")) == other


@pytest.mark.slow
def test_a_dollar_in_the_paths_of_a_run_is_not_expanded(tiny: TrainConfig, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also if nothing is there any more, so that the path cannot be recognised."""
    monkeypatch.setenv("X", "elsewhere")
    folder = tmp_path / "$X"
    folder.mkdir()
    data = folder / "data.h5"
    data.hardlink_to(tiny.data)
    config = tiny.model_copy(update={"data": data, "run": folder / "run"})
    train(config, quiet=True)
    data.unlink()
    for name in ("checkpoint", "config.yaml"):
        if name == "config.yaml":
            shutil.rmtree(config.run / "checkpoints")
        assert f"{data}: no such file" in rejected(["train", "--resume", str(config.run)], capsys)
    main(["train", "--resume", str(config.run), "--data", str(tiny.data)])
    assert saved_steps(config.run) == [12, 14]


def test_home_and_variables_in_paths(tiny: TrainConfig, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    values = json.loads(tiny.model_dump_json())
    for text, folder in (("~/runs/x", tmp_path / "home/runs/x"), ("${SCRATCH}/y", tmp_path / "scratch/y")):
        assert TrainConfig.model_validate(values | {"run": text}).run == folder
    monkeypatch.delenv("SCRATCH")
    assert "$SCRATCH is not set" in rejected(["train", "--resume=$SCRATCH/y"], capsys)
    file = tmp_path / "home" / "c.yaml"
    file.parent.mkdir()
    file.write_text(to_yaml(tiny))
    main(["train", "--config=~/c.yaml", "--run=~/z"])
    assert saved_steps(tmp_path / "home" / "z") == [12, 14]
