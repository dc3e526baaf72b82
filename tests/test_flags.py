"""Wrong, missing, repeated and useless flags are one line."""

from pathlib import Path

import pytest

from tests.test_cli import rejected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model.layer 3", "Unknown option: --model.layer. Did you mean --model.layers?"),
        ("--zzz --model.layer=3", "Unknown option: --zzz."),
        ("--model 3", "--model: expected settings by name, for example {name: value}, got '3'"),
        ("--model.heads 3", "--model: heads: width 128 over 3 heads must give an even integer per head"),
        (
            "--method foo",
            'Invalid value "foo" for --method. Choose from: "bc", "bc-10%", "bc-25%", "bc-50%", "dt", "at", "ad", '
            '"td3", "td3+bc".',
        ),
        ("--log wandb foo", "--log: expected 'tensorboard' or 'wandb', got 'foo'"),
        ("--optimiser.steps", 'Command "train" parameter --optimiser.steps requires an argument.'),
        ("--optimiser.steps --resume", 'Command "train" parameter --optimiser.steps requires an argument.'),
        (
            "--optimiser.steps many",
            "--optimiser.steps: expected a valid integer, unable to parse string as an integer, got 'many'",
        ),
        (
            "--optimiser.steps 2.5",
            "--optimiser.steps: expected a valid integer, unable to parse string as an integer, got '2.5'",
        ),
        (
            "--context.max-transitions many",
            "--context.max-transitions: expected a valid integer, unable to parse string as an integer, got 'many'",
        ),
        (
            "--optimiser.learning-rate x",
            "--optimiser.learning-rate: expected a valid number, unable to parse string as a number, got 'x'",
        ),
        ("--optimiser.learning-rate inf", "--optimiser.learning-rate: expected a finite number, got 'inf'"),
        ("--optimiser.batch-size 0", "--optimiser.batch-size: expected greater than or equal to 1, got '0'"),
        ("--actor-critic.target-rate 0", "--actor-critic.target-rate: expected greater than 0, got '0'"),
        ("--seed -1", "--seed: expected greater than or equal to 0, got '-1'"),
        ("--model.episode-window 20 -1", "--model.episode-window: expected greater than or equal to 0, got '-1'"),
        (
            "--context.other_tasks a --context.other-tasks=b",
            "Parameter --context.other-tasks specified multiple times.",
        ),
        ("--seed 1 --seed=2", "Parameter --seed specified multiple times."),
        ("--context.other-tasks y", "context.other_tasks: names a task twice, or the run's own task"),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", "--data", "x", "--task", "y", "--run", str(tmp_path / "run")]
    assert rejected([*base, *flags.split()], capsys) == f"ringrl: {expected} (see ringrl train --help)"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train", "parameter --data requires an argument. (see ringrl train --help)"),
        ("data download", "parameter DOMAIN requires an argument. (see ringrl data download --help)"),
        ("report a --output", "parameter --output requires an argument"),
        ("evaluate --tasks a --task b", "--task specified multiple times"),
        ("evaluate --control --no-control", "--no-control specified multiple times"),
        ("data import x.zip --max-episodes two", 'Invalid value for --max-episodes: unable to convert "two" into int.'),
        (f"evaluate --environments {2**63}", f"for --environments. expected less than 2^63, got {2**63}"),
    ],
)
def test_a_wrong_flag_of_any_command_is_one_line(
    arguments: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in rejected(arguments.split(), capsys)
