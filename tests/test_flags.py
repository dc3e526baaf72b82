"""Wrong, missing, repeated and useless flags are one line."""

from pathlib import Path

import pytest
import yaml

from tests.test_cli import rejected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model.layer 3", "--model.layer: no such flag; did you mean --model.layers?"),
        ("--zzz --model.layer=3", "--zzz: no such flag; --model.layer: no such flag; did you mean --model.layers?"),
        ("--model 3", "--model: no such flag; did you mean --model.kind?"),
        ("--model.heads 3", "--model: heads: width 128 over 3 heads must give an even integer per head"),
        (
            "--method foo",
            "--method: unknown value 'foo'; choose one of bc, bc-10%, bc-25%, bc-50%, dt, at, ad, td3, td3+bc",
        ),
        ("--launcher foo", "--launcher: unknown value 'foo'; choose one of none, slurm"),
        ("--log wandb foo", "--log: unknown value 'foo'; choose one of tensorboard, wandb"),
        ("--optimiser.steps", "--optimiser.steps: needs a value"),
        ("--optimiser.steps --resume", "--optimiser.steps: needs a value"),
        ("--optimiser.steps many", "--optimiser.steps: expected an integer, got 'many'"),
        ("--optimiser.steps 2.5", "--optimiser.steps: expected an integer, got '2.5'"),
        ("--context.max-transitions many", "--context.max-transitions: expected an integer, got 'many'"),
        ("--optimiser.learning-rate x", "--optimiser.learning-rate: expected a number, got 'x'"),
        ("--optimiser.learning-rate inf", "--optimiser.learning-rate: expected a finite number, got 'inf'"),
        ("--optimiser.batch-size 0", "--optimiser.batch-size: expected at least 1, got '0'"),
        ("--actor-critic.hindsight.radius 0", "--actor-critic.hindsight.radius: expected more than 0.0, got '0'"),
        ("--slurm.nodes 0", "--slurm.nodes: expected at least 1, got '0'"),
        ("--seed -1", "--seed: expected at least 0, got '-1'"),
        ("--model.episode-window 20 -1", "--model.episode-window: expected at least 0, got '-1'"),
        ("--context.other-tasks y", "context.other_tasks: names a task twice, or the run's own task"),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", "--data", "x", "--task", "y", "--run", str(tmp_path / "run")]
    assert rejected([*base, *flags.split()], capsys) == f"ringrl: {expected} (see ringrl train --help)"
    assert not (tmp_path / "run").exists()


def test_missing_flags_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ringrl: --data, --task and --run are needed (" in rejected(["train"], capsys)
    line = rejected(["train", "--dat=x", "--task", "y", "--run", "z"], capsys)
    assert "ringrl: --data is needed; --dat: no such flag; did you mean --data? (" in line
    assert "DOMAIN and ALGORITHM are needed (see ringrl data download" in rejected(["data", "download"], capsys)
    assert "--compare: needs 2 values (" in rejected(["report", "--compare", "a"], capsys)
    line = rejected(["data", "import", "x.zip", "--max-episodes", "2.5", "--workers", "two"], capsys)
    assert "--workers: expected an integer, got 'two'; --max-episodes: expected an integer, got '2.5'" in line


def test_a_flag_of_several_values_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--data", "x", "--task", "y", "--run", str(tmp_path / "run")]
    twice = ["--context.other_tasks", "a", "--context.other-tasks=b", "--seed", "1", "--seed", "2"]
    assert "--context.other-tasks: given twice; give all values" in rejected([*train, *twice], capsys)
    assert "--tasks: given twice" in rejected(["evaluate", "--tasks", "a", "--task", "b"], capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train --seed 1 --seed=2 --seed 3", "--seed is given twice: 1 and 2; keep one"),
        ("train --resume-or-start --resume b --resume c", "--resume is given twice: b and c; keep one"),
        ("train --model.layers 3 --model.layers=3 --seed 1 --seed=4", "--seed is given twice: 1 and 4; keep one"),
        ("evaluate --control --no-control", "--control is given twice: --control and --no-control; keep one"),
        ("report --compare a b --compare a c", "--compare is given twice: a b and a c; keep one"),
        (
            "data import x --domain jaco --workers 1 --domain walker",
            "--domain is given twice: jaco and walker; keep one",
        ),
    ],
)
def test_a_flag_with_two_values_is_rejected(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = rejected(arguments.split(), capsys)
    assert expected in line
    assert "--model.layers is given" not in line, "equal values do no harm"


def test_flags_without_effect_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"data": "x", "task": "jaco_reach_top_left", "output": str(tmp_path / "runs")}))
    train = ["train", "--data", "x", "--task", "jaco_reach_top_left", "--run", str(tmp_path / "run")]
    for command in (train, ["ablate", str(plan)], ["ablate", str(plan), "--dry-run"]):
        line = rejected([*command, "--slurm.gpus-per-node", "1", "--slurm.restarts=3"], capsys)
        assert "--slurm.gpus-per-node, --slurm.restarts: used only with --launcher slurm" in line
    line = rejected([*train, "--launcher", "slurm", "--distributed.enabled", "on"], capsys)
    assert "--distributed.enabled: not used with --launcher slurm" in line
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
